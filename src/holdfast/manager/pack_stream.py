"""One pack on its way to the store: chunk after chunk, in blocks that are written as they
fill.

The header of a safetensors file comes first and says what follows, which is known only in
the end. So room is left for it, as much as it can need at most; what it does not need are
spaces.
"""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.core.packing import PackChunk, pack_header
from holdfast.core.records import Pack
from holdfast.manager.staging import Staging, WriteThreads
from holdfast.repo.pack_writer import PackWriter
from holdfast.repo.saves import NewPack, Save


class PackStream:
    """Use by one thread. `close` must follow, finished or not."""

    def __init__(
        self,
        writer: PackWriter,
        save: Save,
        staging: Staging,
        threads: WriteThreads,
        *,
        head_nbytes: int,
        at_most_bytes: int,
    ) -> None:
        self._writer = writer
        self._save = save
        self._staging = staging
        self._block_bytes = staging.block_bytes
        self._threads = threads
        self._head_nbytes = head_nbytes
        self._at_most = head_nbytes + at_most_bytes
        self._at = head_nbytes
        """Where the next chunk begins."""
        self._blocks: dict[int, memoryview] = {}
        """Number -> a block that is not full yet."""
        self._pack: NewPack | None = None
        """None: everything still is in its first block."""

    @property
    def nbytes(self) -> int:
        """Bytes of chunks that were kept."""
        return self._at - self._head_nbytes

    def room(self, nbytes: int) -> list[memoryview]:
        """Where the next chunk's bytes go, piece by piece. What was put there counts only
        after `keep`; without it the next chunk gets the same room. Waits for blocks."""
        return self._pieces(self._at, nbytes)

    def keep(self, nbytes: int) -> int:
        """The chunk is part of the pack; its offset behind the header. Raises what a write
        has raised."""
        offset = self.nbytes
        self._at += nbytes
        first = self._head_nbytes // self._block_bytes  # it has the end of the header
        for number in sorted(self._blocks):
            if number != first and (number + 1) * self._block_bytes <= self._at:
                self._write(number, self._block_bytes)
        return offset

    def finish(self, chunks: Sequence[PackChunk], metadata: dict[str, str]) -> Pack:
        """Make the pack durable. `chunks` are those that were kept, in their order."""
        head, _ = pack_header(chunks, metadata, nbytes=self._head_nbytes)
        at = 0
        while at < len(head):
            for piece in self._pieces(at, min(self._block_bytes, len(head) - at)):
                piece[:] = head[at : at + piece.nbytes]
                at += piece.nbytes
            if at < len(head):
                self._write((at - 1) // self._block_bytes, self._block_bytes)
        if self._pack is None and self._at <= self._block_bytes:
            body = self._blocks[0][len(head) : self._at]
            with self._threads.timed():
                return self._writer.put_pack(self._save, head, [body])
        for number in sorted(self._blocks):
            used = self._at - number * self._block_bytes
            if used > 0:
                self._write(number, min(self._block_bytes, used))
        self._threads.wait()
        self._threads.check()
        with self._threads.timed():
            return self._create().publish(self._at, head)

    def close(self) -> None:
        """Give the blocks back, when no write uses them any more."""
        self._threads.wait()
        for block in self._blocks.values():
            self._staging.give_back(block)
        self._blocks.clear()
        if self._pack is not None:
            self._pack.discard()

    def _pieces(self, at: int, nbytes: int) -> list[memoryview]:
        pieces: list[memoryview] = []
        end = at + nbytes
        while at < end:
            number, inside = divmod(at, self._block_bytes)
            block = self._blocks.get(number)
            if block is None:
                block = self._blocks[number] = self._staging.take()
            stop = min(self._block_bytes, inside + end - at)
            pieces.append(block[inside:stop])
            at += stop - inside
        return pieces

    def _create(self) -> NewPack:
        if self._pack is None:
            self._pack = self._writer.create_pack(self._save, at_most_bytes=self._at_most)
        return self._pack

    def _write(self, number: int, nbytes: int) -> None:
        """Write a block, and give it back."""
        pack = self._create()
        block = self._blocks.pop(number)

        def write() -> None:
            try:
                pack.write(number * self._block_bytes, block[:nbytes])
            finally:
                self._staging.give_back(block)

        try:
            self._threads.run(write)
        except BaseException:
            self._blocks[number] = block
            raise
