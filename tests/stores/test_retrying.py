"""Asking again: how often, how long, and when no more."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.stores.retrying import Passing, Retry
from tests.support.hours import Hours


class Work:
    """Fails so many times; each try takes so many seconds."""

    def __init__(self, hours: Hours, failures: int, takes_s: float = 0) -> None:
        self.hours = hours
        self.failures = failures
        self.takes_s = takes_s
        self.tries = 0

    def __call__(self) -> str:
        self.tries += 1
        self.hours.now += self.takes_s
        if self.tries <= self.failures:
            raise Passing(f"try {self.tries}")
        return "done"


def test_what_succeeds_is_asked_once_and_nobody_sleeps() -> None:
    hours = Hours()
    work = Work(hours, 0)
    assert hours.retry().call(work) == "done"
    assert (work.tries, hours.sleeps) == (1, [])


def test_the_bounds_double_up_to_the_longest() -> None:
    hours = Hours()
    retry = hours.retry(first_s=0.5, longest_s=3.0, deadline_s=100)
    assert retry.call(Work(hours, 6)) == "done"
    assert hours.sleeps == [0.5, 1.0, 2.0, 3.0, 3.0, 3.0]


def test_nobody_sleeps_after_the_last_try() -> None:
    hours = Hours()
    work = Work(hours, 1 << 30)
    with pytest.raises(Passing, match="try 9"):
        hours.retry(first_s=1, longest_s=10, deadline_s=60).call(work)
    # 1 + 2 + 4 + 8 + 10 + 10 + 10 + 10 = 55; the next would end at 65.
    assert hours.sleeps == [1, 2, 4, 8, 10, 10, 10, 10]
    assert work.tries == 9


def test_without_time_it_is_tried_once() -> None:
    hours = Hours()
    work = Work(hours, 9)
    with pytest.raises(Passing, match="try 1"):
        hours.retry(deadline_s=0).call(work)
    assert work.tries == 1


def test_other_errors_pass_at_once() -> None:
    def work() -> None:
        raise KeyError("mine")

    hours = Hours()
    with pytest.raises(KeyError, match="mine"):
        hours.retry().call(work)
    assert hours.sleeps == []


@given(
    draws=st.lists(st.floats(0, 1, exclude_max=True), min_size=60, max_size=60),
    deadline=st.floats(0, 500),
    takes=st.floats(0, 50),
)
def test_no_try_begins_after_the_deadline(
    draws: list[float], deadline: float, takes: float
) -> None:
    hours = Hours()
    begun: list[float] = []

    def work() -> None:
        begun.append(hours.now - 1000)
        if len(begun) == 60:
            return
        hours.now += takes
        raise Passing("no")

    left = iter(draws)
    retry = Retry(
        deadline_s=deadline, clock=hours.clock, sleep=hours.sleep, draw=lambda: next(left)
    )
    try:
        retry.call(work)
    except Passing:
        pass
    assert all(at < deadline for at in begun[1:])
    for n, slept in enumerate(hours.sleeps):
        assert 0 <= slept < min(retry.first_s * 2**n, retry.longest_s)


def test_clients_that_were_turned_away_together_come_back_apart() -> None:
    """Half of the waits are in each half of what is allowed; no program's seed matters."""
    import random

    waits: list[float] = []
    for seed in range(200):
        random.seed(seed % 2)
        hours = Hours()
        Retry(clock=hours.clock, sleep=hours.sleep).call(Work(hours, 1))
        waits += hours.sleeps
    assert len(set(waits)) == len(waits) == 200
    assert 50 < sum(wait < Retry().first_s / 2 for wait in waits) < 150


def test_a_programs_random_numbers_are_left_alone() -> None:
    import random

    random.seed(3)
    expected = random.random()
    random.seed(3)
    hours = Hours()
    Retry(clock=hours.clock, sleep=hours.sleep).call(Work(hours, 3))
    assert random.random() == expected
