"""Whether the machine is about to be taken away: what is asked, how often, and when no more."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.metaflow.notices import Over, SpotNotice, Watch, file_notice, on_ec2
from tests.support.servers.machine import Machine, machine_on_loopback


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """One that no proxy of the environment is asked for."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with machine_on_loopback() as machine:
        yield machine


def test_a_spot_instance_says_when_it_is_taken_away(machine: Machine) -> None:
    ask = SpotNotice(machine.url + "/")
    assert ask() == ask() == ""
    assert machine.asked == [
        "/latest/api/token",
        "/latest/meta-data/instance-life-cycle",
        *["/latest/meta-data/spot/instance-action"] * 2,
    ]
    machine.taken = True
    assert ask() == "the instance will terminate at 2026-11-26T19:00:00Z"
    machine.tokens += 1  # the one that it has is over
    assert "terminate" in ask()


def test_an_answer_that_does_not_come_is_no_notice(machine: Machine) -> None:
    ask = SpotNotice(machine.url)
    assert ask() == ""
    machine.taken, machine.status, machine.tokens = True, 500, machine.tokens + 1
    assert ask() == ""
    machine.status = 200
    assert "terminate" in ask()


def test_a_machine_that_is_none_of_those_is_asked_once(machine: Machine) -> None:
    machine.life_cycle = "on-demand"
    watch = Watch(SpotNotice(machine.url), interval_s=0.01, tell=pytest.fail)
    ended(watch)
    assert len(machine.asked) == 2


def test_where_nobody_answers_nobody_is_asked_again() -> None:
    with pytest.raises(Over):
        SpotNotice("http://127.0.0.1:1")()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        with pytest.raises(Over):
            SpotNotice(f"http://127.0.0.1:{silent.getsockname()[1]}")()
        assert time.monotonic() - start < 3


def test_a_file_says_it_too(tmp_path: Path) -> None:
    path = tmp_path / "notice"
    ask = file_notice(str(path))
    assert ask() == ""
    path.write_text("2026-11-26T19:00:00Z")
    assert ask() == f"the machine will be taken away ({path}: 2026-11-26T19:00:00Z)"
    os.utime(path, (0, 0))  # it was about another machine
    assert ask() == ""


def test_who_is_asked(tmp_path: Path) -> None:
    vendor = tmp_path / "sys_vendor"
    assert not on_ec2({}, vendor)
    vendor.write_text("QEMU\n")
    assert not on_ec2({}, vendor)
    vendor.write_text("Amazon EC2\n")
    assert on_ec2({}, vendor)
    assert not on_ec2({"AWS_EC2_METADATA_DISABLED": "true"}, vendor)
    vendor.unlink()
    assert on_ec2({"AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:1"}, vendor)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "holdfast-notices"]


def ended(watch: Watch) -> None:
    for thread in threads():
        thread.join(5)
    assert not threads()


def test_who_listens_is_told_once() -> None:
    said = ["", "", "it goes"]
    heard: list[str] = []
    watch = Watch(lambda: said.pop(0), interval_s=0.05, tell=heard.append)
    assert not watch.notice
    watch.listen(lambda text: heard.append(f"again {text}"))
    ended(watch)
    assert watch.notice == "it goes"
    watch.listen(lambda text: heard.append(f"late {text}"))
    assert heard == ["it goes", "again it goes", "late it goes"]


def test_who_is_closed_looks_no_more() -> None:
    watch = Watch(lambda: "", interval_s=60, tell=pytest.fail)
    watch.close()
    ended(watch)
