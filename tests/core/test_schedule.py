"""`every=`: when a save is due."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.schedule import Schedule, parse_every
from holdfast.errors import BadPolicy


@pytest.mark.parametrize(
    ("value", "schedule"),
    [
        (500, Schedule(steps=500)),
        ("500", Schedule(steps=500)),
        ("500 steps", Schedule(steps=500)),
        ("1 step", Schedule(steps=1)),
        ("500steps", Schedule(steps=500)),
        ("10min", Schedule(seconds=600)),
        ("90s", Schedule(seconds=90)),
        ("2h", Schedule(seconds=7200)),
        ("1d", Schedule(seconds=86400)),
        ("epoch", Schedule(epoch=True)),
        ("10min epoch", Schedule(seconds=600, epoch=True)),
        ("epoch 500 steps 10min", Schedule(500, 600, True)),
        ("auto", Schedule(auto=True)),
        ("auto epoch", Schedule(epoch=True, auto=True)),
        ("500 auto", Schedule(steps=500, auto=True)),
        (None, Schedule()),
    ],
)
def test_what_people_write(value: int | str | None, schedule: Schedule) -> None:
    assert parse_every(value) == schedule


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (0, "above 0"),
        (-5, "above 0"),
        ("0", "above 0"),
        (True, "neither a number of steps nor text"),
        (1.5, "neither a number of steps nor text"),
        ("", "no rule"),
        ("steps", "'steps'"),
        ("10m", "write 'min'"),
        ("ten minutes", "'ten'"),
        ("500 600", "two rules"),
        ("10min 5min", "two rules"),
        ("epoch epoch", "two rules"),
        ("auto auto", "two rules"),
        ("10 min", "two rules|'min'"),
        ("epoch,10min", "'epoch,10min'"),
    ],
)
def test_what_is_wrong_is_shown_with_the_grammar(value: Any, says: str) -> None:
    with pytest.raises(BadPolicy, match=says) as caught:
        parse_every(value)
    assert '"10min"' in caught.value.hint


@given(
    st.builds(
        Schedule,
        steps=st.none() | st.integers(1, 10**6),
        seconds=st.none() | st.integers(1, 10**6).map(float),
        epoch=st.booleans(),
        auto=st.booleans(),
    )
)
def test_str_reads_back(schedule: Schedule) -> None:
    assert parse_every(str(schedule) or None) == schedule


def test_steps_count_from_zero_not_from_the_last_save() -> None:
    every = parse_every(500)
    assert every.due(499, 0, None, 0) is None
    assert every.due(500, 0, None, 0) == "every=500"
    assert every.due(501, 0, 500, 0) is None
    assert every.due(1000, 0, 730, 0) == "every=500"
    # Steps that are completed several at a time still pass the multiple.
    assert every.due(1003, 0, 998, 0) == "every=500"


@given(st.integers(1, 20), st.integers(1, 100), st.integers(0, 100))
def test_an_interrupted_run_saves_at_the_same_steps(every: int, total: int, killed: int) -> None:
    def saves(steps: range, last: int | None) -> list[int]:
        schedule = parse_every(every)
        return [last := step for step in steps if schedule.due(step, 0, last, 0)]

    whole = saves(range(1, total + 1), None)
    before = [step for step in whole if step <= killed]
    resumed_at = before[-1] if before else 0
    assert before + saves(range(resumed_at + 1, total + 1), resumed_at or None) == whole


def test_time_counts_from_the_last_save() -> None:
    every = parse_every("10min")
    assert every.due(3, 599, None, 0) is None
    assert every.due(3, 600, None, 0) == "every=10min"
    assert every.due(3, 1100, 2, 600) is None
    assert every.due(3, 100, 2, 600) is None, "the clock was set back"
    assert every.due(2, 5000, 2, 600) is None, "no step since the last save"


def test_epoch_is_due_after_the_tail_even_at_a_step_that_was_saved() -> None:
    every = parse_every("epoch 100")
    assert every.due(100, 0, 0, 0) == "every=100"
    assert every.due(100, 0, 100, 0, epoch_end=True) == "every=epoch"
    assert every.due(150, 0, 100, 0) is None
    assert parse_every(100).due(150, 0, 100, 0, epoch_end=True) is None


def test_none_is_never_due() -> None:
    assert parse_every(None).due(10**9, 1e9, None, 0, epoch_end=True) is None


@given(
    interval_s=st.floats(0.01, 1e6),
    boundaries=st.lists(st.floats(0.001, 1e5), min_size=1, max_size=50),
)
def test_auto_is_as_timed_with_the_interval_that_it_stands_for(
    interval_s: float, boundaries: list[float]
) -> None:
    timed, auto = Schedule(seconds=interval_s), Schedule(auto=True)
    assert timed.timed
    assert auto.timed
    now_s = last_s = 0.0
    last = None
    for step, took_s in enumerate(boundaries, 1):
        now_s += took_s
        due = auto.due(step, now_s, last, last_s, auto_s=interval_s)
        assert bool(timed.due(step, now_s, last, last_s)) == bool(due)
        assert due in (None, "every=auto")
        if due:
            last, last_s = step, now_s
    assert auto.due(step + 1, now_s + 2e6, last, last_s) is None, "nothing is known yet"
