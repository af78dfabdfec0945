"""Waiting and threads that a signal's handler may break into."""

from __future__ import annotations

import contextvars
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from holdfast.core.aside import Helper, Latch, NoThread, aside
from tests.support.waiting import within


class Alarm(Exception):
    pass


@pytest.fixture
def rings() -> Iterator[None]:
    """SIGUSR1 raises Alarm."""

    def ring(number: int, frame: object) -> None:
        raise Alarm

    before = signal.signal(signal.SIGUSR1, ring)
    yield
    signal.signal(signal.SIGUSR1, before)


def ring() -> None:
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGUSR1)


def test_a_latch_lets_all_go() -> None:
    latch = Latch()
    seen: list[bool] = []
    waiting = [threading.Thread(target=lambda: seen.append(latch.wait(60))) for _ in range(5)]
    for each in waiting:
        each.start()
    assert not latch.wait(0)
    assert not latch.wait(0.01)
    latch.set()
    for each in waiting:
        each.join()
    assert seen == [True] * 5
    assert latch.wait(0)
    assert not latch._waiting


@pytest.mark.usefixtures("rings")
def test_who_is_interrupted_holds_up_nobody_else() -> None:
    latch, other = Latch(), Latch()
    helper = Helper(lambda: other.set() if latch.wait(60) else None, name="waits")
    # When both wait, and so inside of what expects it.
    Helper(lambda: ring() if within(60, lambda: len(latch._waiting) == 2) else None, name="rings")
    start = time.perf_counter()
    with pytest.raises(Alarm):
        latch.wait(60)
    assert time.perf_counter() - start < 30
    latch.set()
    assert other.wait(60)
    helper.join()
    assert not helper.works


@pytest.mark.usefixtures("rings")
def test_aside_ends_before_the_exception_comes() -> None:
    begun, ended = Latch(), Latch()

    @aside
    def work() -> None:
        begun.set()
        time.sleep(0.1)
        ended.set()

    def interrupt() -> None:
        assert begun.wait(60)
        ring()

    Helper(interrupt, name="interrupts")
    with pytest.raises(Alarm):
        work()
    assert ended.is_set


def test_aside_gives_back_what_the_function_does(monkeypatch: pytest.MonkeyPatch) -> None:
    variable = contextvars.ContextVar("variable", default=0)
    variable.set(7)
    threads: list[str] = []

    @aside
    def divide(number: int, *, by: int) -> tuple[float, int]:
        threads.append(threading.current_thread().name)
        return number / by, variable.get()

    assert divide(6, by=3) == (2.0, 7)
    with pytest.raises(ZeroDivisionError):
        divide(1, by=0)
    assert threads == ["holdfast-aside"] * 2

    def start(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("_thread.start_new_thread", start)
    assert divide(6, by=3) == (2.0, 7)  # in the caller's, then
    assert threads[2] == threading.current_thread().name
    with pytest.raises(NoThread):
        Helper(int, name="none")


def test_what_a_handler_raises_is_not_taken_for_a_lack_of_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The work has not begun then, and never does."""
    done: list[int] = []

    def start(*_: object) -> None:
        raise RuntimeError("time is over")

    with monkeypatch.context() as patch:
        patch.setattr("_thread.start_new_thread", start)
        with pytest.raises(RuntimeError, match="time is over"):
            aside(lambda: done.append(1))()
    assert not done
