"""Work in a process of its own, with its memory watched from outside.

From outside, since a sampling thread inside would not run while a library holds the GIL,
which is when memory grows.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

# A server that has imported everything and has started no threads of torch's: its children
# start in milliseconds, each as clean as a new process. (The first optimizer of a process
# imports torch._dynamo, which takes a second.)
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["bench.cases", "torch._dynamo"])

_SAMPLE_S = 0.001


class Marks:
    """In the child: tells the watcher where a part begins and ends."""

    def __init__(self, watcher: Connection) -> None:
        self._watcher = watcher

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The memory of what is done inside is recorded under `name`."""
        _give_back_free_memory()
        self._watcher.send(("begin", name))
        self._watcher.recv()  # the watcher has looked
        try:
            yield
        finally:
            self._watcher.send(("end", name))
            self._watcher.recv()


class Memory:
    """What a process held while a part ran, in bytes."""

    def __init__(self, before: int) -> None:
        self.before = before
        self.peak = before

    @property
    def extra(self) -> int:
        return self.peak - self.before


@contextmanager
def watching_here() -> Iterator[Memory]:
    """What this process takes inside, sampled by a thread: good enough for what lasts long."""
    _give_back_free_memory()
    pid, memory, ended = os.getpid(), Memory(held_by(os.getpid())), threading.Event()

    def sample() -> None:
        while not ended.wait(_SAMPLE_S):
            memory.peak = max(memory.peak, held_by(pid))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield memory
    finally:
        ended.set()
        thread.join()


def apart(work: Callable[..., T], *arguments: Any) -> T:
    """`work(*arguments)` in a process of its own. What it raises is raised here."""
    return watched(_unwatched, work, *arguments)[0]


def watched(work: Callable[..., T], *arguments: Any) -> tuple[T, dict[str, Memory]]:
    """`work(marks, *arguments)` in a process of its own, and the memory of its parts."""
    here, there = _processes.Pipe()
    child = _processes.Process(target=_child, args=(there, work, arguments))
    child.start()
    there.close()
    parts: dict[str, Memory] = {}
    current: Memory | None = None
    try:
        while True:
            if current is not None:
                while not here.poll(_SAMPLE_S):
                    current.peak = max(current.peak, held_by(child.pid))
            kind, value = here.recv()
            if kind == "begin":
                current = parts[value] = Memory(held_by(child.pid))
                here.send(None)
            elif kind == "end":
                current = None
                here.send(None)
            elif kind == "done":
                return value, parts
            else:
                raise value
    except EOFError:
        child.join()
        raise RuntimeError(
            f"the process for {work.__name__} died with status {child.exitcode}"
            " (-9: it was killed, most likely for its memory)"
        ) from None
    finally:
        child.join()
        here.close()


def held_by(pid: int | None) -> int:
    """Bytes of memory that a process alone accounts for: anonymous and shared memory.

    Not the pages of mapped files, which the page cache holds for everyone.
    """
    held = 0
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(("RssAnon:", "RssShmem:")):
            held += int(line.split()[1]) * 1024
    return held


def _give_back_free_memory() -> None:
    """Else what was freed before hides what is taken next."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _unwatched(marks: Marks, work: Callable[..., T], *arguments: Any) -> T:
    return work(*arguments)


def _child(watcher: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        answer = ("done", work(Marks(watcher), *arguments))
    except Exception as error:  # noqa: BLE001 - raised again by the watcher
        error.add_note(f"in the process for {work.__name__}")
        answer = ("failed", error)
    watcher.send(answer)
