"""How leaves are cut in chunks: the unit in which a save finds out what has changed."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection, Iterable, Iterator

from holdfast.core.adapters import LeafSource
from holdfast.core.plan import CHUNK_BYTES, SPARSE_CHUNK_BYTES, Box, boxes, itemsize
from holdfast.core.selection import under
from holdfast.errors import UsageError

logger = logging.getLogger("holdfast")


class Cutting:
    """Cuts leaves in chunks of 8 MiB at most; in 64 KiB what is named in `sparse_rows`.

    `sparse_rows` has paths of leaves, or of what they lie below (`model/embedding.weight`,
    `optimizer/state/0`). Raises UsageError if it is no collection of them.
    """

    def __init__(self, sparse_rows: Collection[str] = ()) -> None:
        if isinstance(sparse_rows, str):
            raise UsageError(
                f"sparse_rows={sparse_rows!r} is text, not a list of names",
                hint=f"sparse_rows=[{sparse_rows!r}]",
            )
        self._sparse_rows = tuple(sparse_rows)
        self._unseen = set(sparse_rows)
        """Names that no save has had a leaf for, and that nothing was said about."""

    def boxes(self, path: str, source: LeafSource, at_most: int) -> Iterator[Box]:
        """The boxes of a leaf, of `at_most` bytes each."""
        most = min(CHUNK_BYTES, at_most)
        for name in self._sparse_rows:
            if under(path, name):
                most = min(SPARSE_CHUNK_BYTES, at_most)
                self._unseen.discard(name)
        return boxes(source.shape, itemsize(source.dtype), most)

    def tell_unseen(self, paths: Iterable[str]) -> None:
        """Warn, once, of names for which a save of the leaves `paths` had none. It goes on,
        since it is whole in any chunks."""
        if not self._unseen:
            return
        known = list(paths)
        for name in sorted(self._unseen):
            close = ", ".join(map(repr, difflib.get_close_matches(name, known)))
            logger.warning(
                "sparse_rows names %r, but nothing that was saved is called so.%s",
                name,
                f" Closest: {close}." if close else " `holdfast show` lists the names.",
            )
        self._unseen.clear()
