"""Long work shows a bar on a terminal and one line in a log; short work shows nothing."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import threading
from typing import Any

import click
import numpy as np
import pytest

import holdfast
from holdfast.manager import progress
from holdfast.manager.progress import Meter, Work, current_work, working
from holdfast.run.console import Console
from holdfast.stores.memory import MemoryStore
from tests.support.terminal import on_a_terminal


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def last(self) -> str:
        """What a person sees now."""
        return click.unstyle(self.getvalue()).rstrip("\n").rsplit("\r", 1)[-1].strip()


class Gone(Terminal):
    """A terminal that was closed."""

    def write(self, text: str) -> int:
        raise OSError("gone")


@pytest.fixture
def clock() -> Clock:
    return Clock()


# -- a log --------------------------------------------------------------------


def log_of(clock: Clock, seconds: float) -> tuple[list[str], str]:
    """(lines that were said, what was written to the stream) of work of so many seconds."""
    said: list[str] = []
    stream = io.StringIO()
    with working("saving", "saved", said.append, stream=stream, clock=clock) as work:
        work.begin(10**9)
        work.done_nbytes += 10**9
        clock.now_s += seconds
        assert not [t for t in threading.enumerate() if t.name == "holdfast-progress"]
    return said, stream.getvalue()


def test_one_line_of_what_took_long(clock: Clock) -> None:
    assert log_of(clock, 10.0) == (["saved: 1.00 GB in 10.0 s (100 MB/s)"], "")


def test_nothing_of_what_did_not(clock: Clock) -> None:
    assert log_of(clock, 5.0) == ([], "")


def test_no_line_after_an_error(clock: Clock) -> None:
    said: list[str] = []
    with pytest.raises(OSError), working("a", "b", said.append, stream=io.StringIO(), clock=clock):
        clock.now_s += 10
        raise OSError
    assert said == []


def test_a_closed_stream_is_no_terminal(clock: Clock) -> None:
    stream = Terminal()
    stream.close()
    said: list[str] = []
    with working("a", "b", said.append, stream=stream, clock=clock):
        pass
    assert said == []


# -- a terminal ---------------------------------------------------------------


def test_a_bar_after_a_second(clock: Clock) -> None:
    stream, work = Terminal(), Work()
    meter = Meter("runs/gpt: saving step 7", work, stream, clock)
    clock.now_s += 0.5
    work.begin(2_000_000_000)
    work.done_nbytes = 500_000_000
    meter.tick()
    assert stream.getvalue() == ""
    clock.now_s += 0.5
    meter.tick()
    assert re.fullmatch(
        r"runs/gpt: saving step 7  \[#+-+\] +25%.* 500 MB of 2\.00 GB", stream.last()
    )
    work.done_nbytes = 2_000_000_000
    meter.close()
    assert "100%" in stream.last()
    assert stream.getvalue().endswith("\n"), "what is printed next has a line of its own"


def test_no_bar_of_what_was_short(clock: Clock) -> None:
    stream, work = Terminal(), Work(5, 10)
    meter = Meter("saving", work, stream, clock)
    clock.now_s += 0.9
    meter.tick()
    meter.close()
    assert stream.getvalue() == ""


def test_no_bar_before_it_is_known_how_long_it_is(clock: Clock) -> None:
    stream, work = Terminal(), Work()
    meter = Meter("saving", work, stream, clock)
    clock.now_s += 9
    meter.tick()
    assert stream.getvalue() == ""


def test_work_that_becomes_longer_or_begins_again(clock: Clock) -> None:
    stream, work = Terminal(), Work(10, 10)
    meter = Meter("restoring", work, stream, clock)
    clock.now_s += 2
    meter.tick()
    assert "100%" in stream.last()
    work.extend(30)
    work.done_nbytes = 20
    meter.tick()
    assert "50%" in stream.last()
    assert "20 B of 40 B" in stream.last()
    work.begin(40)
    meter.tick()
    assert "50%" in stream.last(), "it does not go back"
    work.done_nbytes = 30
    meter.tick()
    assert "75%" in stream.last()


def test_a_bar_fits_into_80_columns(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    stream, work = Terminal(), Work(0, 900_000_000)
    meter = Meter(f"{'/long' * 20}: saving step 41,200", work, stream, clock)
    clock.now_s += 3600
    for done in range(0, 900_000_001, 100_000_000):
        work.done_nbytes = done
        meter.tick()
        assert "long: saving step 41,200  [" in stream.last()
        assert len(stream.last()) <= 80


def test_what_was_known_from_the_start_is_not_extended() -> None:
    work = Work()
    work.extend(5)
    work.begin(10)
    work.extend(5)
    assert work.total_nbytes == 10


def test_a_terminal_that_is_gone_fails_no_work(clock: Clock) -> None:
    work = Work(5, 10)
    meter = Meter("saving", work, Gone(), clock)
    clock.now_s += 2
    meter.tick()
    meter.tick()
    meter.close()


def test_the_bar_is_drawn_while_the_work_goes_on(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = threading.Event()

    class Watched(Terminal):
        def flush(self) -> None:
            if "40%" in self.getvalue():
                drawn.set()

    monkeypatch.setattr(progress, "_REDRAW_S", 0.001)
    said: list[str] = []
    with working("saving", "saved", said.append, stream=Watched(), clock=clock) as work:
        work.begin(10)
        work.done_nbytes = 4
        clock.now_s += 10
        assert drawn.wait(60)
    assert said == [], "the bar has said it"
    assert not [t for t in threading.enumerate() if t.name == "holdfast-progress"]


# -- what counts --------------------------------------------------------------


def test_nobody_looks() -> None:
    assert current_work() == Work()
    assert current_work() is not current_work()


def test_saves_and_restores_count_their_bytes() -> None:
    state = {"x": np.arange(3_000_000.0), "y": np.arange(10), "s": "text"}
    store = MemoryStore()
    stream, said = io.StringIO(), list[str]()
    with holdfast.CheckpointManager("memory://counted", store=store) as ckpts:
        with working("", "", said.append, stream=stream) as work:
            ckpts.save(1, state, block=True)
        assert work.done_nbytes == work.total_nbytes >= 24_000_000
        with working("", "", said.append, stream=stream) as work:
            ckpts.restore()
        assert work.done_nbytes == work.total_nbytes >= 24_000_000
        saved = work.done_nbytes
        ckpts.restore()
        assert work.done_nbytes == saved, "counted only inside"


# -- a run --------------------------------------------------------------------

TRAIN = """
import sys
import holdfast
from holdfast.manager import progress

progress._BAR_AFTER_S = progress._LINE_AFTER_S = 0.0
with holdfast.Run("run", quiet="quiet" in sys.argv) as run:
    box = run.box(x=bytes(3_000_000))
    for step in run.range(int(sys.argv[1])):
        pass
"""


def trained(folder: Any, *words: str, terminal: bool = False) -> str:
    """What a job writes to stderr."""
    command = [sys.executable, "-c", TRAIN, *words]
    if not terminal:
        done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        return done.stderr
    return on_a_terminal(command, cwd=folder)


def test_a_run_in_a_log(tmp_path: Any) -> None:
    rate = r"3\.\d\d MB in \S+ \w+ \(\S+ \wB/s\)"
    assert re.search(rf"^run: saved step 3: {rate}$", trained(tmp_path, "3"), re.MULTILINE)
    assert re.search(rf"^run: restored: {rate}$", trained(tmp_path, "5"), re.MULTILINE)


def test_a_run_on_a_terminal(tmp_path: Any) -> None:
    said = trained(tmp_path, "3", terminal=True)
    assert re.search(r"run: saving step 3 .*100%.*3\.\d\d MB of 3\.\d\d MB", said)
    assert "saved step 3" not in said
    assert re.search(r"run: restoring .*100%", trained(tmp_path, "5", terminal=True))


@pytest.mark.parametrize("terminal", [False, True])
def test_a_quiet_run(tmp_path: Any, terminal: bool) -> None:
    for steps in ("3", "5"):
        assert trained(tmp_path, steps, "quiet", terminal=terminal) == ""


def test_the_label_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "_BAR_AFTER_S", 0.0)
    with Console().working("runs/\x1b[31m: saving", "saved"):
        current_work().extend(10)
    assert "runs/\\x1b[31m: saving" in stream.getvalue()
