"""Copying results from one place of a run to another: objects that nothing lists."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Callable, Iterator

from holdfast.core.threads import share_out
from holdfast.core.types import MiB
from holdfast.errors import DamagedObject, ObjectNotFound
from holdfast.repo import results
from holdfast.repo.pace import Pace
from holdfast.repo.results_list import listed
from holdfast.stores.base import ObjectInfo, Store

logger = logging.getLogger("holdfast")

_THREADS = 8
_BLOCK_BYTES = 8 * MiB


class ResultCopies:
    """Copies what the target lacks. `bring` from one thread at a time."""

    def __init__(
        self,
        source: Store,
        target: Store,
        *,
        pace: Pace,
        on_bytes: Callable[[int], None] = lambda nbytes: None,
    ) -> None:
        self._source = source
        self._target = target
        self._pace = pace
        self._on_bytes = on_bytes
        self._there: set[str] | None = None
        """Keys of the results in the target; None: it was not asked yet."""

    def bring(self, *, verify: bool = False) -> int:
        """Have the target hold every result of the source, each verified on the way; how many
        were copied. Damaged ones are told and left out.

        With `verify` those that are in the target are read, too, and replaced if they are
        damaged. Raises CopyStopped, and what stores raise.
        """
        found = listed(self._source)
        if not found:
            return 0
        if self._there is None:
            self._there = {info.key for info in listed(self._target)}
        there = self._there
        if verify:
            damaged = [error.key for error in results.damaged(self._target)]
            self._target.delete(damaged)
            there.difference_update(damaged)
        missing = [info for info in found if info.key not in there]
        copied: list[str] = []

        def work(mine: Iterator[ObjectInfo]) -> None:
            copied.extend(info.key for info in mine if self._copy(info))

        share_out(missing, work, threads=_THREADS, name="holdfast-copy")
        there.update(copied)
        return len(copied)

    def _copy(self, info: ObjectInfo) -> bool:
        self._pace.take(info.size_bytes)
        try:
            if info.size_bytes <= results.WHOLE_BYTES:
                data = self._source.get(info.key, max_bytes=results.WHOLE_BYTES)
                results.in_memory(info.key, data).verify()
                self._target.put_new(info.key, [data])
            else:
                results.stored(self._source, info.key).verify()
                self._copy_large(info)
        except DamagedObject as error:
            logger.error("a result is damaged and not copied: %s", error.message)
            return False
        except ObjectNotFound:
            return False  # it was damaged, and is being replaced
        self._on_bytes(info.size_bytes)
        return True

    def _copy_large(self, info: ObjectInfo) -> None:
        made = self._target.create(info.key, at_most_bytes=info.size_bytes)
        try:
            block = memoryview(mmap.mmap(-1, _BLOCK_BYTES))
            for at in range(0, info.size_bytes, _BLOCK_BYTES):
                part = block[: info.size_bytes - at]
                self._source.read_into(info.key, at, part)
                made.write(at, part)
            made.publish(info.size_bytes)
        finally:
            made.discard()
