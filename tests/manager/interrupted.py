"""A program that is interrupted at one instruction after the other, as by a signal's handler.

    python -m tests.manager.interrupted FOLDER WHAT FIRST STRIDE

Handlers run in the main thread where CPython looks for signals: after a call into C, at the
begin of a function, when a loop goes round. The n-th of these places in what is called here
raises, for n = FIRST, FIRST + STRIDE and so on up to the last. After each the next save must
work, and what is stored be whole. What hangs is ended, with its traceback.

    python -m tests.manager.interrupted FOLDER alarms COUNT

does the same with real alarms at any moment.
"""

from __future__ import annotations

import dis
import faulthandler
import importlib.metadata
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

import holdfast
from holdfast.manager import CheckpointManager
from holdfast.manager.overlap import Overlap
from holdfast.manager.pending import Pending
from holdfast.manager.saver import Saver

_HANGS_S = 40.0
_LOOKED = {
    dis.opmap[name]
    for name in ("CALL", "CALL_KW", "CALL_FUNCTION_EX", "JUMP_BACKWARD", "RESUME")
    if name in dis.opmap
}


class Alarm(Exception):
    """What the handler raises."""


class Interrupting:
    """Traces the calling thread, and raises at the n-th place."""

    def __init__(self, n: int) -> None:
        self._left = n
        self._last: dict[int, int | None] = {}
        self.raised = False
        self.where = ""

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "call":
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            if frame.f_back is not None:
                self._last[id(frame.f_back)] = None  # nobody looks after a call of Python code
            self._last[id(frame)] = None
        elif event == "opcode":
            last = self._last.get(id(frame))
            self._last[id(frame)] = frame.f_code.co_code[frame.f_lasti]
            if last in _LOOKED:
                self._left -= 1
                if self._left <= 0 and not _swallows(frame):
                    sys.settrace(None)
                    self.raised = True
                    self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                    raise Alarm
        return self


def _swallows(frame: FrameType | None) -> bool:
    """Whether it is the standard library that lets nobody see what is raised here: it asks what
    is installed, and takes any error there for a folder that cannot be read."""
    while frame is not None and frame.f_code.co_filename != importlib.metadata.__file__:
        frame = frame.f_back
    return frame is not None


def interrupted(n: int, call: Callable[[], object]) -> bool:
    """Whether there was an n-th place. Fails if what was raised there did not come out, but for
    what Python itself lets nobody catch: in finalizers, and in what weak references call."""
    trace = Interrupting(n)
    lost: list[object] = []
    before, sys.unraisablehook = sys.unraisablehook, lambda told: lost.append(told.exc_type)
    try:
        sys.settrace(trace)
        call()
    except Alarm:
        pass
    else:
        sys.settrace(None)
        swallowed = trace.raised and Alarm not in lost
        assert not swallowed, f"an exception of a handler was swallowed: {trace.where}"
    finally:
        sys.settrace(None)
        sys.unraisablehook = before
    return trace.raised


class Program:
    """Saves an array that it changes, a copy of it, and its content as a number."""

    def __init__(self, folder: Path, *, drains: bool = True) -> None:
        self.drains = drains
        self.folder = folder
        self.live = np.zeros(40_000, np.int64)
        self.count = 0
        self.manager = self.open()

    def open(self) -> CheckpointManager:
        # Saves may fail: this is about what comes after.
        return CheckpointManager(self.folder, keep="last=2", max_save_failures=1_000_000)

    def train(self) -> None:
        if self.drains:
            self.manager.drain()
        self.count += 1
        self.live[:] = self.count

    def save(self, *, block: bool = False) -> Pending:
        state = {"live": self.live, "copy": self.live.copy(), "count": self.count}
        return self.manager.save(
            self.count, state, in_place=lambda source, path: path == "live", block=block
        )

    def check(self) -> None:
        """The next save works, at once, and what is stored is whole."""
        start = time.perf_counter()
        self.train()
        info = self.save().result()
        assert time.perf_counter() - start < 10
        assert info.step == self.count
        for each in self.manager.checkpoints():
            found = self.manager.load(each.id)
            assert (found["live"] == found["count"]).all()
            assert (found["copy"] == found["count"]).all()


class Held:
    """Saves that wait while `now`, before they read anything: one that is done before it is
    called for would leave few places. Who waits for a save lets it go on once it is hurried."""

    def __init__(self, what: str) -> None:
        self.now = False  # no lock, no event: a handler may break into its end
        held, reach, hurry = self, Overlap.reach, Saver.hurry

        def reached(self: Overlap) -> None:
            while held.now:
                time.sleep(0.001)
            reach(self)

        def hurried(self: Saver) -> None:
            hurry(self)
            held.now = False

        Overlap.reach = reached
        if what != "drain":
            Saver.hurry = hurried


def at_each_place(folder: Path, what: str, first: int, stride: int) -> int:
    held = Held(what) if what in ("drain", "result", "wait", "close") else None
    program = Program(folder, drains=what != "block")  # who waits for a save has no barrier
    program.manager.acquire()
    n = first
    while True:
        pending = None
        if held:
            program.manager.wait()  # else the next save hurries the last one
            held.now = True
            pending = program.save()
        if what == "first":
            program.manager.close()
            program.manager = program.open()
        calls: dict[str, Callable[[], object]] = {
            "save": program.save,
            "block": lambda: program.save(block=True),
            "drain": program.manager.drain,
            "result": pending.result if pending else int,
            "wait": program.manager.wait,
            "close": program.manager.close,
            "first": program.save,
        }
        found = interrupted(n, calls[what])
        if held:
            held.now = False
        if what == "close":
            program.manager.close()
            program.manager = program.open()
        program.check()
        if not found:
            program.manager.close()
            return n
        n += stride


def of_a_run(folder: Path, first: int, stride: int) -> int:
    """A `Run` from its opening to its end, which goes on from the one before."""
    steps, n = 0, first
    opened: list[holdfast.Run] = []

    def train() -> None:
        publish = f"latest:{folder}-export"
        with holdfast.Run(folder, every=2, keep="last=2", publish=publish) as run:
            opened.append(run)
            box = run.box(total=0, values=np.zeros(20_000))
            for step in run.range(steps):
                box.total += 1
                box.values[:] = box.total
                run.log(loss=float(step))
            assert box.total == steps
            assert (box.values == steps).all()

    train()  # Python's own imports leave locks behind that are broken into
    while True:
        steps += 5
        found = interrupted(n, train)
        for run in opened:  # what was interrupted at its end may not be closed yet
            run.close()
        opened.clear()
        train()
        if not found:
            return n
        n += stride


def with_alarms(folder: Path, count: int) -> int:
    rung = caught = 0

    def ring(number: int, frame: FrameType | None) -> None:
        nonlocal rung
        rung += 1
        raise Alarm

    signal.signal(signal.SIGALRM, ring)
    program = Program(folder)
    program.manager.acquire()
    for number in range(count):
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, 10 ** random.uniform(-4.3, -2))
                program.train()
                pending = program.save(block=number % 3 == 0)
                if number % 2:
                    pending.result()
                program.manager.wait()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except Alarm:
            caught += 1
    program.check()
    program.manager.close()
    # Python itself drops what is raised while it frees an object.
    assert rung - 3 <= caught <= rung
    return caught


if __name__ == "__main__":
    faulthandler.dump_traceback_later(_HANGS_S, exit=True)
    where, what, numbers = Path(sys.argv[1]), sys.argv[2], [int(each) for each in sys.argv[3:]]
    if what == "alarms":
        print(with_alarms(where, *numbers))
    elif what == "run":
        print(of_a_run(where, *numbers))
    else:
        print(at_each_place(where, what, *numbers))
