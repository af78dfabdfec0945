"""When processes are to die."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from holdfast.rehearse.script import first_cut, next_kill, save_interval, signals


@given(st.integers(1, 40), st.integers(0, 1000))
def test_two_and_more_kills_have_both_signals(count: int, seed: int) -> None:
    names = signals(count, random.Random(seed))
    assert len(names) == count
    assert set(names) == ({"SIGKILL", "SIGTERM"} if count > 1 else {"SIGKILL"})


@given(
    at=st.integers(0, 100),
    steps=st.integers(4, 200),
    left=st.integers(1, 10),
    seed=st.integers(0, 1000),
)
def test_a_kill_comes_after_the_next_save_and_before_the_end(
    at: int, steps: int, left: int, seed: int
) -> None:
    every = save_interval(steps)
    kill = next_kill(
        "SIGKILL",
        at=at,
        every=every,
        steps=steps,
        left=left,
        step_s=0.2,
        chance=random.Random(seed),
    )
    if kill is None:
        assert at + every >= steps
    else:
        assert at + every <= kill.step < steps
        assert 0 <= kill.after_s <= 0.3


@given(st.lists(st.integers(1, 50), min_size=1), st.integers(0, 100))
def test_the_killed_run_begins_at_an_early_checkpoint(steps: list[int], seed: int) -> None:
    at = first_cut(steps, random.Random(seed))
    assert at in steps
    assert sum(step < at for step in set(steps)) <= len(set(steps)) // 3
