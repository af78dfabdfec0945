"""`holdfast.Preemption`: notices for programs that have no `Run`."""

from __future__ import annotations

import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator

import pytest

import holdfast
from holdfast.errors import UsageError
from holdfast.notices import listening
from holdfast.notices.notice import Notice
from holdfast.notices.signals import _SIGNALS
from tests.support.notices import Told, signals_of_a_new_process

TAKEN = Notice("AWS spot", "the instance will terminate", time.time() + 86_400)


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[Told]:
    told = Told()
    monkeypatch.setattr(listening, "listen", told.listen)
    monkeypatch.delenv("HOLDFAST_GRACE", raising=False)
    with signals_of_a_new_process():
        yield told
    assert told.listeners == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_a_request(number: signal.Signals, capfd) -> None:
    before = signal.getsignal(number)
    with holdfast.Preemption() as preemption:
        assert not preemption.requested
        assert preemption.notice is None
        assert preemption.remaining_s is None
        signal.raise_signal(number)
        assert preemption.requested
        assert preemption.notice == Notice(number.name)
        assert preemption.remaining_s is None
    assert signal.getsignal(number) is before
    assert capfd.readouterr().err == f"holdfast: {number.name}: this program is asked to stop\n"


def test_exit_leaves_with_the_status_that_says_run_me_again() -> None:
    with pytest.raises(SystemExit) as caught, holdfast.Preemption(quiet=True) as preemption:
        preemption.exit()
    assert caught.value.code == 75
    with pytest.raises(SystemExit) as caught, holdfast.Preemption(exit_code=7) as preemption:
        preemption.exit()
    assert caught.value.code == 7


def test_in_a_notebook_it_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.notices.preemption.in_notebook", lambda: True)
    with holdfast.Preemption(quiet=True) as preemption:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(holdfast.Preempted, match="SIGTERM: run this again"):
            preemption.exit()


def test_a_notice_brings_its_deadline(told: Told, capfd) -> None:
    with holdfast.Preemption(grace=20) as preemption:
        told.tell(TAKEN)
        assert preemption.requested
        assert preemption.notice == TAKEN
        assert 60 < (preemption.remaining_s or 0) <= 86_400
        signal.raise_signal(signal.SIGTERM)  # comes earlier than was said
        assert preemption.notice == TAKEN
        assert 10 < (preemption.remaining_s or 0) <= 20
        told.tell(Notice("Azure", "now", time.time() - 3))
        assert preemption.remaining_s == 0.0
    said = "holdfast: AWS spot: the instance will terminate: this program is asked to stop"
    assert said in capfd.readouterr().err


def test_a_warning_is_no_request(told: Told, capfd) -> None:
    with holdfast.Preemption() as preemption:
        risk = Notice("AWS rebalance", "elevated risk", time.time() + 5, stops=False)
        told.tell(risk)
        assert not preemption.requested
        assert preemption.notice == risk
        assert preemption.remaining_s is None
        assert "AWS rebalance: elevated risk: this program may be stopped" in capfd.readouterr().err
        signal.raise_signal(signal.SIGTERM)
        assert preemption.notice == Notice("SIGTERM")
        told.tell(TAKEN)
        assert preemption.notice == Notice("SIGTERM")
        assert preemption.remaining_s is not None


def test_grace_begins_with_the_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_GRACE", "45s")
    with holdfast.Preemption(quiet=True) as preemption:
        assert preemption.remaining_s is None
        signal.raise_signal(signal.SIGTERM)
        assert 35 < (preemption.remaining_s or 0) <= 45
        assert preemption.notice is not None
        assert preemption.notice.deadline_s is not None
    with pytest.raises(UsageError, match="grace"):
        holdfast.Preemption(grace="soon")


def test_a_slurm_limit_is_known_without_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_NOTICES", "slurm")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 600))
    with holdfast.Preemption() as preemption:
        assert 590 < (preemption.remaining_s or 0) <= 600
        assert not preemption.requested
        monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() - 600))  # it was extended
        assert preemption.remaining_s is None


def test_a_second_interrupt_stops_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), holdfast.Preemption(quiet=True) as preemption:
        signal.raise_signal(signal.SIGINT)
        assert preemption.requested
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_at_the_door_gives_the_signals_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def listen(tell: Callable[[Notice], None]) -> Callable[[], None]:
        raise KeyboardInterrupt

    monkeypatch.setattr(listening, "listen", listen)
    before = [signal.getsignal(number) for number in _SIGNALS]
    with pytest.raises(KeyboardInterrupt), holdfast.Preemption(quiet=True):
        pytest.fail("the block was entered")
    assert [signal.getsignal(number) for number in _SIGNALS] == before


def test_handlers_that_were_there_are_called_and_come_back() -> None:
    called: list[int] = []

    def mine(number: int, frame: object) -> None:
        called.append(number)

    signal.signal(signal.SIGUSR2, mine)
    with holdfast.Preemption(quiet=True) as outer, holdfast.Preemption(quiet=True) as inner:
        signal.raise_signal(signal.SIGUSR2)
        assert outer.requested
        assert inner.requested
    assert called == [signal.SIGUSR2]
    assert signal.getsignal(signal.SIGUSR2) is mine


def test_off_the_main_thread_it_warns_and_hears_the_rest(told: Told) -> None:
    seen: list[object] = []

    def work() -> None:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            with holdfast.Preemption(quiet=True) as preemption:
                told.tell(TAKEN)
                seen.append(preemption.requested)
        seen.extend(str(one.message) for one in warned)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True, "this is not the main thread: signals will not be requests to stop"]
