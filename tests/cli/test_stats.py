"""`holdfast stats` on a real run; what it prints of fixed ones is in the snapshots."""

from __future__ import annotations

from pathlib import Path

import holdfast
from tests.cli.conftest import Command, failed


def test_stats_of_real_saves(run: Path, holdfast_cli: Command) -> None:
    """What the table and JSON say is what was measured, removed checkpoints' too."""
    holdfast_cli("rm", f"{run}@300", "--force")
    with holdfast.CheckpointManager(run) as manager:
        events = manager.events()
        manager.acquire()
        manager.restore()
    title, *rows = holdfast_cli("stats", run, "-n", "3").out.splitlines()
    assert title.split() == ["STEP", "WAITED", "TOOK", "STATE", "WRITTEN", "COPIED", "MEMORY"]
    assert [row.split()[0] for row in rows[:3]] == ["400", "300", "200"]
    assert rows[3:5] == ["… and 1 older (-n 4 shows them)", "4 saves."]
    assert rows[-1].startswith("1 restore: ")
    value = holdfast_cli("stats", run, "--json").json
    assert [save["step"] for save in value["saves"]] == [400, 300, 200, 100]
    assert [restore["step"] for restore in value["restores"]] == [400]
    for save, event in zip(value["saves"], reversed(events), strict=True):
        names = list(event.__struct_fields__)
        assert [save[name] for name in names] == [getattr(event, name) for name in names]
        assert save["nbytes"] > save["written_nbytes"] or save["step"] == 100
        assert 0 < save["stall_s"] <= save["total_s"]


def test_stats_refuses_no_saves_at_all(run: Path, holdfast_cli: Command) -> None:
    assert "Invalid value for '-n'" in failed(holdfast_cli("stats", run, "-n", "0"), 2)
