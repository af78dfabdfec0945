"""`holdfast doctor`: what it finds, what it says to do, and its repair."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

import pytest

import holdfast
from holdfast.cli.doctor import health_text
from holdfast.manager import doctor
from holdfast.manager.doctor import Finding, Health
from holdfast.repo.repo import Repo
from holdfast.stores import abilities
from holdfast.stores.abilities import Abilities
from holdfast.stores.local import LocalStore
from holdfast.stores.memory import MemoryStore
from tests.cli.conftest import (
    Command,
    failed,
    failed_loudly,
    flip,
    newest_pack,
    same_error_as_json,
    tidy,
)
from tests.cli.test_gc import killed as killed
from tests.cli.test_render import HOSTILE, cells


def findings(cli: Command, *words: object) -> dict[str, Any]:
    rows = cli("doctor", *words, "--json").json["findings"]
    return {row["check"]: row for row in rows}


def damaged_log(run: Path, entries: int = 1) -> None:
    for entry in sorted((run / "log").iterdir())[-entries:]:
        flip(entry, entry.stat().st_size // 2)


ABLE = Abilities(True, "", "ext4", 500 * 10**9, True, True, True, True)


def test_a_healthy_run(run: Path, holdfast_cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "probe", lambda store: ABLE)
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    done = holdfast_cli("doctor", run)
    assert (done.status, done.err) == (0, "")
    # The state is larger by PyTorch's random state where another test has loaded that.
    out = re.sub(r"4\d\.\d KB: room for 1[12],\d{3},\d{3} more", "40 KB: room for more", done.out)
    assert tidy(out, run) == (
        "CHECK        STATE  WHAT\n"
        "run          ok     format 1, id <id>, started 3 h ago\n"
        "log          ok     entry 8 (close) is the newest of 8\n"
        "checkpoints  ok     4 of 4 whole (their packs compared by size; --full reads\n"
        "                    every byte)\n"
        "leftovers    ok     none\n"
        "writer       ok     no process writes it\n"
        "file system  ok     ext4, 500 GB free; hard links, renaming without replacing,\n"
        "                    sync of folders, preallocation\n"
        f"versions     ok     Holdfast {holdfast.__version__} here reads formats up to 1\n"
        "\n"
        "CHECK    STATE  WHAT\n"
        "signals  ok     SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 arrive\n"
        "parents  ok     none that a signal has to pass\n"
        "grace    ok     no Kubernetes, Slurm or systemd service here: who sends SIGTERM\n"
        "                sets it; a save takes 1.00 s (p95)\n"
        "notices  ok     no cloud was recognized, so only signals tell of the end\n"
        "space    ok     500 GB free; every checkpoint stays (keep), a checkpoint is up\n"
        "                to 40 KB: room for more\n"
        "A is healthy.\n"
    )
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before
    value = holdfast_cli("doctor", run, "--json", "--full").json
    assert (value["ok"], value["run"], value["repaired"]) == (True, str(run), None)
    assert value["findings"][2] == {
        "check": "checkpoints",
        "state": "ok",
        "what": "4 of 4 whole (every byte read)",
        "do": "",
    }


def test_damaged_bytes_show_with_full(run: Path, holdfast_cli: Command) -> None:
    newest = newest_pack(run)
    flip(newest, newest.stat().st_size - 1)
    assert holdfast_cli("doctor", run).status == 0
    done = holdfast_cli("doctor", run, "--full")
    assert f"{run} has 1 problem" in failed(done, 4)
    assert "step 400: 'model/w' in packs/" in " ".join(done.out.split())
    found = findings(holdfast_cli, run, "--full")
    assert found["checkpoints"]["what"] == "3 of 4 whole (every byte read)"
    remedy = found["checkpoint"]["do"]
    assert remedy.startswith(f"holdfast rm {run}@")
    assert same_error_as_json(holdfast_cli, "doctor", run, "--full")["hint"] == remedy
    assert holdfast_cli(*remedy.split()[1:]).status == 0, "what it says to do helps"
    assert holdfast_cli("doctor", run, "--full").status == 0


def test_a_lost_pack(run: Path, holdfast_cli: Command) -> None:
    for pack in (run / "packs").iterdir():
        pack.unlink()
    done = holdfast_cli("doctor", run, "--repair")
    assert "has 5 problems" in failed(done, 4)
    assert "0 of 4 whole" in done.out
    assert "Look for a copy of the run" in done.out
    assert "There is nothing to repair" in done.out, "a list is no data"


def test_repair_of_a_damaged_newest_entry(run: Path, holdfast_cli: Command) -> None:
    damaged_log(run)
    done = holdfast_cli("doctor", run)
    assert done.status == 4
    assert "readers fall back to entry 7 (pin)" in " ".join(done.out.split())
    assert f"Hint: holdfast doctor {run} --repair\n" in done.err
    assert "is damaged" in failed_loudly(holdfast_cli("prune", run, "--keep", "last=1"), 4)
    done = holdfast_cli("doctor", run, "--repair")
    assert done.status == 0
    assert done.out.endswith(f"The list of checkpoints was rebuilt.\n{run} is healthy.\n")
    listed = holdfast_cli("ls", run, "--json").json["checkpoints"]
    assert [c["step"] for c in listed] == [400, 300, 200, 100]
    assert (listed[2]["tags"], listed[3]["pinned"]) == (["gold"], True)
    assert holdfast_cli("prune", run, "--keep", "last=1").status == 0


def test_repair_of_a_log_without_a_usable_entry(run: Path, holdfast_cli: Command) -> None:
    damaged_log(run, 99)
    value = holdfast_cli("doctor", run, "--json").json
    assert (value["ok"], value["exit_code"]) == (False, 4)
    value = holdfast_cli("doctor", run, "--repair", "--json").json
    assert (value["ok"], value["repaired"]) == (True, True)
    listed = holdfast_cli("ls", run, "--json").json["checkpoints"]
    assert [c["step"] for c in listed] == [400, 300, 200, 100]
    again = holdfast_cli("doctor", run, "--repair", "--json").json
    assert (again["ok"], again["repaired"]) == (True, False)


def test_repair_of_a_lost_holdfast_json(run: Path, holdfast_cli: Command) -> None:
    (run / "holdfast.json").unlink()
    done = holdfast_cli("doctor", run)
    assert "has 1 problem" in failed(done, 4)
    assert "no program finds the run" in " ".join(done.out.split())
    assert holdfast_cli("doctor", run, "--repair").status == 0
    assert len(holdfast_cli("ls", run, "--json").json["checkpoints"]) == 4


def test_a_damaged_holdfast_json_loses_nothing(run: Path, holdfast_cli: Command) -> None:
    flip(run / "holdfast.json", 90)
    found = findings(holdfast_cli, run)
    assert found["run"]["state"] == "note"
    assert "the log has all that it said" in found["run"]["what"]


def test_what_a_killed_save_left(killed: Path, holdfast_cli: Command) -> None:
    found = findings(holdfast_cli, killed)
    assert found["leftovers"]["state"] == "note"
    assert found["leftovers"]["what"] == "1 object, 24.1 KB, that no checkpoint needs"
    assert found["leftovers"]["do"] == f"holdfast gc {killed}"
    assert found["writer"]["state"] == "note"
    assert "is gone and did not close it" in found["writer"]["what"]
    assert found["writer"]["do"] == "Start the job again: it goes on."
    assert holdfast_cli("doctor", killed).status == 0, "nothing is lost"


def test_a_live_writer(tmp_path: Path, holdfast_cli: Command) -> None:
    run = tmp_path / "run"
    with holdfast.CheckpointManager(run) as manager:
        manager.save(1, {"x": 1}).result()
        (run / "packs").mkdir(exist_ok=True)
        (run / "packs" / "000001-0123456789abcdef-0-0.safetensors").write_bytes(b"x" * 10)
        found = findings(holdfast_cli, run)
        assert f"process {os.getpid()} on " in found["writer"]["what"]
        assert "writes it; its last commit was now" in found["writer"]["what"]
        assert found["leftovers"]["state"] == "ok"
        assert "under way, perhaps" in found["leftovers"]["what"]
        damaged_log(run)
        done = holdfast_cli("doctor", run, "--repair")
        assert done.status == 11, done
        assert "is held by process" in done.err
        assert holdfast_cli("doctor", run, "--repair", "--take-over").status == 0
        with pytest.raises(holdfast.HoldfastError):
            manager.save(2, {"x": 2}, block=True)
        manager.wait()
        manager._saver.last_error = None  # type: ignore[union-attr]


def test_a_writer_on_another_machine(killed: Path) -> None:
    repo = Repo(LocalStore(killed))
    try:
        health = doctor.examine(repo, "A", alive=lambda holder: None)
        found = {finding.check: finding for finding in health.findings}
        assert "whether it still runs cannot be known" in found["writer"].what
        assert found["leftovers"].state == "ok"
        with pytest.raises(holdfast.HoldfastError, match="cannot be known from here"):
            doctor.repair(repo, alive=lambda holder: None)
    finally:
        repo.close()


def test_nothing_there(tmp_path: Path, holdfast_cli: Command) -> None:
    assert "there is no run in" in failed(holdfast_cli("doctor", tmp_path), 10)
    assert "a run is wanted" in failed(holdfast_cli("doctor", f"{tmp_path}@1"), 2)
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_checkpoints(tmp_path: Path, holdfast_cli: Command) -> None:
    with holdfast.CheckpointManager(tmp_path / "run") as manager:
        manager.acquire()
    done = holdfast_cli("doctor", tmp_path / "run")
    assert done.status == 0
    assert "checkpoints" not in findings(holdfast_cli, tmp_path / "run")


# -- the file system ---------------------------------------------------------------


def test_the_file_system_is_tried_and_left_as_it_was(run: Path) -> None:
    before = sorted(run.rglob("*"))
    found = abilities.probe(LocalStore(run))
    assert found is not None
    assert found.safe
    assert found.hard_links
    assert found.sync_folders
    assert found.free_bytes > 0
    assert sorted(run.rglob("*")) == before
    assert abilities.probe(MemoryStore("memory://x")) is None


@pytest.mark.parametrize(
    ("broken", "field"),
    [
        ("link", "hard_links"),
        ("rename_new", "rename_new"),
        ("sync", "sync_folders"),
        ("allocate", "preallocation"),
    ],
)
def test_what_a_file_system_cannot_do(
    run: Path, broken: str, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(abilities.OsFileSystem, broken, refuse)
    found = abilities.probe(LocalStore(run))
    assert found is not None
    assert getattr(found, field) is False
    assert found.safe is (broken != "sync")


def test_a_place_that_cannot_be_written(
    run: Path, holdfast_cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(abilities.tempfile, "mkdtemp", refuse)
    row = findings(holdfast_cli, run)["file system"]
    assert row["state"] == "note"
    assert row["what"].endswith("not writable here: Read-only file system")
    monkeypatch.undo()
    unfit = Abilities(True, "", "", 0, False, False, True, False)
    monkeypatch.setattr(doctor, "probe", lambda store: unfit)
    row = findings(holdfast_cli, run)["file system"]
    assert row["what"] == (
        "unknown kind, 0 B free; sync of folders; "
        "without hard links, renaming without replacing, preallocation"
    )
    assert "not be written" in row["do"]


# -- the page ------------------------------------------------------------------------


def test_a_page_escapes_and_fits() -> None:
    health = Health(
        (
            Finding("log", "damage", HOSTILE, HOSTILE),
            Finding("checkpoint", "damage", "word " * 60, "holdfast rm " + "x" * 100),
        )
    )
    page = health_text(health.findings, 80)
    assert all(line.isprintable() for line in page.split("\n"))
    assert all(cells(line) <= 80 for line in page.split("\n"))
    assert "".join(page.split()).count("x") >= 100, "a command is not cut"
