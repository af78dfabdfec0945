"""What takes long says on a terminal how far it is, and on no other stream."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from holdfast.manager import progress
from tests.cli.conftest import Command

LONG = {
    "verify": ["verify", "{run}"],
    "restore": ["restore", "{run}", "{out}"],
    "export": ["export", "{run}", "{out}.safetensors"],
    "cp": ["cp", "{run}", "--all", "{out}"],
    "sync": ["sync", "{run}", "{out}"],
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def all_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_BAR_AFTER_S", 0.0)
    monkeypatch.setattr(progress, "_LINE_AFTER_S", 0.0)


def line(name: str, run: Path, out: Path) -> list[str]:
    return [word.format(run=run, out=out) for word in LONG[name]]


@pytest.mark.usefixtures("all_is_long")
@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("extra", [[], ["--json"]], ids=["text", "json"])
def test_a_bar_on_a_terminal(
    name: str,
    extra: list[str],
    run: Path,
    tmp_path: Path,
    holdfast_cli: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = Terminal()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stream)
        done = holdfast_cli(*line(name, run, tmp_path / "out"), *extra)
    assert done.status == 0
    last = stream.getvalue().rstrip().rsplit("\r", 1)[-1]
    assert "/runs/mnist  [" in last
    assert "100%" in last
    assert "#" not in done.out, "results are not mixed with it"


@pytest.mark.usefixtures("all_is_long")
@pytest.mark.parametrize("name", LONG)
def test_nothing_elsewhere(name: str, run: Path, tmp_path: Path, holdfast_cli: Command) -> None:
    done = holdfast_cli(*line(name, run, tmp_path / "out"))
    assert (done.status, done.err) == (0, "")
