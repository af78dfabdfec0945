"""What a run tells its history, and what that comes to after kills."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.errors import HoldfastError, StoreFull
from holdfast.manager.goodput import Goodput
from holdfast.manager.history import (
    BeatEvent,
    EndEvent,
    Event,
    FallbackEvent,
    NoticeEvent,
    StartEvent,
    append_outside,
)
from holdfast.notices.notice import Notice
from holdfast.repo import keys
from holdfast.run.events import RunEvents
from holdfast.stores.faulty import Effect, Fault, FaultPlan, FaultyStore
from holdfast.stores.memory import MemoryStore
from tests.cli.damage import flip, newest_pack


def told(run: Path, kind: type[Any]) -> list[Any]:
    with holdfast.CheckpointManager(run) as manager:
        return [event for event in manager.events() if isinstance(event, kind)]


def train(run: Path, steps: int, *, fails_at: int = -1, error: BaseException | None = None) -> None:
    with holdfast.Run(run, every=5, quiet=True) as job:
        box = job.box(total=0)
        job.track(weights=(weights := np.zeros(5000)))
        for step in job.range(steps):
            weights += step
            if step == fails_at and error is not None:
                raise error
            box.total += step


@pytest.mark.parametrize(
    ("error", "why", "code"),
    [
        (ValueError("x"), "error", None),
        (KeyboardInterrupt(), "interrupted", None),
        (SystemExit(0), "closed", 0),
        (SystemExit("no more data"), "error", 1),
    ],
)
def test_how_it_ended(tmp_path: Path, error: BaseException, why: str, code: int | None) -> None:
    with pytest.raises(type(error)):
        train(tmp_path / "run", 20, fails_at=12, error=error)
    train(tmp_path / "run", 20)
    first, second = told(tmp_path / "run", EndEvent)
    assert (first.why, first.step, first.exit_code) == (why, 12, code)
    assert (second.why, second.step) == ("finished", 20)
    starts = told(tmp_path / "run", StartEvent)
    assert [start.step for start in starts] == [0, 10]
    assert [bool(start.id) for start in starts] == [False, True]
    assert starts[0].began_s <= starts[0].time_s <= first.time_s <= starts[1].began_s


def test_a_run_whose_loop_never_began_says_nothing(tmp_path: Path) -> None:
    train(tmp_path / "run", 5)
    train(tmp_path / "run", 5)
    with holdfast.Run(tmp_path / "run", quiet=True):
        pass
    assert len(told(tmp_path / "run", StartEvent)) == 1
    assert len(told(tmp_path / "run", EndEvent)) == 1


def test_a_fallback_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x"):
        train(tmp_path / "run", 20, fails_at=13, error=ValueError("x"))
    flip(newest_pack(tmp_path / "run"), 4096 + 17)
    train(tmp_path / "run", 20)
    [fallback] = told(tmp_path / "run", FallbackEvent)
    assert (fallback.step, fallback.skipped) == (5, 1)


def test_notices_are_told(tmp_path: Path) -> None:
    """Also those after which the run goes on."""
    with holdfast.Run(tmp_path / "run", every=None, quiet=True) as job:
        for step in job.range(5):
            if step == 2:
                job._session.stopping.hear(Notice("AWS spot", "rebalance", stops=False))
    [notice] = told(tmp_path / "run", NoticeEvent)
    assert (notice.source, notice.text) == ("AWS spot", "rebalance")
    with (
        pytest.raises(SystemExit),
        holdfast.Run(tmp_path / "other", every=None, quiet=True) as job,
    ):
        for step in job.range(5):
            if step == 2:
                job._session.stopping.hear(Notice("Slurm", "time", time.time() + 900))
    [notice] = told(tmp_path / "other", NoticeEvent)
    [end] = told(tmp_path / "other", EndEvent)
    assert (notice.source, end.why, end.text, end.exit_code) == ("Slurm", "preempted", "Slurm", 75)
    assert notice.deadline_s - notice.time_s == pytest.approx(900, abs=60)


def test_a_store_that_takes_no_events_stops_no_training() -> None:
    fault = Fault(Effect.FAIL, operation="append", prefix=keys.EVENTS, times=None, error=StoreFull)
    store = FaultyStore(MemoryStore(), FaultPlan((fault,)))
    with holdfast.Run(store.address, store=store, every=5, quiet=True) as job:
        for _ in job.range(20):
            pass
    with holdfast.CheckpointManager(store.address, store=store) as manager:
        assert manager.finished
        assert manager.events() == []
        assert manager.goodput() is None


# -- beats ----------------------------------------------------------------------


def beating(address: str) -> tuple[RunEvents, list[Event], SimpleNamespace]:
    events: list[Event] = []
    now = SimpleNamespace(s=0.0)
    clock = lambda: now.s  # noqa: E731
    run = RunEvents(events.append, address, wall=clock, clock=clock, began_s=-5.0)
    return run, events, now


def test_beats_are_sparse() -> None:
    run, events, now = beating("runs/x")
    for step in range(1000):
        now.s = step * 0.1
        run.going(step, None)
    start, *beats = events
    assert isinstance(start, StartEvent)
    assert (start.time_s, start.began_s, start.beat_s) == (0, -5, 30)
    assert [event.time_s for event in beats] == pytest.approx([30, 60, 90])
    assert all(isinstance(event, BeatEvent) for event in beats)


def test_in_a_bucket_there_are_none() -> None:
    run, events, now = beating("s3://bucket/run")
    for step in range(100):
        now.s = step * 10.0
        run.going(step, None)
    [start] = events
    assert isinstance(start, StartEvent)
    assert start.beat_s == 0


# -- a program that is killed ----------------------------------------------------

PROGRAM = """
import sys, time
import holdfast
with holdfast.Run(sys.argv[1], every=20, quiet=True) as run:
    box = run.box(total=0)
    for step in run.range(80):
        begun_s = time.time()
        time.sleep(0.02)
        box.total += step
        print(step, begun_s, time.time(), flush=True)
"""


class Process:
    """One attempt, with what the program itself said of its steps."""

    def __init__(self, run: Path) -> None:
        self.began_s = time.time()
        command = [sys.executable, "-c", PROGRAM, str(run)]
        self.popen = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.lines = self._lines()
        self.begun: dict[int, float] = {}
        self.steps: dict[int, float] = {}

    def _lines(self) -> Iterator[int]:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            step, begun_s, now_s = line.split()
            self.begun[int(step)] = float(begun_s)
            self.steps[int(step)] = float(now_s)
            yield int(step)

    def until(self, step: int) -> None:
        for done in self.lines:
            if done >= step:
                return

    def end(self, number: int = 0) -> int:
        if number:
            self.popen.send_signal(number)
        for _ in self.lines:
            pass
        status = self.popen.wait(120)
        assert self.popen.stdout is not None
        self.popen.stdout.close()
        self.ended_s = time.time()
        return status


def saved(run: Path, step: int) -> None:
    """Return once a checkpoint of `step` or later is committed."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            with holdfast.CheckpointManager(run) as manager:
                newest = manager.latest()
            if newest is not None and newest.step >= step:
                return
        except HoldfastError:
            pass
        time.sleep(0.02)
    raise AssertionError(f"no checkpoint of step {step}")


def goodput_of(run: Path) -> Goodput:
    with holdfast.CheckpointManager(run) as manager:
        found = manager.goodput()
    assert found is not None
    return found


def test_stats_of_a_program_that_was_killed_twice_and_preempted_once(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = Process(run)
    first.until(30)
    saved(run, 20)
    assert first.end(signal.SIGKILL) == -signal.SIGKILL
    killed = EndEvent(time_s=first.ended_s, why="killed", signal=9, pid=first.popen.pid)
    assert append_outside(run, [killed])

    second = Process(run)
    second.until(45)
    saved(run, 40)
    assert second.end(signal.SIGKILL) == -signal.SIGKILL  # and nobody says so

    third = Process(run)
    third.until(60)
    assert third.end(signal.SIGTERM) == 75
    fourth = Process(run)
    assert fourth.end() == 0

    found = goodput_of(run)
    attempts = [first, second, third, fourth]
    assert [one.end for one in found.attempts] == ["killed", "crashed", "preempted", "finished"]
    assert [one.pid for one in found.attempts] == [one.popen.pid for one in attempts]
    assert [one.from_step for one in found.attempts] == [min(one.steps) for one in attempts]
    assert found.attempts[3].to_step == 80
    assert found.failures == {"killed": 1, "crashed": 1, "preempted": 1}
    [notice] = told(run, NoticeEvent)
    assert notice.source == found.attempts[2].text == "SIGTERM"

    # What was lost in the first: from behind the save that the second went on from to its end.
    kept = min(second.steps)
    saved_s = first.ended_s - found.attempts[0].replay_s  # between two bodies
    assert first.steps[kept - 1] - 0.01 <= saved_s <= first.begun[kept] + 0.01
    # In the second, what came behind its last save is unknown: so are those steps.
    assert found.attempts[1].replay_s == 0
    kept = min(third.steps)
    least, most = third.began_s - second.begun[kept], third.begun[kept] - second.steps[kept - 1]
    assert least - 0.1 <= found.attempts[1].unknown_s <= most + 0.1  # starts are in ticks
    # Nothing was lost when there was a notice.
    assert (found.attempts[2].replay_s, found.attempts[2].unknown_s) == (0, 0)

    wall = fourth.ended_s - first.began_s
    assert found.wall_s == pytest.approx(wall, abs=1.0)
    least = most = 0.0
    for one, after in zip(attempts, [*attempts[1:], None], strict=True):
        last = (min(after.steps) if after else 80) - 1
        least += one.steps[last] - one.steps[min(one.steps)]
        most += one.begun.get(last + 1, one.steps[last]) - one.steps[min(one.steps)]
    assert least - 1.0 <= found.productive_s + found.saving_s <= most + 1.0
    starting = sum(one.steps[min(one.steps)] - one.began_s for one in attempts)
    assert found.startup_s == pytest.approx(starting, abs=1.0)
