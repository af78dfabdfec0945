"""`holdfast stats` on a real run; what it prints of fixed ones is in the snapshots."""

from __future__ import annotations

import re
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

import holdfast
from holdfast.cli.stats import goodput_text, starts_text
from holdfast.manager.goodput import goodput
from holdfast.manager.history import EndEvent, Event, StartEvent
from tests.cli.conftest import Command, failed
from tests.cli.world import ROOT


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
    blank = rows.index("")
    assert rows[blank - 1].startswith("1 restore: ")
    assert "no start was recorded" in " ".join(rows[blank:])
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


def test_stats_say_what_compressing_has_come_to(tmp_path: Path, holdfast_cli: Command) -> None:
    def lines(compress: str | None) -> list[str]:
        with holdfast.CheckpointManager(tmp_path / "run", compress=compress) as manager:
            manager.save(1, {"x": np.zeros(10_000_000, np.uint8)}, block=True)
        return holdfast_cli("stats", tmp_path / "run").out.splitlines()

    assert not [line for line in lines(None) if "compress" in line]
    shutil.rmtree(tmp_path / "run")
    [line] = [line for line in lines("zstd") if "compress" in line]
    assert line.startswith("Before it was compressed it was 10.0 MB; compressing took ")


def test_show_tells_the_size_of_the_state_not_of_the_frames(
    tmp_path: Path, holdfast_cli: Command
) -> None:
    x = np.random.default_rng(0).normal(size=2_500_000).astype(np.float32)
    with holdfast.CheckpointManager(tmp_path / "run", compress="zstd") as manager:
        manager.save(1, {"x": x}, block=True)
        manager.save(2, {"x": x, "y": x + 1}, block=True)
    first = holdfast_cli("show", f"{tmp_path}/run@1").out
    assert "10.0 MB, all of it written for this checkpoint, compressed to 8.4" in first
    second = holdfast_cli("show", f"{tmp_path}/run@2").out
    assert "(compressed; 10.0 MB before), the rest shared with others" in " ".join(second.split())
    for out in (first, second):
        [row] = [line for line in out.splitlines() if line.startswith("x ")]
        assert row.split()[1:] == ["1", "10.0", "MB", "F32"]
    leaves = holdfast_cli("show", f"{tmp_path}/run@1", "--leaves", "--json").json["leaves"]
    assert [leaf["nbytes"] for leaf in leaves] == [10_000_000]


def test_stats_of_a_run_that_an_older_holdfast_wrote(holdfast_cli: Command) -> None:
    for store in sorted((ROOT / "tests" / "golden").glob("v*")):
        out = " ".join(holdfast_cli("stats", store).out.split())
        assert "an older Holdfast" in out.replace("An", "an")
        value = holdfast_cli("stats", store, "--json").json
        assert (value["goodput"], value["starts"]) == (None, [])


def test_stats_of_a_run_that_still_goes_on(tmp_path: Path, holdfast_cli: Command) -> None:
    """Its end is now; and one start is shown as well as many."""
    with holdfast.Run(tmp_path / "run", every=2, quiet=True) as run:
        for step in run.range(10):
            if step == 5:
                out = holdfast_cli("stats", tmp_path / "run").out
                value = holdfast_cli("stats", tmp_path / "run", "--json").json
    assert "still running" in out
    assert "1 start." in out
    assert [one["end"] for one in value["starts"]] == ["running"]
    assert value["goodput"]["failures"] == {}
    last = holdfast_cli("stats", tmp_path / "run", "--json").json
    assert [one["end"] for one in last["starts"]] == ["finished"]
    assert last["goodput"]["wall_s"] >= value["goodput"]["wall_s"]
    assert last["starts"][0]["to_step"] == 10


def test_the_example_of_the_page_is_what_is_printed() -> None:
    """docs/goodput.md: the table, for the events of the code below it."""
    page = (ROOT / "docs" / "goodput.md").read_text()
    [table] = re.findall(r"^```text\n(.*?)\n```$", page, re.DOTALL | re.MULTILINE)
    [code] = re.findall(r"^```python\n(from .*?)^found", page, re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    exec(code, names)
    at = datetime(2026, 11, 27, 10, 2, tzinfo=UTC).timestamp()
    events = [
        replace(
            event,
            time_s=event.time_s + at,
            **({"began_s": event.began_s + at} if isinstance(event, StartEvent) else {}),
        )
        for event in names["events"]
    ]
    found = goodput(events)
    assert found is not None
    assert starts_text(found.attempts, 20, 80) + "\n" + goodput_text(found, 80) == table


def test_no_line_of_goodput_is_wider_than_the_terminal() -> None:
    events: list[Event] = []
    for epoch in range(1, 30):
        at = epoch * 1e6
        events += [
            StartEvent(epoch=epoch, began_s=at, time_s=at + 1e5, step=epoch * 10**8, pid=1),
            EndEvent(epoch=epoch, time_s=at + 9e5, why="x" * 30 + "\x1b", step=epoch * 10**8 + 5),
        ]
    found = goodput(events)
    assert found is not None
    for width in (40, 60, 200):
        text = starts_text(found.attempts, 20, width) + "\n" + goodput_text(found, width)
        assert max(map(len, text.split("\n"))) <= width
        assert "\x1b" not in text
        assert text.count("\n") < 40
