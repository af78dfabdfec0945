"""`Run(every="auto")`: the loop saves at the interval that its saves ask for."""

from __future__ import annotations

import contextlib
import random
from types import SimpleNamespace
from typing import Any

import pytest

import holdfast
from holdfast.core.interval import AutoInterval
from holdfast.core.retention import parse_keep
from holdfast.core.schedule import parse_every
from holdfast.manager.history import RestoreEvent, SaveEvent
from holdfast.run.stalls import Stalls, stalls_of
from holdfast.run.triggers import Triggers
from tests.support.jobs import fresh_address

DAY = 86400.0


def event(stall_s: float = 0.2, total_s: float = 2.0, **other: Any) -> SaveEvent:
    return SaveEvent(time_s=0.0, step=1, capture_s=stall_s, total_s=total_s, **other)


def train(address: str, steps: int, **options: Any) -> None:
    """Steps of five seconds, on a clock of their own; each save is durable before the next."""
    now = SimpleNamespace(s=0.0)
    run = holdfast.Run(address, every="auto", keep=None, clock=lambda: now.s, **options)
    with run:
        values = [0]
        run.track(values=values)
        for _ in run.range(steps):
            now.s += 5.0
            values[0] += 1
            run.manager.wait()


def test_a_run_saves_by_itself_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    address = fresh_address()
    train(address, 200, mtbf="1min", overhead="50%")
    lines = [line for line in capsys.readouterr().err.splitlines() if "saving every" in line]
    assert lines[0].startswith(f"{address}: saving every ")
    assert "one failure in 1 min as given" in lines[0]
    with holdfast.CheckpointManager(address) as manager:
        infos = manager.checkpoints()
    assert infos[0].step == 6, "the first save comes after 30 s"
    assert {info.note for info in infos[:-1]} == {"every=auto"}
    assert len(infos) > 4
    # The next process knows what a save costs before its first one.
    train(address, 200, mtbf="1min", overhead="50%")
    train(address, 201, mtbf="1min", overhead="50%")
    assert capsys.readouterr().err.count("saving every") == 1, "a finished run has none"


def test_a_run_learns_from_its_own_failures(capsys: pytest.CaptureFixture[str]) -> None:
    address = fresh_address()
    found: list[str] = []
    for attempt in range(3):
        now = SimpleNamespace(s=0.0)
        run = holdfast.Run(address, every="auto", clock=lambda now=now: now.s)
        with contextlib.suppress(ZeroDivisionError), run:
            for step in run.range(100):
                now.s += 5.0
                run.manager.wait()
                if step == 20 + 20 * attempt:
                    raise ZeroDivisionError
        said = capsys.readouterr().err.partition("one failure in ")[2]  # the first of them
        found.append(said.partition(";")[0])
    # Half a day of the prior, and half a failure, with none, one and two more.
    assert found == ["24 h until seen otherwise", "8 h as seen", "4 h 48 min as seen"]


def triggers(auto: AutoInterval, said: list[str], every: str = "auto") -> Triggers:
    made = Triggers(parse_every(every), parse_keep(None), lambda: (), auto, said.append)
    made.start(None, 0.0)
    return made


def test_the_history_tells_what_a_save_costs() -> None:
    said: list[str] = []
    auto = AutoInterval(6 * 3600)
    made = triggers(auto, said)
    restore = RestoreEvent(time_s=0.0, step=1, id="a", total_s=50.0, nbytes=1)
    odd = [event(90.0, blocked=True), event(80.0, error="disk full"), restore]
    made.learn(lambda: [*odd, event(0.2), event(0.2)])
    assert auto.seconds == pytest.approx(92.8, abs=0.1)
    assert "a save costs 200 ms" in said[0]
    assert made.due(1, 92.0, epoch_end=False, last=False) == ""
    assert made.due(2, 93.0, epoch_end=False, last=False) == "every=auto"


def test_a_history_that_cannot_be_read_is_none() -> None:
    def unreadable() -> list[Any]:
        raise holdfast.errors.StoreUnavailable("down")

    auto = AutoInterval()
    triggers(auto, []).learn(unreadable)
    assert auto.seconds == 30.0


def test_a_history_is_read_only_where_it_matters() -> None:
    def never() -> list[Any]:
        raise AssertionError

    triggers(AutoInterval(), [], every="10min").learn(never)


def test_what_steps_lose_behind_a_save_is_a_part_of_its_cost() -> None:
    stalls = Stalls()
    now = 0.0

    def steps(*took: float, regular: bool = True) -> list[tuple[float, float]]:
        nonlocal now
        found = []
        for took_s in took:
            now += took_s
            found += stalls.boundary(now, regular=regular)
        return found

    def save() -> None:
        nonlocal now
        now += 0.2
        stalls.begun(now)

    steps(*[1.0] * 20)
    save()
    steps(1.5, 1.25)  # three quarters of a second lost, a quarter of it in the barrier
    stalls.durable(event(0.2, barrier_s=0.25))
    ((cost_s, takes_s),) = steps(1.0)
    assert cost_s == pytest.approx(0.2 + 0.75)
    assert takes_s == 2.0
    # An evaluation behind a save says nothing about it: what was known stays.
    save()
    steps(60.0, regular=False)
    stalls.durable(event(0.2, barrier_s=0.25))
    ((cost_s, _),) = steps(1.0)
    assert cost_s == pytest.approx(0.45 + 0.5)
    # Saves that were waited for say nothing about others.
    stalls.durable(event(30.0, blocked=True))
    stalls.durable(None)
    assert steps(1.0) == []


def test_steps_that_are_by_chance_faster_behind_a_save_do_not_make_it_cheap() -> None:
    stalls = Stalls()
    for step in range(20):
        stalls.boundary(float(step), regular=True)
    stalls.begun(20.0)
    stalls.boundary(20.5, regular=True)
    stalls.durable(event(0.2))
    assert stalls.boundary(21.0, regular=True) == [(0.2, 2.0)]


def test_steps_that_differ_by_more_than_a_save_costs_tell_nothing() -> None:
    rng = random.Random(1)
    stalls, now = Stalls(), 0.0
    costs: list[float] = []
    for step in range(2000):
        now += max(0.1, rng.gauss(2.0, 1.0))
        costs += [cost_s for cost_s, _ in stalls.boundary(now, regular=True)]
        if step % 20 == 10:
            stalls.begun(now)
        if step % 20 == 13:
            stalls.durable(event(0.2))
    assert len(costs) > 90
    assert sum(costs) / len(costs) < 0.5, "one step's deviation alone is a second"
    assert sorted(costs)[len(costs) // 2] == 0.2


def test_costs_in_a_history() -> None:
    events = [event(0.2, waited_s=0.5), event(9.0, blocked=True), event(9.0, error="no space")]
    assert list(stalls_of(events)) == [(0.7, 1.5)]
