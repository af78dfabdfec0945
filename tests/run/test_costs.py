"""What saves have cost: of this process, and from a history that may not be there."""

from __future__ import annotations

import threading

import pytest

from holdfast.errors import StoreUnavailable
from holdfast.manager.history import RestoreEvent, SaveEvent
from holdfast.run import costs
from holdfast.run.costs import Costs, cost_of


def save(total_s: float, **more: object) -> SaveEvent:
    fields = {"time_s": 0.0, "step": 1, "blocked": True, "nbytes": 10, **more}
    return SaveEvent(total_s=total_s, **fields)  # pyright: ignore[reportArgumentType]


def test_the_wait_for_the_save_before_it_is_not_counted() -> None:
    assert cost_of(save(5.0, waited_s=3.0)).seconds == 2.0


def test_saves_of_this_process_and_of_those_before_count_and_failed_ones_do_not() -> None:
    read: list[int] = []

    def history() -> list[object]:
        read.append(1)
        restore = RestoreEvent(time_s=0.0, step=1, id="a", total_s=50.0, nbytes=10)
        return [save(4.0), save(60.0, error="full"), restore]

    known = Costs(history)
    assert known.p95_s() == 4.0
    known.add(save(6.0))
    known.add(save(70.0, error="full"))
    known.add(None)
    assert known.p95_s() == 6.0
    assert read == [1]


@pytest.mark.parametrize("error", [StoreUnavailable("down"), OSError("closed"), ValueError("odd")])
def test_without_a_history_the_saves_of_this_process_count(error: Exception) -> None:
    def history() -> list[object]:
        raise error

    known = Costs(history)
    assert known.p95_s() is None
    known.add(save(6.0))
    assert known.p95_s() == 6.0


def test_a_history_that_does_not_answer_is_waited_for_once(monkeypatch) -> None:
    monkeypatch.setattr(costs, "_READ_S", 0.01)
    answer = threading.Event()

    def history() -> list[object]:
        answer.wait(60)
        return [save(9.0)]

    known = Costs(history)
    known.add(save(6.0))
    assert known.p95_s() == 6.0
    monkeypatch.setattr(costs, "_READ_S", 60.0)
    assert known.p95_s() == 6.0  # at once
    answer.set()
    reader = known._reader
    assert reader is not None
    reader.join(60)
    assert known.p95_s() == 9.0
