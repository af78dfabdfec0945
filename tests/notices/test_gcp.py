"""What a virtual machine of Compute Engine is asked, and what its answers mean."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from holdfast.notices.gcp import Key, gcp_notifiers
from holdfast.notices.metadata import Unanswered
from holdfast.notices.notice import Notice
from holdfast.notices.notifier import Over
from tests.support.servers.machine import GoogleMachine, on_loopback
from tests.support.waiting import within

NOW = 1000.0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[GoogleMachine]:
    """One that no proxy of the environment is asked for."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    machine = GoogleMachine()
    with on_loopback(machine):
        yield machine


def key(machine: GoogleMachine, name: str, *, held_s: int = 60) -> Key:
    asked = {"preempted": 0, "maintenance-event": 1}[name]
    read = gcp_notifiers(machine.url)[asked].ask._read  # type: ignore[attr-defined]
    return Key(machine.url, name, read, held_s=held_s, clock=lambda: NOW)


def asked_meanwhile(ask: Key, machine: GoogleMachine) -> list[list[Notice]]:
    """Its answer will be there once the machine has something to say."""
    answers: list[list[Notice]] = []
    threading.Thread(target=lambda: answers.append(ask()), daemon=True).start()
    assert within(20, lambda: machine.waiting == 1)
    assert answers == []
    return answers


def test_a_preemption_is_told_when_it_comes(machine: GoogleMachine) -> None:
    ask = key(machine, "preempted")
    assert ask() == []
    answers = asked_meanwhile(ask, machine)
    machine.change("preempted", "TRUE")
    assert within(20, lambda: bool(answers))
    assert answers == [[Notice("GCP", "this VM is being preempted", NOW + 30)]]


def test_a_preemption_that_is_there_already(machine: GoogleMachine) -> None:
    machine.change("preempted", "TRUE")
    [notice] = key(machine, "preempted")()
    assert notice.stops


def test_a_poll_that_ends_without_a_change(machine: GoogleMachine) -> None:
    ask = key(machine, "preempted", held_s=0)
    assert [ask() for _ in range(3)] == [[]] * 3
    machine.change("preempted", "TRUE")
    first, second = ask(), ask()
    assert first == second  # with the same deadline: it is told once
    assert len(first) == 1


def test_maintenance(machine: GoogleMachine) -> None:
    ask = key(machine, "maintenance-event")
    assert ask() == []
    answers = asked_meanwhile(ask, machine)
    machine.change("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE")
    assert within(20, lambda: bool(answers))
    assert [notice.stops for notice in answers[0]] == [False]
    answers = asked_meanwhile(ask, machine)
    machine.change("maintenance-event", "NONE")
    assert within(20, lambda: answers == [[]])
    answers = asked_meanwhile(ask, machine)
    machine.change("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
    assert within(20, lambda: bool(answers))
    assert [(one.stops, one.deadline_s) for one in answers[0]] == [(True, NOW + 60)]


def test_a_service_that_starts_again_is_asked_again(machine: GoogleMachine) -> None:
    ask = key(machine, "preempted", held_s=0)
    assert ask() == []
    machine.status = 503
    with pytest.raises(Unanswered, match="503"):
        ask()
    machine.status, machine.garbage = 200, "<html>log in</html>"
    assert ask() == []
    machine.garbage = None
    machine.change("preempted", "TRUE")
    assert len(ask()) == 1


def test_a_key_that_is_not_there_is_not_asked_again(machine: GoogleMachine) -> None:
    del machine.values["maintenance-event"]
    with pytest.raises(Over):
        key(machine, "maintenance-event")()


def test_where_nobody_is() -> None:
    for notifier in gcp_notifiers("http://127.0.0.1:1"):
        with pytest.raises(Unanswered):
            notifier.ask()
