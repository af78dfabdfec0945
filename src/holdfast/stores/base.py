"""What a store promises. Everything above this line relies on these words only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from holdfast.core.types import Buffer
from holdfast.errors import StoreError

# One path segment: no separators, no leading dot, nothing a shell, a URL or
# Windows would read in its own way. Names from a store are checked with it too.
_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")


class BadKey(StoreError):
    """A key that no store accepts."""


def check_key(key: str) -> str:
    """`key` itself if it is one or more safe segments joined by `/`.

    Raises BadKey for absolute names, `..`, empty segments, control characters.
    """
    if len(key) > 1024 or not all(_SEGMENT.fullmatch(part) for part in key.split("/")):
        raise BadKey(f"unsafe key {key!r}")
    return key


def check_prefix(prefix: str) -> str:
    """`prefix` itself if it can be listed: "" or safe segments that each end in `/`."""
    if prefix and not prefix.endswith("/"):
        raise BadKey(f"a prefix to list ends in '/': {prefix!r}")
    if prefix:
        check_key(prefix[:-1])
    return prefix


class ObjectInfo(NamedTuple):
    """One listed object."""

    key: str
    size_bytes: int
    md5: str = ""
    """The MD5 digest of its bytes in hexadecimal, if the store says it."""


class NewObject(Protocol):
    """An object that is being written block by block; nobody sees it before `publish`.

    All methods raise what `Store.put_new` raises, from any thread. Whoever made it calls
    `discard` in the end, published or not.
    """

    def write(self, offset: int, data: memoryview) -> None:
        """Write `data` from byte `offset` on; from several threads at once.

        Ranges do not overlap and leave no holes up to the end. Offsets are multiples of
        `BLOCK_ALIGNMENT`, and lengths too, but for the last range. Does not keep `data`.
        Quickest if its address is aligned in the same way.
        """
        ...

    def publish(self, nbytes: int) -> bool:
        """Make the object's first `nbytes` visible and durable; promises as `put_new`.

        Once, after every `write` has returned. False: something exists at its key.
        """
        ...

    def discard(self) -> None:
        """Let go of it; what was not published is gone. May be called twice."""
        ...


BLOCK_ALIGNMENT = 4096
"""Bytes: what direct I/O needs on every file system that has it."""


@runtime_checkable
class Store(Protocol):
    """Immutable objects under string keys.

    Every method may be called from any thread. Besides what each method names,
    all raise `StoreUnavailable` when the store does not answer, `BadKey` for
    unsafe keys, and `DamagedObject` for what only looks like an object or a folder
    of them (a symbolic link, a pipe). Objects are never changed once they exist, but by
    `append`.
    A caller never uses a key and the same key as a folder (`a` and `a/b`).
    """

    @property
    def address(self) -> str:
        """How people name this store, without secrets: `/data/runs`, `s3://b/p`."""
        ...

    @property
    def whole_bytes(self) -> int:
        """Objects of at most so many bytes are best given to `put_new` whole, several at
        once, and no larger ones made. 0: large ones are fine, and come in blocks."""
        ...

    @property
    def parallel(self) -> int:
        """How many threads that read large ranges, or put whole objects, are fastest."""
        ...

    def put_new(self, key: str, parts: Sequence[Buffer]) -> bool:
        """Write the concatenation of `parts` at `key` unless `key` exists.

        True: this call created it and it is durable (file and directories
        synced, or an acknowledged PUT). False: something exists at `key`, which
        may be this very content after a lost reply. Atomic against other
        writers and against a crash: no reader ever sees part of it. Does not
        keep `parts` after returning. After `StoreUnavailable` the outcome is
        unknown; after `StoredWrong`, which is one, this call created the object,
        and the store holds it with other bytes. Raises `StoreFull`, `StoreReadOnly`,
        `StoreUnfit`.
        """
        ...

    def create(self, key: str, *, at_most_bytes: int) -> NewObject:
        """Begin a large object whose bytes, at most so many, come in blocks.

        Nothing is visible at `key` until it is published.
        """
        ...

    def append(self, key: str, data: Buffer) -> None:
        """Add `data` to the end of `key`, which is created if it is absent.

        The one way to change an object, for histories that people read: one writer per
        key, nothing is durable before `settle`, and a crash may leave a part of `data`.
        Raises as `put_new`.
        """
        ...

    def get(self, key: str, *, max_bytes: int) -> bytes:
        """The whole object. Raises ObjectNotFound; DamagedObject if it is larger
        than `max_bytes` (nothing is allocated then)."""
        ...

    def read_into(self, key: str, offset: int, into: memoryview, *, shared: bool = False) -> None:
        """Fill `into` (bytes, writable) with the object's bytes from `offset` on.

        Raises ObjectNotFound; DamagedObject if the object ends earlier (also for
        an empty `into`) or `offset` is negative: offsets come from a manifest. What
        `into` holds after an error is undefined. `shared`: other processes of this machine
        are going to read the same, so it is worth to be in a cache of all.
        """
        ...

    def size(self, key: str) -> int:
        """Bytes in the object. Raises ObjectNotFound."""
        ...

    def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectInfo]:
        """Objects whose key starts with `prefix`: "" or segments that end in "/"; with
        `after`, a key, only those that sort behind it.

        In no promised order, and no snapshot: objects created or deleted meanwhile
        may or may not appear. Unsafe names and unfinished writes are left out.
        """
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; absent ones are fine. Removal need not be durable.

        An unsafe key stops it before anything is removed. After `StoreUnavailable`
        some are gone, perhaps all. Raises `StoreReadOnly`.
        """
        ...

    def settle(self, key: str) -> None:
        """Make the object that is visible at `key` durable, whoever wrote it.

        A commit that finds its own object after a lost reply calls this before
        it believes it. Raises ObjectNotFound.
        """
        ...

    def prepare_writing(self) -> None:
        """Check once that safe commits are possible here, creating the folder.

        Probes put-if-absent on a scratch key. Raises StoreUnfit or StoreReadOnly
        with the reason.
        """
        ...

    def remove_debris(self, *, thorough: bool = False) -> int:
        """Remove what dead writers left unfinished; how many things were removed.

        Does no harm to a live writer. `thorough`: also what costs a request to look for.
        """
        ...

    def close(self) -> None:
        """Release threads and connections. The store is not used afterwards."""
        ...
