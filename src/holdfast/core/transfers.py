"""Copies of leaves that a device makes by itself, while the host goes on.

The bytes of some sources lie in the memory of a device that works through a queue of its
own: what a program has asked for is done later. Their class has a `transport` besides the
verbs of `LeafSource`. Its `copy_range` is of what the device holds when it is called, so
whoever calls it first waits until the device has `reached` what the program has asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from holdfast.core.adapters import LeafSource
from holdfast.errors import SaveFailed


class Transfer(Protocol):
    """Something that devices do, and that is over at some time."""

    def wait(self) -> None:
        """Block until it is over. From any thread, any number of times. Raises SaveFailed
        if it has failed; then it is over, too."""
        ...

    def hold_back(self) -> None:
        """What the calling thread asks the devices to do from now on is done when this is
        over. Does not block. Raises SaveFailed."""
        ...


class Transport(Protocol):
    """What a class of sources has as its `transport` whose bytes lie on devices."""

    def memory(self, nbytes: int) -> memoryview:
        """Fresh memory to which copies are made while the host goes on; if there is none,
        memory to which they hold up the host. Raises MemoryError."""
        ...

    def reached(self, sources: Sequence[Any]) -> Transfer:
        """Over when the devices of `sources` have done what the calling thread has asked
        them to do so far. Raises SaveFailed."""
        ...

    def begin(
        self, sources: Sequence[Any], offsets: Sequence[int], into: Sequence[memoryview]
    ) -> Transfer:
        """Begin to fill each of `into`, which lie in `memory`, with the bytes of a source from
        its offset on: what the devices hold when they have done what the calling thread
        asked for. The sources, and the memory, are left alone until it is over.

        Raises SaveFailed, or StateError for a source that has lost its memory; then
        nothing is being copied.
        """
        ...


def transport_of(kind: type[LeafSource]) -> Transport | None:
    """That of a class of sources; None for those whose bytes lie in the host's memory."""
    return getattr(kind, "transport", None)


def wait_for(transfers: Iterable[Transfer]) -> None:
    """Block until every one is over. Raises SaveFailed if one has failed."""
    failed: SaveFailed | None = None
    for transfer in transfers:
        try:
            transfer.wait()
        except SaveFailed as error:
            failed = failed or error
    if failed is not None:
        raise failed
