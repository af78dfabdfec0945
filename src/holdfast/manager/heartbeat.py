"""Signs of life for `holdfast run`: what this process does, in a small file of its own.

The supervisor makes a folder and names it in `HOLDFAST_SUPERVISOR`. A process that saves or
trains writes one record there and overwrites it as it goes on; the supervisor reads it
whenever it likes. Nothing is synced to disk: the file means something to the supervisor of this
moment only, and a record that is read half-written is read again a moment later. Without that
variable every function here does nothing.

In the same folder is the file into which a process writes where its threads are, when the
supervisor asks for it by a signal.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

from holdfast.core.ticking import ticking

VARIABLE = "HOLDFAST_SUPERVISOR"
"""Holds the folder. Set by `holdfast run` for the command that it starts."""
RECORD_BYTES = 4096
EVERY_S = 0.2
"""Loops may have a hundred thousand items a second; a write takes microseconds."""
FOLLOW_S = 0.5
_ADDRESS_BYTES = 3400  # the record has a fixed size
_NOTICE_CHARACTERS = 40

# A real-time signal: no program is stopped, stepped or preempted by one, and 34 to 36 are what
# threading libraries and systemd take first. It is sent only to processes that catch it.
STACKS_SIGNAL = signal.SIGRTMIN + 7 if hasattr(signal, "SIGRTMIN") else None

LOOP_PHASES = frozenset({"restoring", "training", "saving", "guard"})
"""In which the next beat is expected within the time of a step."""


class Beat(msgspec.Struct):
    """What a process told last."""

    pid: int
    began_s: float = 0.0
    """When the process began to tell, Unix time."""
    count: int = 0
    """Goes up with each sign of life."""
    address: str = ""
    """Of the run that it was about; of a folder its whole path."""
    phase: str = "starting"
    """"starting", "restoring", "training", "saving", "guard" or "ended"."""
    step: int = 0
    """Completed steps."""
    checkpoint: str = ""
    """The id of the newest checkpoint that was committed or gone on from."""
    checkpoint_step: int | None = None
    left: int = 0
    """The status with which it ends because it was asked to stop."""
    left_s: float = 0.0
    """When it said so, Unix time."""
    notice: str = ""
    """Whose notice asked for it, such as "AWS spot"; "" for a signal."""


class _Heart:
    """Writes the record of this process."""

    def __init__(self, folder: str) -> None:
        self._lock = threading.Lock()
        self._beat = Beat(os.getpid(), time.time())
        self._open: set[str] = set()
        self._latest = ""
        """The address in the last call, as it was given."""
        self._due_s = 0.0
        self._file: int | None = os.open(
            Path(folder, f"{os.getpid()}.beat"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )

    def tell(self, *, now: bool, **changes: Any) -> None:
        with self._lock:
            beat = self._beat
            for name, value in changes.items():
                setattr(beat, name, value)
            beat.count += 1
            clock = time.monotonic()
            if self._file is None or not (now or clock >= self._due_s):
                return
            self._due_s = clock + EVERY_S
            data = msgspec.json.encode(beat).ljust(RECORD_BYTES)
            try:
                os.pwrite(self._file, data, 0)
            except OSError:  # the disk is full, say; a job must not end of that
                self.close()

    def beat(self, address: str, phase: str, step: int) -> None:
        beat = self._beat
        before = self._latest, beat.phase
        if before == (address, phase) and time.monotonic() < self._due_s:
            beat.step = step
            beat.count += 1  # written with the next one
            return
        self._latest = address
        self._open.add(address)
        changed = before != (address, phase)
        self.tell(now=changed, address=_whole(address), phase=phase, step=step, left=0, notice="")

    def checkpoint(self, address: str, step: int, id: str) -> None:
        self._latest = address
        self._open.add(address)
        phase = "training" if self._beat.phase == "starting" else self._beat.phase
        self.tell(
            now=True, address=_whole(address), phase=phase, checkpoint=id, checkpoint_step=step
        )

    def ended(self, address: str) -> None:
        self._open.discard(address)
        if not self._open:
            self.tell(now=True, phase="ended")

    def leaving(self, status: int, notice: str) -> None:
        self._latest = ""  # if it goes on after all, its next beat is a change
        self.tell(now=True, left=status, left_s=time.time(), notice=notice[:_NOTICE_CHARACTERS])

    def alive(self) -> None:
        self.tell(now=False)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


_heart: _Heart | None = None


def beat(address: str, phase: str, step: int) -> None:
    """The loop of the run is at a boundary, or begins something that may take long."""
    if _heart is not None:
        _heart.beat(address, phase, step)


def checkpoint(address: str, step: int, id: str) -> None:
    """This checkpoint is committed, or was restored and is gone on from. From any thread."""
    if _heart is not None:
        _heart.checkpoint(address, step, id)


def alive() -> None:
    """Something is done that is not of a loop: a result of a call. From any thread."""
    if _heart is not None:
        _heart.alive()


def ended(address: str) -> None:
    """The run is closed: no more beats of it."""
    if _heart is not None:
        _heart.ended(address)


def leaving(status: int, notice: str = "") -> None:
    """This process ends with `status`, since it was asked to stop: by the notice of `notice`, or
    by a signal. What started it may end with another, as `torchrun` does."""
    if _heart is not None:
        _heart.leaving(status, notice)


@contextlib.contextmanager
def following(done: Callable[[], int]) -> Generator[None, None, None]:
    """While the block runs, beat whenever `done` has changed: long input and output that makes
    progress is life, and such that makes none is not."""
    heart = _heart
    if heart is None:
        yield
        return
    before = done()

    def follow() -> None:
        nonlocal before
        if (now := done()) != before:
            before = now
            heart.alive()

    with ticking(follow, FOLLOW_S, "holdfast-heartbeat"):
        yield


def stacks_path(folder: str | os.PathLike[str], pid: int) -> Path:
    """Where process `pid`, and the children that are forked from it, dump their stacks."""
    return Path(folder, f"{pid}.stacks")


def _start(folder: str) -> None:
    global _heart
    try:
        heart = _Heart(folder)
        _dump_when_asked(folder)
    except OSError:  # the supervisor is gone, and its folder with it
        return
    _heart = heart
    os.register_at_fork(after_in_child=_stop)


def _dump_when_asked(folder: str) -> None:
    """Loaders' workers and other forked children inherit the handler and the file."""
    if STACKS_SIGNAL is None or signal.getsignal(STACKS_SIGNAL) is not signal.SIG_DFL:
        return
    # Unbuffered, and kept open for as long as the process lives. Forked children append.
    file = os.open(
        stacks_path(folder, os.getpid()),
        os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC,
        0o600,
    )
    faulthandler.register(STACKS_SIGNAL, file=file, all_threads=True, chain=False)


def _stop() -> None:
    """A forked child is not the loop, whatever it goes on to do."""
    global _heart
    _heart = None


@lru_cache
def _whole(address: str) -> str:
    """What names the run in another process, too."""
    whole = address if "://" in address else os.path.abspath(address)
    # JSON may take six bytes for one character. Nobody has a path that long.
    return whole if len(msgspec.json.encode(whole)) <= _ADDRESS_BYTES else whole[:500]


if sys.platform != "win32" and (_folder := os.environ.get(VARIABLE)):
    _start(_folder)
