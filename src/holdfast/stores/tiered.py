"""A store of all, and a disk nearby on which some of its objects are kept a second time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress

from holdfast.core.address import printable
from holdfast.core.types import Buffer
from holdfast.errors import HoldfastError
from holdfast.stores.base import NewObject, ObjectInfo, Store

logger = logging.getLogger("holdfast")


class TieredStore:
    """Everything is in `far`, as if it were used alone. What is put below `prefix` is put into
    `near`, too, and ranges of it are read from there.

    Nothing depends on `near`: what it does not take is not kept there, which is said once, and
    what it has not, or not whole, is read from `far`. Implements `stores.base.Store`.
    """

    def __init__(self, near: Store, far: Store, prefix: str) -> None:
        self.near = near
        self.far = far
        self._prefix = prefix
        self._spare: set[str] = set()
        """Of what is near: not wanted when `trim` was called last."""
        self._refused = False
        """The last object was not taken by `near`."""

    @property
    def address(self) -> str:
        return self.far.address

    @property
    def whole_bytes(self) -> int:
        return self.far.whole_bytes

    @property
    def parallel(self) -> int:
        return self.far.parallel

    # -- writing -------------------------------------------------------------------

    def put_new(self, key: str, parts: Sequence[Buffer]) -> bool:
        created = self.far.put_new(key, parts)
        if key.startswith(self._prefix):
            try:
                self.near.put_new(key, parts)
                self._refused = False
            except HoldfastError as error:
                self._not_kept(error)
        return created

    def create(self, key: str, *, at_most_bytes: int) -> NewObject:
        made = self.far.create(key, at_most_bytes=at_most_bytes)
        if not key.startswith(self._prefix):
            return made
        try:
            beside = self.near.create(key, at_most_bytes=at_most_bytes)
        except HoldfastError as error:
            self._not_kept(error)
            return made
        return _InBoth(made, beside, self._not_kept)

    def append(self, key: str, data: Buffer) -> None:
        self.far.append(key, data)

    def settle(self, key: str) -> None:
        self.far.settle(key)

    def delete(self, keys: Iterable[str]) -> None:
        wanted = list(keys)
        self.far.delete(wanted)
        self._drop([key for key in wanted if key.startswith(self._prefix)])

    def trim(self, wanted: Collection[str]) -> None:
        """Remove from `near` what was not `wanted` when this was called last, and is not now:
        what is just being written for the next save is not wanted yet."""
        try:
            there = {info.key for info in self.near.list(self._prefix)}
        except HoldfastError as error:
            logger.debug("%s cannot be listed: %s", self.near.address, error.message)
            return
        spare = there.difference(wanted)
        self._drop(sorted(spare & self._spare))
        self._spare = spare - self._spare

    def _drop(self, keys: Sequence[str]) -> None:
        try:
            self.near.delete(keys)
        except HoldfastError as error:
            logger.debug("something stays in %s: %s", self.near.address, error.message)

    def _not_kept(self, error: HoldfastError) -> None:
        if not self._refused:
            self._refused = True
            logger.warning(
                "checkpoints are not kept in %s for now, only in %s: %s",
                printable(self.near.address),
                printable(self.far.address),
                error.message,
            )

    # -- reading -------------------------------------------------------------------

    def get(self, key: str, *, max_bytes: int) -> bytes:
        return self.far.get(key, max_bytes=max_bytes)

    def read_into(self, key: str, offset: int, into: memoryview, *, shared: bool = False) -> None:
        if key.startswith(self._prefix):
            try:
                self.near.read_into(key, offset, into, shared=shared)
                return
            except HoldfastError as error:
                logger.debug("%s is read from %s: %s", key, self.far.address, error)
        self.far.read_into(key, offset, into, shared=shared)

    def read_far(self, key: str, offset: int, into: memoryview) -> None:
        """As `read_into`, where what is near has turned out to be damaged: that is removed."""
        self._drop([key])
        self.far.read_into(key, offset, into)

    def size(self, key: str) -> int:
        return self.far.size(key)

    def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectInfo]:
        return self.far.list(prefix, after=after)

    def prepare_writing(self) -> None:
        self.far.prepare_writing()

    def remove_debris(self, *, thorough: bool = False) -> int:
        try:
            removed = self.near.remove_debris(thorough=thorough)
        except HoldfastError:
            removed = 0
        return removed + self.far.remove_debris(thorough=thorough)

    def close(self) -> None:
        self.near.close()
        self.far.close()


class _InBoth:
    """An object that is written to both; implements NewObject."""

    def __init__(
        self, made: NewObject, beside: NewObject, on_error: Callable[[HoldfastError], None]
    ) -> None:
        self._made = made
        self._beside: NewObject | None = beside
        self._on_error = on_error

    def write(self, offset: int, data: memoryview) -> None:
        self._made.write(offset, data)
        self._also(lambda beside: beside.write(offset, data))

    def publish(self, nbytes: int) -> bool:
        created = self._made.publish(nbytes)
        self._also(lambda beside: beside.publish(nbytes))
        return created

    def discard(self) -> None:
        self._made.discard()
        self._also(lambda beside: beside.discard())

    def _also(self, work: Callable[[NewObject], object]) -> None:
        beside = self._beside
        if beside is None:
            return
        try:
            work(beside)
        except HoldfastError as error:
            self._beside = None
            with suppress(HoldfastError):
                beside.discard()
            self._on_error(error)
