"""Writing packs, under names that are never reused."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.core.digest import digest
from holdfast.core.records import Pack
from holdfast.core.types import Buffer
from holdfast.errors import StoreUnavailable
from holdfast.repo import keys
from holdfast.repo.repo import Repo
from holdfast.repo.saves import NewPack, Save


class PackWriter:
    """Writes the packs of saves, in one epoch and as one rank. Methods may be called from any
    thread."""

    def __init__(self, repo: Repo, epoch: int, rank: int = 0) -> None:
        self._repo = repo
        self.epoch = epoch
        self.rank = rank

    def put_pack(self, save: Save, head: bytes, chunks: Sequence[Buffer]) -> Pack:
        """Write one pack (its header, then chunks) durably, under a new name.

        Raises StoreUnavailable, StoreFull.
        """
        nbytes = len(head) + sum(memoryview(chunk).nbytes for chunk in chunks)
        pack = self.name_pack(save, head, nbytes)
        self.put_named(pack, [head, *chunks])
        return pack

    def name_pack(self, save: Save, head: bytes, nbytes: int) -> Pack:
        """A pack of `nbytes`, its header among them, that will be put."""
        return self._pack(save, self._name_pack(save), nbytes, head)

    def put_named(self, pack: Pack, parts: Sequence[Buffer]) -> None:
        """As `put_pack`, for one that was named. From any thread."""
        self.put_own(keys.pack_key(pack.name), parts, pack.nbytes)

    def create_pack(self, save: Save, *, at_most_bytes: int) -> NewPack:
        """Begin a pack, under a new name, whose bytes come in blocks."""
        name = self._name_pack(save)
        key = keys.pack_key(name)
        made = self._repo.store.create(key, at_most_bytes=at_most_bytes)

        def finish(nbytes: int, head: bytes) -> Pack:
            pack = self._pack(save, name, nbytes, head)
            if not made.publish(nbytes):
                self._settle_own(key, nbytes)
            return pack

        return NewPack(name, made, finish)

    def _name_pack(self, save: Save) -> str:
        save.named += 1
        return keys.pack_name(self.epoch, save.nonce, self.rank, save.named - 1)

    def _pack(self, save: Save, name: str, nbytes: int, head: bytes) -> Pack:
        pack = save.written[name] = Pack(
            name=name,
            nbytes=nbytes,
            born=save.ordinal,
            head_nbytes=len(head),
            head_digest=digest(head),
        )
        return pack

    @property
    def whole_bytes(self) -> int:
        """See `stores.base.Store`."""
        return self._repo.store.whole_bytes

    @property
    def parallel(self) -> int:
        """See `stores.base.Store`."""
        return self._repo.store.parallel

    def read_pack(self, pack: Pack, offset: int, into: memoryview) -> None:
        """As `Repo.read_pack`: what a checkpoint has stored already."""
        self._repo.read_pack(pack, offset, into)

    def put_own(self, key: str, parts: Sequence[Buffer], nbytes: int) -> None:
        """Create an object whose name only this writer can have given."""
        if not self._repo.store.put_new(key, parts):
            self._settle_own(key, nbytes)

    def _settle_own(self, key: str, nbytes: int) -> None:
        # Its name is random, so what is there is ours, from a try whose reply was lost.
        self._repo.store.settle(key)
        if self._repo.store.size(key) != nbytes:
            raise StoreUnavailable(f"{key} in {self._repo.address} is there with another size")
