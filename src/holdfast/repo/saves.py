"""Saves on their way, and the packs that they write."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from holdfast.core.records import Pack
from holdfast.stores.base import NewObject


@dataclass
class Save:
    """Packs of a checkpoint that is not committed yet; what any change of the list has
    written for its entry."""

    nonce: str
    ordinal: int
    named: int = 0
    """Packs that were given a name."""
    written: dict[str, Pack] = field(default_factory=dict[str, Pack])
    copied: set[str] = field(default_factory=set[str])
    """Names of packs that it copies from another run, where they were named."""
    manifest: str = ""
    """Id of its manifest, once that is written."""
    own: Collection[int] = ()
    """Of its leaves those that are no part of a leaf of all ranks."""
    marks: Mapping[str, str] = field(default_factory=dict[str, str])
    """See `records.Fragment`."""
    entry: int | None = None
    """Number of the log entry that was sent for it; its fate may be unknown."""

    def holds(self, name: str) -> bool:
        """Whether the pack or segment of this name is, or may be, written for it."""
        return self.nonce in name or name in self.copied


@dataclass(frozen=True)
class NewPack:
    """A pack that is written block by block. Raises StoreUnavailable, StoreFull."""

    name: str
    _object: NewObject
    _finish: Callable[[int, bytes], Pack]

    def write(self, offset: int, data: memoryview) -> None:
        """See `stores.base.NewObject.write`."""
        self._object.write(offset, data)

    def publish(self, nbytes: int, head: bytes) -> Pack:
        """Make it durable: `nbytes` in all, of which the first are `head`."""
        return self._finish(nbytes, head)

    def discard(self) -> None:
        """Let go of it, published or not."""
        self._object.discard()
