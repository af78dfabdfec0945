"""Notifiers of other packages, installed as pip does it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.notices import third_party
from holdfast.notices.listening import Listening
from holdfast.notices.notice import Notice
from holdfast.notices.third_party import third_party_notifiers
from tests.support.waiting import within

CODE = """
from holdfast.notices.notice import Notice
from holdfast.notices.notifier import Notifier

def drained():
    return Notifier("drain", lambda: [Notice("drain", "this node is drained")], 0.01)

def elsewhere():
    return None

def broken():
    raise RuntimeError("no such node")

def wrong():
    return "drain"
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "their_notifiers.py").write_text(CODE)
    info = tmp_path / "their_notifiers-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-notifiers\nVersion: 1.0\n")
    names = ("drained", "elsewhere", "broken", "wrong")
    lines = [f"{name} = their_notifiers:{name}" for name in names]
    (info / "entry_points.txt").write_text(
        "\n".join(["[holdfast.notifiers]", *lines, "missing = no_such_module_at_all:make"])
    )
    monkeypatch.syspath_prepend(tmp_path)
    third_party_notifiers.cache_clear()
    yield
    third_party_notifiers.cache_clear()
    sys.modules.pop("their_notifiers", None)


def test_they_are_asked_and_broken_ones_do_no_harm(
    installed: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOLDFAST_NOTICES", "all")
    for _ in range(2):
        told: list[Notice] = []
        leave = Listening(tuple, third_party_notifiers, linger_s=0).listen(told.append)
        assert within(20, lambda told=told: told == [Notice("drain", "this node is drained")])
        leave()
    warned = sorted(record.message for record in caplog.records if record.levelname == "WARNING")
    assert len(warned) == 3  # each once
    assert "broken (their_notifiers:broken) is left out: RuntimeError('no such node')" in warned[0]
    assert "missing (no_such_module_at_all:make) is left out: ModuleNotFound" in warned[1]
    assert "wrong (their_notifiers:wrong) is no Notifier: 'drain'" in warned[2]


@pytest.mark.parametrize(("said", "count"), [("drained", 1), ("aws", 0), ("none", 0)])
def test_they_can_be_left_out(
    installed: None, monkeypatch: pytest.MonkeyPatch, said: str, count: int
) -> None:
    monkeypatch.setenv("HOLDFAST_NOTICES", said)
    assert len(third_party_notifiers()) == count
    assert third_party.GROUP == "holdfast.notifiers"
