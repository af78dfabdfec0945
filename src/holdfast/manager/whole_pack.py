"""One pack that is put whole, straight from the blocks that it was collected in.

For object stores: a request takes one object, as fast as it takes a part of one, and nobody
ever sees, or has to clean up, a half of it. So packs are small there, and several are on
their way at once. The header is made when all is known, and goes in front.
"""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.core.packing import PackChunk, pack_header
from holdfast.core.records import Pack
from holdfast.manager.staging import Staging, WriteThreads
from holdfast.repo.pack_writer import PackWriter
from holdfast.repo.saves import Save


class WholePack:
    """The same verbs as `PackStream`. Use by one thread; `close` must follow."""

    def __init__(
        self, writer: PackWriter, save: Save, staging: Staging, threads: WriteThreads
    ) -> None:
        self._writer = writer
        self._save = save
        self._staging = staging
        self._threads = threads
        self._blocks: list[memoryview] = []
        self.nbytes = 0
        """Bytes of chunks that were kept."""

    def room(self, nbytes: int) -> list[memoryview]:
        """See `PackStream.room`. The pack must not become larger than its blocks may."""
        return self._pieces(self.nbytes, self.nbytes + nbytes)

    def keep(self, nbytes: int) -> int:
        """See `PackStream.keep`."""
        self._threads.check()
        offset = self.nbytes
        self.nbytes += nbytes
        return offset

    def finish(self, chunks: Sequence[PackChunk], metadata: dict[str, str]) -> Pack:
        """Have the pack put by one of the threads: it is durable when these have done all
        that they were given, without an error."""
        head, _ = pack_header(chunks, metadata)
        pack = self._writer.name_pack(self._save, head, len(head) + self.nbytes)
        parts = self._pieces(0, self.nbytes)
        blocks, self._blocks = self._blocks, []
        taken = False

        def put() -> None:
            nonlocal taken
            taken = True
            try:
                self._writer.put_named(pack, [head, *parts])
            finally:
                for block in blocks:
                    self._staging.give_back(block)

        try:
            self._threads.run(put)
        except BaseException:
            if not taken:  # an earlier write has failed
                self._blocks = blocks
            raise
        return pack

    def close(self) -> None:
        """Give back the blocks of what was not finished."""
        for block in self._blocks:
            self._staging.give_back(block)
        self._blocks = []

    def _pieces(self, at: int, end: int) -> list[memoryview]:
        size = self._staging.block_bytes
        pieces: list[memoryview] = []
        while at < end:
            number, inside = divmod(at, size)
            if number == len(self._blocks):
                self._blocks.append(self._staging.take())
            stop = min(size, inside + end - at)
            pieces.append(self._blocks[number][inside:stop])
            at += stop - inside
        return pieces
