"""Ranks of real processes, killed at any moment, end with the bits of a run that was not."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import holdfast
from tests.ranks.jobs import Job
from tests.support.exhaustive import EXHAUSTIVE

_KILLS = 50 if EXHAUSTIVE else 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "size"), [("ddp", 2), ("fsdp", 4), *([("ddp", 4), ("fsdp", 2)] if EXHAUSTIVE else [])]
)
def test_killed_ranks_end_as_if_they_were_not(kind: str, size: int, tmp_path: Path) -> None:
    whole = Job(tmp_path / "whole", kind)
    assert whole.finish(size) == 0, whole.log().read_text()
    rng = random.Random(f"{kind} {size}")
    kills = 0
    while kills < _KILLS:
        job = Job(tmp_path / f"killed{kills}", kind)
        # On a busy machine a start takes longer than the moments among which one is drawn.
        while job.killed(size, rng, saved=rng.random() < 0.5) != 0:
            kills += 1
            if kills >= _KILLS:
                assert job.finish(size) == 0, job.log().read_text()
                break
        assert job.results(size) == whole.results(size)
        with holdfast.CheckpointManager(job.run) as ckpts:
            assert all(each.ok for each in ckpts.verify())
