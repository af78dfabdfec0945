"""`holdfast rm`: what goes, what is protected, and that it is all or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

import holdfast
from holdfast.cli.rm import removal_text
from holdfast.core.address import short_ids
from holdfast.core.retention import parse_keep
from holdfast.errors import CheckpointNotFound, CheckpointProtected, NoIntactCheckpoint
from holdfast.manager.listing import Listing
from holdfast.manager.removal import plan_removal
from tests.cli.conftest import (
    Command,
    failed,
    failed_loudly,
    flip,
    newest_pack,
    same_error_as_json,
    tidy,
)
from tests.core.policy_records import record


def steps(cli: Command, run: Path) -> list[int]:
    return [c["step"] for c in cli("ls", run, "--json").json["checkpoints"]]


def test_rm(run: Path, holdfast_cli: Command) -> None:
    before = sorted(run.rglob("*"))
    done = holdfast_cli("rm", f"{run}@300", "--dry-run")
    assert (done.status, done.err) == (0, "")
    title, row, total = done.out.splitlines()
    assert title.split() == ["ACTION", "STEP", "SAVED", "SIZE", "ID", "WHY"]
    assert tidy(row).split() == [
        "remove",
        "300",
        *row.split()[2:5],
        *row.split()[5:7],
        "<id>",
        "named",
    ]
    assert total.startswith("Would remove 1 checkpoint, free ")
    assert sorted(run.rglob("*")) == before
    done = holdfast_cli("rm", f"{run}@300")
    assert done.status == 0
    assert done.out.splitlines()[-1] == total.replace("Would remove", "Removed").replace(
        "free ", "freed "
    )
    assert steps(holdfast_cli, run) == [400, 200, 100]
    assert holdfast_cli("verify", run).status == 0
    assert "no checkpoint at step 300" in failed(holdfast_cli("rm", f"{run}@300"), 1)


def test_rm_json(run: Path, holdfast_cli: Command) -> None:
    value = holdfast_cli("rm", f"{run}@300", f"{run}@300", "--dry-run", "--json").json
    assert value["ok"] is True
    assert value["run"] == str(run)
    assert [(c["step"], c["why"]) for c in value["removed"]] == [(300, ["named"])]
    assert (value["kept"], value["dry_run"]) == ([], True)
    done = holdfast_cli("rm", f"{run}@300", "--json").json
    assert done == {**value, "dry_run": False}


@pytest.mark.parametrize(
    ("ref", "why"), [("@latest", "newest"), ("@100", "pinned"), ("@gold", "tag gold")]
)
def test_what_no_rule_removes_needs_force(
    run: Path, holdfast_cli: Command, ref: str, why: str
) -> None:
    words = ["rm", f"{run}{ref}", f"{run}@300"]
    error = failed(holdfast_cli(*words), 1)
    assert "since 1 of these 2 checkpoints is protected" in error
    assert why in error
    assert "--force" in error
    assert steps(holdfast_cli, run) == [400, 300, 200, 100], "none or all"
    rehearsed = holdfast_cli(*words, "--dry-run")
    assert failed(rehearsed, 1) == error
    assert "keep " in rehearsed.out
    value = same_error_as_json(holdfast_cli, *words, "--dry-run")
    assert [c["why"] for c in value["kept"]] == [[why]]
    done = holdfast_cli(*words, "--force")
    assert done.status == 0
    assert f"forced, {why}" in done.out
    assert len(steps(holdfast_cli, run)) == 2


def test_the_best_by_the_runs_own_rule(tmp_path: Path, holdfast_cli: Command) -> None:
    with holdfast.CheckpointManager(tmp_path / "run", keep="last=9 best=1:acc:max") as manager:
        for step, acc in ((1, 0.9), (2, 0.5), (3, 0.6)):
            manager.save(step, {"x": step}, metrics={"acc": acc}).result()
    assert "best=1:acc:max (0.9)" in failed(holdfast_cli("rm", f"{tmp_path}/run@1"), 1)
    assert holdfast_cli("rm", f"{tmp_path}/run@2").status == 0


def test_what_is_damaged_goes_and_the_newest_intact_stays(run: Path, holdfast_cli: Command) -> None:
    newest = newest_pack(run)
    flip(newest, newest.stat().st_size - 1)
    error = failed_loudly(holdfast_cli("rm", f"{run}@300"), 1)
    assert f"nothing was removed from {run}, since it is protected:\n  step 300: newest" in error
    done = holdfast_cli("rm", f"{run}@400")
    assert done.status == 0
    assert "named, damaged" in done.out
    assert f"Damage: checkpoint {run}@400 is damaged" in done.err


def test_where_nothing_is_intact(run: Path, holdfast_cli: Command) -> None:
    for pack in (run / "packs").iterdir():
        flip(pack, pack.stat().st_size - 1)
        flip(pack, pack.stat().st_size // 2)
    assert "so none was removed" in failed(holdfast_cli("rm", f"{run}@300"), 4)
    assert holdfast_cli("rm", f"{run}@300", "--force").status == 0


def test_a_forked_run_keeps_what_it_needs(run: Path, holdfast_cli: Command) -> None:
    with holdfast.CheckpointManager(run) as manager:
        manager.fork(300, run.parent / "child")
    error = failed(holdfast_cli("rm", f"{run}@300", "--force"), 1)
    assert "needed by fork:../child" in error
    assert "remove that run first" in error
    assert holdfast_cli("verify", run.parent / "child").status == 0


def test_rm_takes_checkpoints_of_one_run(run: Path, holdfast_cli: Command) -> None:
    error = same_error_as_json(holdfast_cli, "rm", run)
    assert "names a run; rm removes checkpoints" in error["error"]
    assert "not of one run" in failed(holdfast_cli("rm", f"{run}@100", f"{run}x@100"), 2)
    assert "Missing argument" in failed(holdfast_cli("rm"), 2)


def test_a_tag_that_comes_meanwhile_protects(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look and the commit: the transaction looks again."""
    with Listing(run) as listing, Listing(run) as other:
        real = listing._amend

        def amend(action, change):
            other.tag(300, "meanwhile")
            real(action, change)

        monkeypatch.setattr(listing, "_amend", amend)
        with pytest.raises(CheckpointProtected, match="tag meanwhile"):
            listing.remove([300])
        assert len(other.checkpoints()) == 4

        def amend_after_removal(action, change):
            other.remove([300], force=True)
            real(action, change)

        monkeypatch.setattr(listing, "_amend", amend_after_removal)
        with pytest.raises(CheckpointNotFound, match="removed meanwhile"):
            listing.remove([300], force=True)


def test_force_reads_nothing(run: Path) -> None:
    for pack in (run / "packs").iterdir():
        flip(pack, pack.stat().st_size // 2)
    with Listing(run) as listing:
        with pytest.raises(NoIntactCheckpoint):
            listing.remove([300])
        listing.remove(["latest"], force=True)
        assert [info.step for info in listing.checkpoints()] == [100, 200, 300]


def test_rm_beside_a_live_writer(tmp_path: Path, holdfast_cli: Command) -> None:
    """What it would have reused is gone, and its next save is whole all the same."""
    run = tmp_path / "run"
    with holdfast.CheckpointManager(run, keep=None) as manager:
        for step in (1, 2):
            manager.save(step, {"x": b"x" * 10_000, "step": step}).result()
        assert holdfast_cli("rm", f"{run}@1", f"{run}@2", "--force").status == 0
        manager.save(3, {"x": b"x" * 10_000, "step": 3}, block=True)
    assert holdfast_cli("verify", run).out.endswith("1 checkpoint verified, all intact.\n")


def test_rm_page() -> None:
    records = [
        record(1, time_s=940.0, packs={"a": 100, "shared": 50}),
        record(2, time_s=940.0, packs={"b": 70, "shared": 50}, tags=["gold"]),
        record(3, time_s=940.0, packs={"c": 10}),
    ]
    ids = short_ids([r.id for r in records])
    first, second = records[0].id, records[1].id
    plan = plan_removal(records, {first, second}, parse_keep("best=1:x").best)
    named = [d for d in plan if d.record.id in (first, second)]
    page = removal_text(named, ids, 100, dry_run=True, now_s=1000.0, width=80)
    assert page == (
        "ACTION  STEP  SAVED       SIZE  ID        WHY\n"
        f"keep       2  1 min ago  120 B  {second[:8]}  tag gold\n"
        f"remove     1  1 min ago  150 B  {first[:8]}  named"
    )
    plan = plan_removal(records, {first, second}, force=True)
    named = [d for d in plan if d.record.id in (first, second)]
    page = removal_text(named, ids, 220, dry_run=False, now_s=1000.0, width=80)
    assert page == (
        "STEP  SAVED       SIZE  ID        WHY\n"
        f"   2  1 min ago  120 B  {second[:8]}  forced, tag gold\n"
        f"   1  1 min ago  150 B  {first[:8]}  named\n"
        "Removed 2 checkpoints, freed 220 B."
    )
