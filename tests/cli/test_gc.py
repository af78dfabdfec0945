"""`holdfast gc`: orphans go, and nothing else; never beside a live writer."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import holdfast
from holdfast.cli.gc import orphans_text
from holdfast.core import process
from holdfast.errors import Fenced, RunHeld
from holdfast.repo import orphans
from holdfast.repo.repo import Repo
from holdfast.stores.base import ObjectInfo
from holdfast.stores.local import LocalStore
from tests.cli.conftest import Command, failed, failed_loudly, flip, same_error_as_json, tidy

DIES_BEFORE_ITS_COMMIT = """
import os, signal, sys
import holdfast
from holdfast.repo.writer import Writer
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
manager = holdfast.CheckpointManager(sys.argv[1], keep=None)
manager.acquire()
Writer.commit = die
manager.save(500, {"x": bytes(20_000)}, block=True)
"""


@pytest.fixture
def killed(run: Path) -> Path:
    """The run after a save that was killed between its packs and its commit."""
    command = [sys.executable, "-c", DIES_BEFORE_ITS_COMMIT, str(run)]
    done = subprocess.run(command, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return run


def names(run: Path) -> set[str]:
    return {
        str(p.relative_to(run)) for p in run.rglob("*") if p.is_file() and p.parent.name != "log"
    }


def test_gc(killed: Path, holdfast_cli: Command) -> None:
    before = names(killed)
    done = holdfast_cli("gc", killed, "--dry-run")
    assert (done.status, done.err) == (0, "")
    assert re.sub(r"packs/\S+", "PACK", done.out).split("\n")[1:] == [
        "PACK  24.1 KB  no checkpoint needs it",
        "Would remove 1 pack, free 24.1 KB.",
        "",
    ]
    assert names(killed) == before
    value = holdfast_cli("gc", killed, "--dry-run", "--json").json
    assert (value["ok"], value["run"], value["dry_run"]) == (True, str(killed), True)
    [orphan] = value["removed"]
    assert value["freed_bytes"] == orphan["nbytes"] == (killed / orphan["key"]).stat().st_size
    assert holdfast_cli("gc", killed, "--json").json == {**value, "dry_run": False}
    assert names(killed) == before - {orphan["key"]}
    assert holdfast_cli("verify", killed).status == 0
    again = holdfast_cli("gc", killed)
    assert tidy(again.out, killed) == "Nothing to remove: every object in A is needed.\n"


def test_gc_says_what_it_removed(killed: Path, holdfast_cli: Command) -> None:
    done = holdfast_cli("gc", killed)
    assert done.out.split()[:3] == ["OBJECT", "SIZE", "WHY"]
    assert done.out.endswith("\nRemoved 1 pack, freed 24.1 KB.\n")


def test_a_page_of_many_objects_fits_and_says_why() -> None:
    objects = [
        ObjectInfo(f"{folder}/{i:06}-{'f' * 60}\x1b.json", 10**i % 7919)
        for folder in ("manifests", "packs", "segments")
        for i in range(20)
    ]
    lines = orphans_text("runs/x", objects, dry_run=True, width=80).split("\n")
    assert all(len(line) <= 80 and line.isprintable() for line in lines)
    assert [line.split("  ")[-1].strip() for line in lines[:26:8]] == [
        "WHY",
        "never committed",
        "never committed",
        "no checkpoint needs it",
    ]
    assert lines[25:] == [
        "… 36 objects more (--json shows all)",
        "Would remove 20 manifests, 20 packs, 20 segments, free " + lines[-1].split("free ")[1],
    ]


@pytest.mark.parametrize("extra", [[], ["--dry-run"]])
def test_gc_refuses_beside_a_live_writer(
    tmp_path: Path, holdfast_cli: Command, extra: list[str]
) -> None:
    run = tmp_path / "run"
    with holdfast.CheckpointManager(run) as manager:
        manager.save(1, {"x": 1}).result()
        error = failed(holdfast_cli("gc", run, *extra), 11)
        assert f"is held by process {os.getpid()} on " in error
        assert "--take-over" in error
        assert same_error_as_json(holdfast_cli, "gc", run, *extra)["exit_code"] == 11
        manager.save(2, {"x": 2}).result()


def test_take_over_fences_the_writer(tmp_path: Path, holdfast_cli: Command) -> None:
    run = tmp_path / "run"
    manager = holdfast.CheckpointManager(run)
    manager.save(1, {"x": 1}).result()
    assert holdfast_cli("gc", run, "--take-over", "--dry-run").status == 0
    manager.save(2, {"x": 2}).result()
    assert holdfast_cli("gc", run, "--take-over").status == 0
    with pytest.raises(Fenced):
        manager.save(3, {"x": 3}).result()
    with pytest.raises(holdfast.HoldfastError):
        manager.close()


def test_a_writer_that_may_live_elsewhere_counts(killed: Path) -> None:
    """On another machine, or in another container: a job must not lose its run to a broom."""
    repo = Repo(LocalStore(killed))
    try:
        for dry_run in (True, False):
            with pytest.raises(RunHeld, match="cannot be known from here"):
                orphans.collect_orphans(repo, dry_run=dry_run, alive=lambda holder: None)
        assert len(orphans.find_orphans(repo)) == 1
        assert len(orphans.collect_orphans(repo, take_over=True, alive=lambda holder: None)) == 1
    finally:
        repo.close()
    assert process.is_alive(process.current())


def test_gc_of_a_damaged_log_waits_for_its_repair(killed: Path, holdfast_cli: Command) -> None:
    newest = max((killed / "log").iterdir(), key=lambda entry: entry.name)
    flip(newest, newest.stat().st_size // 2)
    before = names(killed)
    for extra in ([], ["--dry-run"]):
        assert f"holdfast doctor {killed} --repair" in failed_loudly(
            holdfast_cli("gc", killed, *extra), 4
        )
    assert names(killed) == before


def test_gc_of_nothing(run: Path, holdfast_cli: Command) -> None:
    assert "there is no run in" in failed(holdfast_cli("gc", run.parent), 10)
    assert "names a checkpoint; a run is wanted" in failed(holdfast_cli("gc", f"{run}@100"), 2)


def test_a_finished_run_stays_finished(killed: Path, holdfast_cli: Command) -> None:
    with holdfast.CheckpointManager(killed, keep=None) as manager:
        manager.save(600, {"x": 1}, finished=True).result()
    assert holdfast_cli("gc", killed).status == 0
    assert holdfast_cli("ls", killed, "--json").json["finished"] is True
