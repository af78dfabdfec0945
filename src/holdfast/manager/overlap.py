"""Leaves that a save reads in place while training goes on.

What may be read in place is what does not change before a *barrier*: the parameters and the
state of an optimizer stay as they are until its next step. The barrier, `Overlap.drain`, is
called in front of that step: it lets a read that is in progress end, and copies what has not
been read yet. What lies on a device is copied by the device: the barrier only begins that,
and holds back what the program asks the device to do next.

Nothing here believes that this suffices. A leaf that was changed in front of the barrier is
*torn*: half of what was read may be new. It shows in its version, which every change in
place advances, or in a sample of its bytes, for changes that bypass versions; then the save
fails, and that leaf is copied at once from then on.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate

from holdfast.core.adapters import LeafSource
from holdfast.core.copying import copy_bytes, copy_ranges
from holdfast.core.transfers import Transfer, Transport, transport_of, wait_for
from holdfast.core.types import MiB
from holdfast.errors import HoldfastError, SaveFailed, TornRead

# A barrier waits for the read in progress, whose thread may have next to no processor time.
_READ_BYTES = 1 * MiB

Memory = Callable[[int, Transport | None], memoryview]
"""Room for so many bytes; for copies that a device makes, if there is a transport."""


@dataclass
class LiveLeaf:
    """A leaf that is still read from the live object, from its first byte to its last."""

    path: str
    source: LeafSource
    mark: object = field(init=False)
    read_nbytes: int = 0
    """What comes before is not needed any more."""
    rest: memoryview | None = field(default=None, repr=False)
    """A copy of what comes after, made by the barrier. On its way until all `Overlap`'s
    transfers are over."""

    def __post_init__(self) -> None:
        self.mark = self.source.mark()

    def changed(self) -> bool:
        """Whether the live object is not what it was when the save began."""
        return self.source.mark() != self.mark


def _interrupted() -> SaveFailed:
    return SaveFailed("what it had not read yet was being copied when a signal's handler raised")


class Overlap:
    """The leaves of one save that are read in place. One thread reads, any may drain."""

    def __init__(
        self,
        leaves: Iterable[LiveLeaf],
        memory: Memory,
        *,
        reached: Sequence[Transfer] = (),
        failed: SaveFailed | None = None,
    ) -> None:
        """`memory` gives room for what a barrier has to copy. `reached` is over when
        devices have come to where the save began. `failed`: why this save is none."""
        self._leaves = list(leaves)
        self._memory = memory
        # Plain locks, for a signal's handler may break into a barrier. Who holds `_next` has
        # `_lock` next: a barrier waits for one read, not for all that follow.
        self._next = threading.Lock()
        self._lock = threading.Lock()
        """Held while a leaf is read in place, and by a barrier."""
        self._begun = False
        """A barrier has begun to copy what was not read yet: the last one, if it has not ended
        though nobody holds the lock, for then a signal's handler has broken into it."""
        self._drained = failed is not None or not self._leaves
        self._unread = len(self._leaves)
        """Leaves of which the last byte was not read yet."""
        self._reached = tuple(reached)
        self._transfers: tuple[Transfer, ...] = ()
        """What the barrier has begun. May be over."""
        self._error: BaseException | None = failed
        self.copied_nbytes = 0
        """Bytes that a barrier had to copy."""
        self.stall_s = 0.0
        """Seconds for which barriers held up the training."""

    def reach(self) -> None:
        """Block until what was there when the save began is in the devices' memory, before
        anything is read. Raises SaveFailed.

        Nobody waits with a read in progress, which a barrier would wait for: the queue of a
        device may be long.
        """
        if self._error is not None:
            raise self._error
        wait_for(self._reached)

    def read(self, leaf: LiveLeaf, offset: int, into: Iterable[memoryview]) -> None:
        """Fill `into` with a range of the leaf; ranges come in their order. Raises TornRead,
        SaveFailed."""
        for piece in into:
            for start in range(0, piece.nbytes, _READ_BYTES):
                part = piece[start : start + _READ_BYTES]
                if not self._read_in_place(leaf, offset, part):
                    assert leaf.rest is not None
                    wait_for(self._transfers)
                    at = offset - leaf.read_nbytes
                    copy_bytes(part, leaf.rest[at : at + part.nbytes])
                offset += part.nbytes

    def _read_in_place(self, leaf: LiveLeaf, offset: int, into: memoryview) -> bool:
        """False: a barrier was there before, and there is a copy."""
        with self._next:
            self._lock.acquire()
        try:
            if self._error is not None:
                raise self._error
            if self._begun and not self._drained:
                raise _interrupted()
            if leaf.rest is not None:
                return False
            leaf.source.copy_range(offset, into)
            end = offset + into.nbytes
            if end == leaf.source.nbytes:
                self._check([leaf])  # a barrier in front of this looks at it, too
            leaf.read_nbytes = end
            if end == leaf.source.nbytes:
                self._unread -= 1
            return True
        finally:
            self._lock.release()

    @property
    def waits(self) -> bool:
        """Whether a barrier, if it came now, would have to copy something."""
        return self._unread > 0 and not self._drained

    def start_again(self) -> bool:
        """All leaves are going to be read once more. False after a barrier: what was read
        before it is gone."""
        with self._lock:
            if self._drained and self._leaves:
                return False
            self._unread = len(self._leaves)
            for leaf in self._leaves:
                leaf.read_nbytes = 0
            return True

    def drain(self) -> None:
        """Return when the calling thread may change the live objects, or ask devices to.
        The save fails, and this raises nothing but what a signal's handler does."""
        if not self._drained:
            self._drain()
        # Each time, and not only by the first: this thread's queue may be another one.
        for transfer in self._transfers:
            try:
                transfer.hold_back()
            except SaveFailed as error:
                self._error = error

    def _drain(self) -> None:
        start = time.perf_counter()
        with self._next, self._lock:
            if self._drained:
                return
            if self._begun:
                self._error = _interrupted()  # and nothing is copied over what is half done
            else:
                self._begun = True
                try:
                    self._copy_rest()
                except (HoldfastError, MemoryError, RuntimeError, ValueError) as error:
                    self._error = error  # what else there is, is a handler's
                finally:
                    self.stall_s += time.perf_counter() - start
            self._drained = True

    def _copy_rest(self) -> None:
        left = [leaf for leaf in self._leaves if leaf.read_nbytes < leaf.source.nbytes]
        self._check(left)
        by_transport: defaultdict[Transport | None, list[LiveLeaf]] = defaultdict(list)
        for leaf in left:
            by_transport[transport_of(type(leaf.source))].append(leaf)
        for transport, leaves in by_transport.items():  # devices copy while the host does
            if transport is None:
                continue
            offsets = [leaf.read_nbytes for leaf in leaves]
            rests = self._rests(leaves, transport)
            transfer = transport.begin([leaf.source for leaf in leaves], offsets, rests)
            self._transfers = (*self._transfers, transfer)
            self._keep(leaves, rests)
        on_host = by_transport.get(None, [])
        rests = self._rests(on_host, None)
        copy_ranges(
            (leaf.source, leaf.read_nbytes, rest) for leaf, rest in zip(on_host, rests, strict=True)
        )
        self._keep(on_host, rests)

    def _rests(self, leaves: Sequence[LiveLeaf], transport: Transport | None) -> list[memoryview]:
        """Memory for what is left of each leaf."""
        sizes = [leaf.source.nbytes - leaf.read_nbytes for leaf in leaves]
        memory = self._memory(sum(sizes), transport)
        ends = list(accumulate(sizes))
        return [memory[end - size : end] for end, size in zip(ends, sizes, strict=True)]

    def _keep(self, leaves: Sequence[LiveLeaf], rests: Sequence[memoryview]) -> None:
        for leaf, rest in zip(leaves, rests, strict=True):
            leaf.rest = rest
            self.copied_nbytes += rest.nbytes

    def _check(self, leaves: Iterable[LiveLeaf]) -> None:
        if any(leaf.changed() for leaf in leaves):
            raise TornRead([leaf.path for leaf in self._leaves if leaf.changed()])

    def close(self) -> None:
        """The save is over: nothing is read any more, and nothing is on its way into its
        memory. Blocks until then."""
        with self._lock:
            self._drained = True
            self._leaves.clear()  # whoever dropped the model is not to pay for its memory
        with suppress(SaveFailed):  # then they are over, too
            wait_for(self._transfers)
        self._transfers = ()
