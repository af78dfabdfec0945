"""Leaves that a save reads in place while training goes on.

What may be read in place is what does not change before a *barrier*: the parameters and the
state of an optimizer stay as they are until its next step. The barrier, `Overlap.drain`, is
called in front of that step: it lets a read that is in progress end, and copies what has not
been read yet.

Nothing here believes that this suffices. A leaf that was changed in front of the barrier is
*torn*: half of what was read may be new. It shows in its version, which every change in
place advances, or in a sample of its bytes, for changes that bypass versions; then the save
fails, and that leaf is copied at once from then on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from holdfast.core.adapters import LeafSource
from holdfast.core.copying import copy_from
from holdfast.core.types import MiB
from holdfast.errors import SaveFailed, TornRead

# A barrier waits for the read in progress, whose thread may have next to no processor time.
_READ_BYTES = 1 * MiB


@dataclass
class LiveLeaf:
    """A leaf that is still read from the live object, from its first byte to its last."""

    path: str
    source: LeafSource
    mark: object = field(init=False)
    read_nbytes: int = 0
    """What comes before is not needed any more."""
    rest: memoryview | None = field(default=None, repr=False)
    """A copy of what comes after, made by the barrier."""

    def __post_init__(self) -> None:
        self.mark = self.source.mark()

    def changed(self) -> bool:
        """Whether the live object is not what it was when the save began."""
        return self.source.mark() != self.mark


class Overlap:
    """The leaves of one save that are read in place. One thread reads, any may drain."""

    def __init__(self, leaves: Iterable[LiveLeaf], memory: Callable[[int], memoryview]) -> None:
        """`memory` gives room for what a barrier has to copy."""
        self._leaves = list(leaves)
        self._memory = memory
        self._lock = threading.Condition()
        self._reading = False
        self._drained = not self._leaves
        self._error: BaseException | None = None
        self.copied_nbytes = 0
        """Bytes that a barrier had to copy."""
        self.stall_s = 0.0
        """Seconds for which barriers held up the training."""

    def read(self, leaf: LiveLeaf, offset: int, into: Iterable[memoryview]) -> None:
        """Fill `into` with a range of the leaf; ranges come in their order. Raises TornRead."""
        for piece in into:
            for start in range(0, piece.nbytes, _READ_BYTES):
                part = piece[start : start + _READ_BYTES]
                if not self._read_in_place(leaf, offset, part):
                    assert leaf.rest is not None
                    at = offset - leaf.read_nbytes
                    np.copyto(np.frombuffer(part, np.uint8), leaf.rest[at : at + part.nbytes])
                offset += part.nbytes

    def _read_in_place(self, leaf: LiveLeaf, offset: int, into: memoryview) -> bool:
        """False: a barrier was there before, and there is a copy."""
        with self._lock:
            if self._error is not None:
                raise self._error
            if leaf.rest is not None:
                return False
            self._reading = True
        try:
            leaf.source.copy_range(offset, into)
            end = offset + into.nbytes
            if end == leaf.source.nbytes:
                self._check([leaf])  # a barrier in front of this looks at it, too
            leaf.read_nbytes = end
            return True
        finally:
            with self._lock:
                self._reading = False
                self._lock.notify_all()

    def start_again(self) -> None:
        """All leaves are going to be read once more. Raises SaveFailed after a barrier:
        what was read before it is gone."""
        with self._lock:
            if self._drained and self._leaves:
                raise SaveFailed(
                    "the checkpoint that this save builds on was removed, and what they share "
                    "can no longer be read: training has gone on",
                    hint="The next save writes everything.",
                )
            for leaf in self._leaves:
                leaf.read_nbytes = 0

    def drain(self) -> None:
        """Return when the live objects may change. Never raises: the save fails instead."""
        if self._drained:
            return
        start = time.perf_counter()
        with self._lock:
            self._lock.wait_for(lambda: not self._reading)
            if self._drained:
                return
            try:
                self._copy_rest()
            except BaseException as error:
                self._error = error
                if not isinstance(error, Exception):
                    raise  # Ctrl-C
            finally:
                self._drained = True
                self.stall_s += time.perf_counter() - start

    def _copy_rest(self) -> None:
        left = [leaf for leaf in self._leaves if leaf.read_nbytes < leaf.source.nbytes]
        sizes = [leaf.source.nbytes - leaf.read_nbytes for leaf in left]
        memory = self._memory(sum(sizes))
        at = 0
        self._check(left)
        for leaf, size in zip(left, sizes, strict=True):
            rest = memory[at : at + size]
            copy_from(leaf.source, leaf.read_nbytes, rest)
            leaf.rest = rest
            at += size
        self.copied_nbytes += at

    def _check(self, leaves: Iterable[LiveLeaf]) -> None:
        if any(leaf.changed() for leaf in leaves):
            raise TornRead([leaf.path for leaf in self._leaves if leaf.changed()])

    def close(self) -> None:
        """The save is over: nothing is read any more."""
        with self._lock:
            self._drained = True
