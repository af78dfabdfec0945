"""An object that comes in blocks, for a store that puts objects whole."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable, Sequence

from holdfast.core.copying import copy_bytes
from holdfast.core.types import Buffer, MiB

# Objects that come in blocks lie in memory up to this size (a mirrored run's packs are smaller),
# and then in a temporary file.
_IN_MEMORY_BYTES = 80 * MiB


class Blocks:
    """Collects blocks, and then calls `put` with all of them; implements base.NewObject."""

    def __init__(self, put: Callable[[Sequence[Buffer]], bool], at_most_bytes: int) -> None:
        self._put = put
        self._memory: mmap.mmap | None
        if at_most_bytes <= _IN_MEMORY_BYTES:
            self._memory = mmap.mmap(-1, max(1, at_most_bytes))
        else:
            with tempfile.TemporaryFile(prefix="holdfast-") as file:
                file.truncate(at_most_bytes)
                self._memory = mmap.mmap(file.fileno(), at_most_bytes)

    def write(self, offset: int, data: memoryview) -> None:
        assert self._memory is not None
        with memoryview(self._memory) as memory:
            copy_bytes(memory[offset : offset + data.nbytes], data.cast("B"))

    def publish(self, nbytes: int) -> bool:
        assert self._memory is not None
        with memoryview(self._memory) as memory, memory[:nbytes] as view:
            return self._put([view])

    def discard(self) -> None:
        self._memory = None
