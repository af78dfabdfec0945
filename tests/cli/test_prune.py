"""`holdfast prune` on a real run: what goes, what stays, and why."""

from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import Command, failed, flip, newest_pack, same_error_as_json


def test_prune_dry_run_changes_nothing(run: Path, holdfast_cli: Command) -> None:
    before = sorted(p for p in run.rglob("*"))
    done = holdfast_cli("prune", run, "--keep", "last=1", "--dry-run")
    assert done.status == 0
    title, *rows, total = done.out.splitlines()
    assert title.split() == ["ACTION", "STEP", "SAVED", "SIZE", "ID", "WHY"]
    assert [row.split()[:2] for row in rows] == [
        ["keep", "400"],
        ["remove", "300"],
        ["keep", "200"],
        ["keep", "100"],
    ]
    assert rows[0].endswith("newest, last=1")
    assert rows[1].endswith("no rule keeps it")
    assert rows[2].endswith("tag gold")
    assert rows[3].endswith("pinned")
    assert total.startswith("Would remove 1 checkpoint, keep 3, free ")
    assert sorted(p for p in run.rglob("*")) == before


def test_prune_leaves_what_is_damaged_and_says_so(run: Path, holdfast_cli: Command) -> None:
    newest = newest_pack(run)
    flip(newest, newest.stat().st_size - 1)
    done = holdfast_cli("prune", run, "--keep", "last=1", "--dry-run")
    assert done.status == 0
    assert f"Damage: checkpoint {run}@400 is damaged" in done.err
    rows = done.out.splitlines()
    assert rows[1].endswith("damaged: no rule removes it")
    assert rows[2].endswith("newest, last=1")
    for pack in (run / "packs").iterdir():
        flip(pack, pack.stat().st_size // 2)
    assert "so none was removed" in failed(holdfast_cli("prune", run, "--keep", "last=1"), 4)
    assert len(holdfast_cli("ls", run, "--json").json["checkpoints"]) == 4


def test_prune(run: Path, holdfast_cli: Command) -> None:
    done = holdfast_cli("prune", run, "--keep", "last=1")
    assert done.status == 0
    title, row, total = done.out.splitlines()
    assert title.split() == ["STEP", "SAVED", "SIZE", "ID", "WHY"]
    assert row.split()[0] == "300"
    assert total.startswith("Removed 1 checkpoint, kept 3, freed ")
    left = holdfast_cli("ls", run, "--json").json["checkpoints"]
    assert [c["step"] for c in left] == [400, 200, 100]
    assert holdfast_cli("verify", run).status == 0
    again = holdfast_cli("prune", run, "--keep", "last=1")
    assert again.out.startswith("Nothing to remove: 3 checkpoints")


def test_prune_json(run: Path, holdfast_cli: Command) -> None:
    words = ["prune", run, "--keep", "last=1 best=1:val_loss", "--json"]
    value = holdfast_cli(*words, "--dry-run").json
    assert value["dry_run"] is True
    assert [c["step"] for c in value["removed"]] == [300]
    assert value["removed"][0]["why"] == ["no rule keeps it"]
    assert value["kept"][1]["why"] == ["tag gold", "best=1:val_loss (0.231)"]
    done = holdfast_cli(*words).json
    assert done == {**value, "dry_run": False}
    assert done["freed_bytes"] > 0


def test_prune_needs_rules(run: Path, holdfast_cli: Command) -> None:
    assert "Missing option '--keep'" in failed(holdfast_cli("prune", run), 2)
    assert "has no rule" in failed(holdfast_cli("prune", run, "--keep", " "), 2)
    error = same_error_as_json(holdfast_cli, "prune", run, "--keep", "last=three")
    assert "cannot read 'last=three'" in error["error"]
    assert "last=N best=K:metric" in error["hint"]
    assert "names a checkpoint" in failed(
        holdfast_cli("prune", f"{run}@100", "--keep", "last=1"), 2
    )
