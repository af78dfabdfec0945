"""What a virtual machine of Azure is asked, and which of the events concern it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from holdfast.notices import azure
from holdfast.notices.azure import ScheduledEvents
from holdfast.notices.metadata import Unanswered
from holdfast.notices.notice import Notice
from holdfast.notices.notifier import Over
from tests.support.servers.machine import AzureMachine, on_loopback

NOW = 1795719600.0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[AzureMachine]:
    """One that no proxy of the environment is asked for."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    machine = AzureMachine()
    with on_loopback(machine):
        yield machine


def events(machine: AzureMachine) -> ScheduledEvents:
    return ScheduledEvents(machine.url, clock=lambda: NOW)


def test_an_eviction_is_told_with_its_time(machine: AzureMachine) -> None:
    ask = events(machine)
    assert ask() == []
    machine.schedule("Preempt", "train_0", not_before_s=NOW + 30)
    text = "this VM will be preempted, not before Thu, 26 Nov 2026 19:00:30 GMT"
    assert ask() == ask() == [Notice("Azure Preempt", text, NOW + 30)]
    assert machine.asked.count("/metadata/instance/compute/name") == 1


def test_an_event_that_has_begun_has_no_time(machine: AzureMachine) -> None:
    machine.schedule("Preempt", "train_0", status="Started")
    assert events(machine)() == [Notice("Azure Preempt", "this VM will be preempted, now")]
    machine.events[0]["NotBefore"] = "soon"
    assert [one.deadline_s for one in events(machine)()] == [None]
    del machine.events[0]["NotBefore"]
    assert len(events(machine)()) == 1


def test_events_of_other_machines_are_not_ours(machine: AzureMachine) -> None:
    machine.schedule("Preempt", "train_1", "train_00", "", not_before_s=NOW + 30)
    assert events(machine)() == []
    machine.schedule("Reboot", "train_1", "TRAIN_0", not_before_s=NOW + 30)
    assert [one.source for one in events(machine)()] == ["Azure Reboot"]


@pytest.mark.parametrize(
    ("kind", "stops"),
    [
        ("Preempt", True),
        ("Terminate", True),
        ("Reboot", True),
        ("Redeploy", True),
        ("Freeze", False),
    ],
)
def test_what_an_event_means(machine: AzureMachine, kind: str, stops: bool) -> None:
    machine.schedule(kind, "train_0", not_before_s=NOW + 30)
    assert [one.stops for one in events(machine)()] == [stops]


def test_kinds_that_are_not_known_mean_nothing(machine: AzureMachine) -> None:
    machine.schedule("Celebrate", "train_0", not_before_s=NOW + 30)
    assert events(machine)() == []


def test_an_event_days_ahead_is_told_shortly_before(machine: AzureMachine) -> None:
    machine.schedule("Redeploy", "train_0", not_before_s=NOW + 86400)
    assert events(machine)() == []
    later = ScheduledEvents(machine.url, clock=lambda: NOW + 86400 - 119)
    assert len(later()) == 1


def test_an_event_that_is_cancelled_stands_no_more(machine: AzureMachine) -> None:
    ask = events(machine)
    machine.schedule("Preempt", "train_0", not_before_s=NOW + 30)
    assert len(ask()) == 1
    machine.events.clear()
    assert ask() == []


def test_the_first_answer_may_take_its_time(machine: AzureMachine) -> None:
    machine.first_s = azure.TIMEOUT_S + 0.5
    machine.schedule("Preempt", "train_0", status="Started")
    assert len(events(machine)()) == 1


@pytest.mark.parametrize(
    "garbage", ["<html>log in</html>", "", "[]", '{"Events": {}}', '{"Events": "x"}', "null"]
)
def test_what_is_no_list_of_events_is_no_notice(machine: AzureMachine, garbage: str) -> None:
    ask = events(machine)
    assert ask() == []
    machine.garbage = garbage
    with pytest.raises(Unanswered):
        ask()
    machine.garbage = '{"Events": [null, 3, {}, {"Resources": "train_0"}, {"Resources": [1]}]}'
    assert ask() == []
    machine.garbage = None
    machine.schedule("Preempt", "train_0", status="Started")
    assert len(ask()) == 1


def test_errors(machine: AzureMachine) -> None:
    ask = events(machine)
    for status, error in ((500, Unanswered), (429, Unanswered), (404, Over)):
        machine.status = status
        with pytest.raises(error):
            ask()
    machine.status = 200
    assert ask() == []
    with pytest.raises(Unanswered):
        ScheduledEvents("http://127.0.0.1:1")()
