"""`holdfast ls` shows where each checkpoint is."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from holdfast import CheckpointManager
from holdfast.cli import cli
from holdfast.manager import mirror_status
from holdfast.manager.mirror import Mirror
from holdfast.repo import keys
from holdfast.repo.mirrors import remembered
from holdfast.stores.open import open_store
from tests.mirror.support import WAIT_S, Line, state
from tests.support.servers.proxy import FaultProxy
from tests.support.servers.service import Place

Lines = Callable[[str], Line]


def ls(run: Path, *words: str) -> str:
    done = CliRunner().invoke(cli, ["ls", str(run), *words])
    assert done.exit_code == 0, done.output
    return done.output


def made(folder: Path, lines: Lines) -> tuple[Path, Path]:
    """Steps 1 to 3 in the mirror, 2 to 4 in the run."""
    run, there = folder / "run", folder / "mirror"
    line = lines(str(there))
    with CheckpointManager(
        run, keep="last=3", mirror=there, mirror_keep="", mirror_wait=0
    ) as ckpts:
        for step in (1, 2, 3):
            ckpts.save(step, state(step)).result()
            assert ckpts.wait_mirrored(WAIT_S)
        line.down = True
        ckpts.save(4, state(4)).result()
    return run, there


def test_the_column_says_which_are_in_the_mirror(tmp_path: Path, lines: Lines) -> None:
    run, there = made(tmp_path, lines)
    head, *rows, total, mirror = ls(run).splitlines()
    assert head.split()[:5] == ["STEP", "SAVED", "SIZE", "NEW", "MIRROR"]
    at = head.index("MIRROR")
    assert [(row.split()[0], row[at:].split()[0]) for row in rows] == [
        ("4", "no"),
        ("3", "yes"),
        ("2", "yes"),
    ]
    assert total.startswith("3 checkpoints")
    assert mirror == f"mirror {there}: 3 checkpoints, 1 of them only there."
    found = json.loads(ls(run, "--json"))
    assert found["mirror"] == {"address": str(there), "checkpoints": 3}
    assert [row["mirrored"] for row in found["checkpoints"]] == [False, True, True]


def test_without_a_mirror_there_is_none(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "run") as ckpts:
        ckpts.save(1, state(1)).result()
    assert "MIRROR" not in ls(tmp_path / "run")
    found = json.loads(ls(tmp_path / "run", "--json"))
    assert "mirror" not in found
    assert "mirrored" not in found["checkpoints"][0]


def test_one_that_is_gone_is_empty(tmp_path: Path, lines: Lines) -> None:
    run, there = made(tmp_path, lines)
    shutil.rmtree(there)
    assert ls(run).splitlines()[-1] == f"mirror {there}: 0 checkpoints."


def test_one_that_does_not_answer_is_not_waited_for(
    tmp_path: Path,
    s3: Place,
    faulty: Callable[[Place], tuple[Place, FaultProxy]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place, proxy = faulty(s3)
    with CheckpointManager(tmp_path / "run", mirror=place.address) as ckpts:
        ckpts.save(1, state(1)).result()
    head, row, _, last = ls(tmp_path / "run").splitlines()
    assert row[head.index("MIRROR") :].split()[0] == "yes"
    assert last.endswith(": 1 checkpoint.")
    monkeypatch.setattr(mirror_status, "ANSWER_S", 0.3)
    proxy.go_down()
    head, row, _, last = ls(tmp_path / "run").splitlines()
    assert row[head.index("MIRROR") :].split()[0] == "?"
    assert last.endswith("it does not answer.")
    found = json.loads(ls(tmp_path / "run", "--json"))
    assert found["mirror"]["checkpoints"] is None
    assert found["checkpoints"][0]["mirrored"] is None


def test_the_run_remembers_the_last_mirror_in_one_object(tmp_path: Path) -> None:
    run = tmp_path / "run"
    store = open_store(str(run))
    for there in ("a", "a", "b"):
        with CheckpointManager(run, mirror=tmp_path / there) as ckpts:
            ckpts.save(1, state(1)).result()
        assert remembered(store) == str(tmp_path / there)
        assert len(list(store.list(keys.MIRRORS))) == 1
    with CheckpointManager(run) as ckpts:
        ckpts.gc()
        ckpts.save(2, state(2)).result()
    assert remembered(store) == str(tmp_path / "b")
    [info] = store.list(keys.MIRRORS)
    (run / info.key).write_bytes(b"{}")
    assert remembered(store) == ""


def test_the_mirror_is_remembered_by_whichever_thread_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that ends at once, on a machine that has no time for what is of low priority."""
    work, second = Mirror._work, threading.Event()

    def late(self: Mirror, low: bool) -> None:
        assert not low or second.wait(WAIT_S)
        work(self, low)
        second.set()

    monkeypatch.setattr(Mirror, "_work", late)
    with CheckpointManager(tmp_path / "run", mirror=tmp_path / "mirror") as ckpts:
        ckpts.save(1, state(1)).result()
    assert remembered(open_store(str(tmp_path / "run"))) == str(tmp_path / "mirror")
