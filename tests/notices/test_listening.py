"""Who is told, when, and which threads there are for it."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from holdfast.notices import listening
from holdfast.notices.listening import Listening
from holdfast.notices.notice import Notice
from holdfast.notices.notifier import Notifier, Over
from tests.support.waiting import within

GONE = Notice("test", "it goes", 1000.0)
RISK = Notice("test", "it may go", stops=False)


def unheard(notice: Notice) -> None:
    pytest.fail(str(notice))


class Said:
    """A place; what it says is `stands`."""

    def __init__(self, *stands: Notice) -> None:
        self.stands: Sequence[Notice] = stands
        self.asked = 0
        self.threads: set[int] = set()
        self.error: Exception | None = None

    def __call__(self) -> Sequence[Notice]:
        self.asked += 1
        self.threads.add(threading.get_ident())
        if self.error is not None:
            raise self.error
        return self.stands

    def listening(self, *, linger_s: float = 0.0, interval_s: float = 0.01) -> Listening:
        return Listening(lambda: [Notifier("test", self, interval_s)], linger_s=linger_s)


_of_others: set[threading.Thread] = set()
"""Those of a run that an earlier test has left."""


def threads() -> int:
    return sum(
        thread.name == "holdfast-notices" and thread not in _of_others
        for thread in threading.enumerate()
    )


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    _of_others.clear()
    _of_others.update(threading.enumerate())
    yield
    assert within(20, lambda: not threads())


def test_all_are_told_once() -> None:
    said = Said()
    of_process = said.listening()
    one: list[Notice] = []
    two: list[Notice] = []
    leave = [of_process.listen(one.append), of_process.listen(two.append)]
    assert within(20, lambda: said.asked > 1)
    assert threads() == 1
    assert one == two == []
    said.stands = [RISK]
    assert within(20, lambda: one == two == [RISK])
    said.stands = [RISK, GONE]
    assert within(20, lambda: one == two == [RISK, GONE])
    asked = said.asked
    assert within(20, lambda: said.asked > asked + 3)
    assert one == two == [RISK, GONE]
    for each in leave:
        each()
        each()


def test_who_comes_later_is_told_at_once_of_what_stops() -> None:
    said = Said(RISK, GONE)
    of_process = said.listening()
    first: list[Notice] = []
    late: list[Notice] = []
    leave = of_process.listen(first.append)
    assert within(20, lambda: len(first) == 2)
    of_process.listen(late.append)()
    assert late == [GONE]
    said.stands = []  # the event was cancelled
    asked = said.asked
    assert within(20, lambda: said.asked > asked + 1)
    of_process.listen(late.append)()
    assert late == [GONE]
    said.stands = [GONE]  # and is there again
    assert within(20, lambda: first == [RISK, GONE, GONE])
    leave()


def test_the_last_one_to_leave_ends_it_and_the_next_begins_anew() -> None:
    said = Said()
    of_process = said.listening()
    for _ in range(3):
        asked = said.asked
        leave = of_process.listen(unheard)
        assert within(20, lambda asked=asked: said.asked > asked)
        leave()
        assert within(20, lambda: not threads())


def test_loops_one_after_the_other_share_a_poller() -> None:
    said = Said()
    of_process = said.listening(linger_s=3600.0)
    for _ in range(5):
        leave = of_process.listen(unheard)
        asked = said.asked
        assert within(20, lambda asked=asked: said.asked > asked)
        leave()
    assert len(said.threads) == 1
    of_process._linger_s = 0


def test_who_said_that_it_is_over_is_not_asked_again() -> None:
    said = Said()
    said.error = Over("none of those")
    of_process = said.listening()
    for _ in range(2):
        leave = of_process.listen(unheard)
        assert within(20, lambda: said.asked == 1 and not threads())
        leave()
    assert said.asked == 1


def test_who_does_not_answer_is_asked_less_often_and_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    said = Said()
    said.error = RuntimeError("down")
    told: list[Notice] = []
    leave = said.listening(interval_s=0.02).listen(told.append)
    assert within(20, lambda: said.asked >= 5)
    said.error, said.stands = None, [GONE]
    assert within(20, lambda: told == [GONE])
    leave()
    warned = [one.message for one in caplog.records if one.levelno == logging.WARNING]
    assert warned == ["no notices from test for now: down"]


def test_a_service_that_has_answered_is_asked_again_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listening, "_LONGEST_S", 3600.0)
    monkeypatch.setattr(listening, "_LONGEST_ANSWERED_S", 0.02)
    said = Said()
    told: list[Notice] = []
    leave = said.listening(interval_s=0.01).listen(told.append)
    assert within(20, lambda: said.asked > 1)  # so that one was answered
    said.error = OSError("down")
    asked = said.asked
    assert within(20, lambda: said.asked > asked + 20)  # unbounded, that would be hours
    said.error, said.stands = None, [GONE]
    assert within(20, lambda: told == [GONE])
    leave()


def test_an_outage_withdraws_nothing() -> None:
    said = Said(GONE)
    of_process = said.listening()
    first: list[Notice] = []
    late: list[Notice] = []
    leave = of_process.listen(first.append)
    assert within(20, lambda: bool(first))
    said.error = OSError("down")
    asked = said.asked
    assert within(20, lambda: said.asked > asked + 1)
    of_process.listen(late.append)()
    said.error = None
    asked = said.asked
    assert within(20, lambda: said.asked > asked + 1)
    assert first == late == [GONE]
    leave()


@pytest.mark.parametrize("wrong", [["it goes"], None, 7])
def test_what_is_no_notice_does_no_harm(wrong: Any, caplog: pytest.LogCaptureFixture) -> None:
    said = Said()
    said.stands = wrong
    of_process = said.listening()
    told: list[Notice] = []
    leave = of_process.listen(told.append)
    assert within(20, lambda: said.asked > 3)
    of_process.listen(unheard)()  # as the next loop of the program does
    said.stands = [GONE]
    assert within(20, lambda: told == [GONE])
    leave()
    assert "no notices from test for now" in caplog.text


def test_a_listener_that_fails_keeps_nobody_from_hearing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(notice: Notice) -> None:
        raise ValueError("a bug")

    said = Said(GONE)
    of_process = said.listening()
    told: list[Notice] = []
    leave = [of_process.listen(fail), of_process.listen(told.append)]
    assert within(20, lambda: told == [GONE] and "a notice could not be told" in caplog.text)
    for each in leave:
        each()


def test_a_listener_may_leave_while_it_is_told() -> None:
    said = Said(GONE, RISK)
    leave: list[Callable[[], None]] = []
    told: list[Notice] = []

    def tell(notice: Notice) -> None:
        told.append(notice)
        assert within(20, lambda: bool(leave))
        leave[0]()

    leave.append(said.listening().listen(tell))
    assert within(20, lambda: bool(told) and not threads())
    assert told == [GONE]


def test_a_forked_child_hears_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    said = Said()
    of_process = said.listening()
    monkeypatch.setattr(listening, "_listening", of_process)
    told: list[Notice] = []
    leave = listening.listen(told.append)
    assert within(20, lambda: said.asked > 0)
    with of_process._lock:  # as it may be at any fork
        child = os.fork()
        if child == 0:
            status = 1
            try:
                leave()  # waits for nothing
                listening.listen(told.append)()
                status = 0 if listening._listening is not of_process and not told else 2
            finally:
                os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    leave()


def test_who_is_held_back_hears_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    said = Said(GONE)
    monkeypatch.setattr(listening, "_listening", said.listening())
    give_back = listening.hold_back()
    listening.listen(unheard)()
    assert said.asked == 0
    give_back()
    give_back()
    told: list[Notice] = []
    leave = listening.listen(told.append)
    assert within(20, lambda: told == [GONE])
    leave()


def test_the_end_of_a_slurm_job_is_known_without_a_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_NOTICES", "slurm")
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert listening.deadline_s() is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1764200000")
    assert listening.deadline_s() == 1764200000.0
    monkeypatch.setenv("SLURM_JOB_END_TIME", "UNLIMITED")
    assert listening.deadline_s() is None
