"""What `holdfast show` says of a checkpoint of several ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from click.testing import CliRunner

import holdfast
from holdfast.cli import cli
from tests.support.thread_ranks import ThreadGroup, all_ranks


def test_show_says_how_many_there_were(tmp_path: Path) -> None:
    def save(group: ThreadGroup) -> None:
        with holdfast.CheckpointManager(tmp_path / "run", group=group) as ckpts:
            ckpts.save(1, {"own": np.full(3, group.ranks.rank), "n": group.ranks.rank}).result()

    all_ranks(3, save)
    done = CliRunner().invoke(cli, ["show", str(tmp_path / "run"), "--leaves"])
    assert done.exit_code == 0
    assert "ranks  3; values, random states and positions are those of rank 0" in done.output
    assert "@1/own" not in done.output
