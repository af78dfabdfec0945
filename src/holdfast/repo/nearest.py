"""A run that is read here, and in a copy of it where what is here is damaged or missing.

Names stand for the same bytes in a run and its copies, and every byte is compared with the
digest that the run's own manifest has for it: so it does not matter which of the two gave it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from holdfast.core.address import printable
from holdfast.core.records import Manifest, Pack, Record
from holdfast.errors import CorruptionError, DamagedObject, HoldfastError, ObjectNotFound
from holdfast.repo import keys
from holdfast.repo.check import MANIFEST_MAX_BYTES
from holdfast.repo.log import logger
from holdfast.repo.record import localized
from holdfast.repo.repo import Repo, manifest_of
from holdfast.stores.base import Store
from holdfast.stores.tiered import TieredStore

_T = TypeVar("_T")

# A copy that did not answer is not asked again for so long: each time takes minutes.
_SILENT_S = 60.0


class NearestRepo(Repo):
    """`open_copy` gives the copy's store; `on_damage` is told the key of each object that is
    damaged or missing here and was found there. Both from any thread."""

    has_copy = True

    def __init__(
        self,
        store: Store,
        open_copy: Callable[[], Store],
        on_damage: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(store, clock=clock)
        self._open_copy = open_copy
        self._on_damage = on_damage
        self._copy: Store | None = None
        self._silent_until_s = float("-inf")
        self._told_of: set[str] = set()

    def sealed_manifest(self, record: Record) -> tuple[bytes, Manifest]:
        key = keys.manifest_key(record.id)
        try:
            return super().sealed_manifest(record)
        except DamagedObject as error:
            try:
                data = self._ask(lambda copy: copy.get(key, max_bytes=MANIFEST_MAX_BYTES))
                manifest = manifest_of(record.id, data)
            except (CorruptionError, ObjectNotFound):
                raise error from None
            self._found_there(key)
            return data, localized(manifest, record.packs)

    def pack_size(self, pack: Pack) -> int:
        key = keys.pack_key(pack.name)
        try:
            size = super().pack_size(pack)
            if size == pack.nbytes:
                return size
        except (ObjectNotFound, DamagedObject):
            if self._size_there(key) != pack.nbytes:
                raise
        else:
            if self._size_there(key) != pack.nbytes:
                return size
        self._found_there(key)
        return pack.nbytes

    def pack_sizes(self) -> dict[str, int]:
        return {}  # each is asked for: then a wrong one can be looked for there

    def read_copy(self, pack: Pack, offset: int, into: memoryview) -> None:
        key = keys.pack_key(pack.name)
        self._ask(lambda copy: copy.read_into(key, offset, into))
        self._found_there(key)

    def _size_there(self, key: str) -> int | None:
        try:
            return self._ask(lambda copy: copy.size(key))
        except (CorruptionError, ObjectNotFound):
            return None

    def close_copy(self) -> None:
        """Let go of the copy; what is here belongs to others."""
        with self.lock:
            copy, self._copy = self._copy, None
        if copy is not None:
            copy.close()

    def _ask(self, question: Callable[[Store], _T]) -> _T:
        """What the copy answers. Raises ObjectNotFound; DamagedObject also if it cannot be
        asked: what is here is damaged then, and nothing better is known."""
        if time.monotonic() < self._silent_until_s:
            raise DamagedObject(self.address, "its mirror does not answer")
        try:
            with self.lock:
                copy = self._copy = self._copy or self._open_copy()
            return question(copy)
        except (ObjectNotFound, CorruptionError):
            raise
        except HoldfastError as error:
            self._silent_until_s = time.monotonic() + _SILENT_S
            logger.warning("damage could not be looked up elsewhere: %s", error.message)
            why = f"its mirror cannot be read: {error.message}"
            raise DamagedObject(self.address, why) from error

    def _found_there(self, key: str) -> None:
        with self.lock:
            told, there = key in self._told_of, self._copy
            self._told_of.add(key)
        if not told and there is not None:
            here = printable(self.address)
            logger.error("%s of %s is damaged: read from %s", key, here, printable(there.address))
        self._on_damage(key)


class TieredRepo(Repo):
    """A run in a store of which this node's disk has a part: what is damaged on the disk is read
    from the store."""

    has_copy = True

    def __init__(self, store: TieredStore, *, clock: Callable[[], float] = time.time) -> None:
        super().__init__(store, clock=clock)
        self._tiers = store

    def read_copy(self, pack: Pack, offset: int, into: memoryview) -> None:
        if pack.run:  # a parent's
            self.read_pack(pack, offset, into)
        else:
            self._tiers.read_far(keys.pack_key(pack.name), offset, into)
