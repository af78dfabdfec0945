"""What a spot instance of EC2 is asked, and what its answers mean."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import pytest

from holdfast.notices import metadata
from holdfast.notices.aws import Spot
from holdfast.notices.metadata import Unanswered
from holdfast.notices.notice import Notice
from holdfast.notices.notifier import Over
from tests.support.servers.machine import Machine, machine_on_loopback

TAKEN = Notice("AWS spot", "the instance will terminate at 2026-11-26T19:00:00Z", 1795719600.0)
RISK = Notice(
    "AWS rebalance", "the instance is at an elevated risk of being taken away", stops=False
)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """One that no proxy of the environment is asked for."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    # A busy computer may take longer than a real service does.
    defaults = metadata.request.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "timeout_s", 60.0)
    with machine_on_loopback() as machine:
        yield machine


def test_a_spot_instance_says_when_it_is_taken_away(machine: Machine) -> None:
    ask = Spot(machine.url + "/")
    assert ask() == ask() == []
    assert machine.asked == [
        "/latest/api/token",
        "/latest/meta-data/instance-life-cycle",
        "/latest/meta-data/spot/instance-action",
        "/latest/meta-data/events/recommendations/rebalance",
        "/latest/meta-data/spot/instance-action",
    ]
    machine.taken = True
    assert ask() == [TAKEN]


def test_a_token_that_is_over_is_replaced(machine: Machine) -> None:
    ask = Spot(machine.url)
    assert ask() == []
    machine.tokens += 1
    machine.taken = True
    assert ask() == [TAKEN]
    assert machine.asked.count("/latest/api/token") == 2


def test_a_recommendation_stops_nothing(machine: Machine) -> None:
    ask = Spot(machine.url)
    machine.rebalance = True
    assert [ask() for _ in range(12)] == [[RISK]] * 12
    assert sum("rebalance" in path for path in machine.asked) == 1
    machine.taken = True
    assert ask() == [TAKEN, RISK]


def test_a_recommendation_is_asked_for_less_often(machine: Machine) -> None:
    ask = Spot(machine.url)
    assert [ask() for _ in range(10)] == [[]] * 10
    assert sum("rebalance" in path for path in machine.asked) == 2
    machine.rebalance = True
    assert [RISK] in [ask() for _ in range(5)]


@pytest.mark.parametrize(
    ("said", "deadline_s", "stops"),
    [
        ({"action": "stop", "time": "2026-11-26T19:00:00Z"}, TAKEN.deadline_s, True),
        ({"action": "terminate", "time": ""}, None, True),
        ({"action": "terminate"}, None, True),
        ({"action": "terminate", "time": "soon"}, None, True),
        ({"action": "hibernate", "time": "2026-11-26T19:00:00Z"}, TAKEN.deadline_s, False),
    ],
)
def test_actions(
    machine: Machine, said: dict[str, str], deadline_s: float | None, stops: bool
) -> None:
    machine.taken, machine.action = True, json.dumps(said)
    [notice] = Spot(machine.url)()
    assert (notice.deadline_s, notice.stops) == (deadline_s, stops)
    assert said["action"] in notice.text


def test_an_answer_that_does_not_come_is_no_notice(machine: Machine) -> None:
    ask = Spot(machine.url)
    assert ask() == []
    machine.taken, machine.status, machine.tokens = True, 500, machine.tokens + 1
    with pytest.raises(Unanswered, match="500"):
        ask()
    machine.status, machine.garbage = 200, "<html>this network wants you to log in</html>"
    with pytest.raises(Unanswered, match="log in"):
        ask()
    machine.garbage = '["terminate"]'
    with pytest.raises(Unanswered):
        ask()
    machine.garbage = "x" * 100_000
    with pytest.raises(Unanswered, match="more than 65,536 bytes"):
        ask()
    machine.garbage = None
    assert ask() == [TAKEN]


@pytest.mark.parametrize("life_cycle", ["on-demand", "scheduled"])
def test_a_machine_that_is_no_spot_instance_is_not_asked_again(
    machine: Machine, life_cycle: str
) -> None:
    machine.life_cycle = life_cycle
    with pytest.raises(Over):
        Spot(machine.url)()
    assert len(machine.asked) == 2


def test_who_is_asked_too_often_is_asked_again(machine: Machine) -> None:
    ask = Spot(machine.url)
    for status in (429, 401, 503):
        machine.status = status
        with pytest.raises(Unanswered, match=str(status)):
            ask()
    machine.status, machine.taken = 200, True
    assert ask() == [TAKEN]


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:1", "http://127.0.0.1:x", "nonsense"])
def test_where_nobody_is(endpoint: str) -> None:
    with pytest.raises(Unanswered):
        Spot(endpoint)()


def test_who_does_not_answer_is_not_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        with pytest.raises(Unanswered):
            Spot(f"http://127.0.0.1:{silent.getsockname()[1]}")()
        assert time.monotonic() - start < 30
