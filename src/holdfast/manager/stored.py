"""What is stored already, and so need not be written again."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from holdfast.core.codecs import can_decode, decoded_nbytes
from holdfast.core.digest import digest_of, fingerprint_of
from holdfast.core.plan import itemsize
from holdfast.core.records import Manifest, Pack
from holdfast.core.types import Buffer
from holdfast.errors import TornRead


class Place(NamedTuple):
    """Where and how the bytes of a chunk are stored."""

    pack: Pack
    offset: int
    nbytes: int
    """Stored bytes."""
    codec: str


class Stored:
    """The chunks of an earlier checkpoint that a save may refer to, compressed ones, too.

    Each is handed out once, so that ranges in a manifest never overlap.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        distrusted: Collection[str] = (),
        born_after: int = 0,
        same_place: bool = False,
    ) -> None:
        """`same_place`: only for the same box of the same leaf, since other ranks, which know
        nothing of this one, hand out others."""
        self._same_place = same_place
        self._found: dict[object, list[Place]] = {}
        for leaf in manifest.leaves:
            for chunk in leaf.chunks:
                pack = manifest.packs[chunk.pack]
                if pack.name in distrusted or pack.born <= born_after:
                    continue
                if chunk.codec and not can_decode(chunk.codec):
                    continue  # it could not be moved to another pack
                # Compressed bytes are those of items of one size; others are of any type.
                size = itemsize(leaf.dtype) if chunk.codec else 0
                where = (leaf.path, chunk.start) if same_place else None
                key = (chunk.digest, decoded_nbytes(leaf, chunk), size, where)
                place = Place(pack, chunk.offset, chunk.nbytes, chunk.codec)
                self._found.setdefault(key, []).append(place)

    def take(
        self, digest: str, nbytes: int, itemsize: int, box: tuple[str, tuple[int, ...]]
    ) -> Place | None:
        """Where a chunk with this digest, of so many bytes and of items of that size, is
        stored, if it is. `box`: path of the leaf and where the chunk begins in it."""
        where = box if self._same_place else None
        for size in (0, itemsize):
            if places := self._found.get((digest, nbytes, size, where)):
                return places.pop()
        return None


class Digests:
    """The digests of chunks, computed only for what has changed.

    A fast fingerprint (xxh3, 128 bit, five times as fast as BLAKE3) tells whether a chunk of
    a leaf is what it was at the save before. It is never stored, and holds only in this
    process: it must resist chance, not an adversary.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], tuple[bytes, str]] = {}
        self._next: dict[tuple[str, int], tuple[bytes, str]] = {}
        self._marks: dict[str, object] = {}
        self._changed: set[str] = set()
        """Leaves of which the save in progress found a chunk that was new."""
        self._steady: set[str] = set()
        """Leaves of which the save before found none."""

    def digest(
        self, path: str, offset: int, pieces: Sequence[Buffer], *, unchanged: bool = False
    ) -> str:
        """BLAKE3 (lower-case hex) of the chunk at `offset` of the leaf `path`.

        Raises TornRead if it is not `unchanged` although it should be.
        """
        fingerprint = fingerprint_of(pieces)
        key = (path, offset)
        known = self._known.get(key)
        if known is None or known[0] != fingerprint:
            if unchanged:
                raise TornRead([path])
            known = (fingerprint, digest_of(pieces))
            self._changed.add(path)
        self._next[key] = known
        return known[1]

    def seems_unchanged(self, path: str, mark: object, *, proven: bool = False) -> bool:
        """Whether the leaf had this mark (see `LeafSource.mark`) at the save before.

        `proven`: and no byte of it was new then, for marks that overlook too much. They
        alone would fail one save after the other.
        """
        if mark is None or (proven and path not in self._steady):
            return False
        return self._marks.get(path) == mark

    def settle(self, marks: Mapping[str, object]) -> None:
        """The save, of leaves that had these marks, is committed: the next one is compared
        with it."""
        self._known, self._next = self._next, {}
        self._marks = dict(marks)
        self._steady = self._marks.keys() - self._changed
        self._changed = set()

    def forget(self) -> None:
        """The save has failed: the next one is compared with the one before."""
        self._next = {}
        self._changed = set()
        self._steady = set()  # nothing is proven by a save that perhaps was torn
