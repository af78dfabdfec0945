"""The limit of a copy's speed, in time that only the test moves."""

from __future__ import annotations

import threading

import pytest

from holdfast.errors import CopyStopped
from holdfast.repo.pace import Pace


class Time:
    """Passes when somebody waits."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    def wait(self, condition: threading.Condition, seconds: float) -> None:
        self.now_s += seconds


def test_bytes_take_their_time_and_the_first_go_at_once() -> None:
    time = Time()
    pace = Pace(1000, clock=time, wait=time.wait)
    pace.take(500)
    assert time.now_s == 100.0
    pace.take(2000)
    assert time.now_s == 100.5
    pace.take(1)
    assert time.now_s == 102.5


def test_what_was_not_used_is_not_saved_up() -> None:
    time = Time()
    pace = Pace(1000, clock=time, wait=time.wait)
    pace.take(1000)
    time.now_s += 3600
    pace.take(1000)
    pace.take(1000)
    assert time.now_s == 3701.0


def test_no_limit_and_another_limit() -> None:
    time = Time()
    pace = Pace(clock=time, wait=time.wait)
    for _ in range(10):
        pace.take(1 << 40)
    assert time.now_s == 100.0
    pace.limit(10)
    pace.take(100)
    pace.take(100)
    assert time.now_s == 110.0
    pace.limit(None)
    pace.take(100)
    assert time.now_s == 110.0


def test_who_waits_goes_on_when_the_limit_is_lifted_and_stops_when_told() -> None:
    for end, error in ((lambda pace: pace.limit(None), None), (Pace.stop, CopyStopped)):
        pace = Pace(1)
        pace.take(10**9)  # the next would wait for thirty years
        outcome: list[BaseException | None] = []

        def take(pace: Pace = pace, outcome: list[BaseException | None] = outcome) -> None:
            try:
                pace.take(1)
                outcome.append(None)
            except CopyStopped as stopped:
                outcome.append(stopped)

        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        end(pace)
        thread.join(30)
        assert [type(found) for found in outcome] == [type(None) if error is None else error]


def test_stopped_is_for_ever() -> None:
    pace = Pace()
    pace.stop()
    with pytest.raises(CopyStopped):
        pace.take(1)
