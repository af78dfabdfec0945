"""The flag that signals set; signals to whole programs are in test_stop_signals."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.notices.signals import StopSignals
from tests.support.notices import signals_of_a_new_process


class Handlers:
    """Signals under test, with what was noticed."""

    def __init__(self) -> None:
        self.is_inside = True
        self.noticed: list[str] = []
        self.stop = StopSignals(inside=lambda frame: self.is_inside, notice=self.noticed.append)


@pytest.fixture
def handlers() -> Iterator[Handlers]:
    with signals_of_a_new_process():
        made = Handlers()
        yield made
        made.stop.restore()


def test_a_signal_is_a_flag(handlers: Handlers) -> None:
    assert handlers.stop.install()
    signal.raise_signal(signal.SIGTERM)
    assert handlers.stop.requested
    assert handlers.stop.name == "SIGTERM"
    assert handlers.noticed == ["SIGTERM"]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_so_are_those_of_schedulers(handlers: Handlers, number: signal.Signals) -> None:
    handlers.stop.install()
    signal.raise_signal(number)
    assert handlers.noticed == [number.name]
    handlers.stop.restore()
    assert signal.getsignal(number) is signal.SIG_DFL


def test_a_handler_that_is_not_of_python_stays(handlers: Handlers, tmp_path: Path) -> None:
    with (tmp_path / "stacks").open("w+") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=False)
        try:
            handlers.stop.install()
            signal.raise_signal(signal.SIGUSR1)
            assert not handlers.stop.requested
            handlers.stop.restore()
            signal.raise_signal(signal.SIGUSR1)
            stacks.seek(0)
            assert stacks.read().count("most recent call first") == 2
        finally:
            faulthandler.unregister(signal.SIGUSR1)
    handlers.stop.install()
    signal.raise_signal(signal.SIGUSR2)
    assert handlers.noticed == ["SIGUSR2"]


def test_a_second_interrupt_stops_at_once(handlers: Handlers) -> None:
    handlers.stop.install()
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert handlers.noticed == ["SIGTERM"]


def test_previous_handlers_are_called_and_come_back(handlers: Handlers) -> None:
    called: list[int] = []

    def mine(number: int, frame: object) -> None:
        called.append(number)

    signal.signal(signal.SIGTERM, mine)
    handlers.stop.install()
    handlers.stop.install()
    signal.raise_signal(signal.SIGTERM)
    assert called == [signal.SIGTERM]
    handlers.stop.restore()
    assert signal.getsignal(signal.SIGTERM) is mine
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_installed_after_ours_stays(handlers: Handlers) -> None:
    handlers.stop.install()

    def later(number: int, frame: object) -> None: ...

    signal.signal(signal.SIGTERM, later)
    handlers.stop.restore()
    assert signal.getsignal(signal.SIGTERM) is later


def test_an_ignored_interrupt_stays_ignored(handlers: Handlers) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    handlers.stop.install()
    signal.raise_signal(signal.SIGINT)
    assert not handlers.stop.requested


def test_outside_the_loop_a_signal_does_what_it_did_before(handlers: Handlers) -> None:
    handlers.is_inside = False
    handlers.stop.install()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert not handlers.stop.requested


def test_not_on_another_thread(handlers: Handlers) -> None:
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(handlers.stop.install()))
    thread.start()
    thread.join()
    assert answers == [False]
    assert not handlers.stop.installed


def test_runs_that_are_closed_in_any_order_leave_the_previous_handlers(handlers: Handlers) -> None:
    before = signal.getsignal(signal.SIGTERM)
    second = Handlers()
    handlers.stop.install()
    second.stop.install()
    handlers.stop.restore()
    signal.raise_signal(signal.SIGTERM)
    assert second.noticed == ["SIGTERM"]
    assert handlers.noticed == []
    handlers.stop.install()
    second.stop.restore()
    handlers.stop.restore()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_that_was_abandoned_is_not_asked(handlers: Handlers) -> None:
    abandoned = Handlers()
    abandoned.stop.install()
    abandoned.is_inside = False
    handlers.stop.install()
    signal.raise_signal(signal.SIGTERM)
    assert handlers.noticed == ["SIGTERM"]
    assert abandoned.noticed == []
    abandoned.stop.restore()


def test_waiting_for_a_signal_that_is_a_little_late(handlers: Handlers) -> None:
    handlers.stop.install()
    assert not handlers.stop.wait(0.05)
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    assert handlers.stop.wait(10.0)
    timer.join()
