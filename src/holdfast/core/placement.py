"""Which part of a leaf a process holds, when several train together.

A leaf is one tensor of the whole training, of which each process holds a box: all of it
(replicated), or a part (sharded). Of a box that several processes hold each writes a share,
so that every byte is written once, and by all of them side by side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from holdfast.core.plan import Part


class Placement(msgspec.Struct, frozen=True, gc=False):
    """Where the bytes of a source lie in the leaf, and who else has them.

    A leaf without one is this process's own: others may have a leaf of that name, with
    other bytes.
    """

    shape: tuple[int, ...]
    """Of the whole leaf, in elements of its stored dtype."""
    start: tuple[int, ...]
    """Where the source's box begins in it; its extent is the source's shape."""
    holders: tuple[int, ...]
    """The ranks that hold this very box, ascending. This one is among them, unless its source
    is empty."""
    boxes: tuple[Part, ...] | None = None
    """In place of `start`: the source has the elements of these boxes, one after the other."""

    def parts(self, shape: Sequence[int]) -> Sequence[Part]:
        """The boxes of the leaf that a source of this shape has.

        >>> Placement((4, 2), (1, 0), (0,)).parts((2, 2))
        (((1, 0), (2, 2)),)
        """
        return ((self.start, tuple(shape)),) if self.boxes is None else self.boxes


def replicated(shape: tuple[int, ...], size: int) -> Placement:
    """All of `size` processes hold the whole leaf."""
    return Placement(shape, (0,) * len(shape), tuple(range(size)))


class Division:
    """Which of the chunks that several ranks hold this one writes.

    Of the bytes that a set of ranks holds in common each writes one stretch, in the order of
    the leaves: all of them find the same without a word, and a rank reads few leaves in part.
    """

    def __init__(self, rank: int, held: Iterable[tuple[Placement, int]]) -> None:
        """`held`: the placement and the bytes of everything that this rank has a box of."""
        self._rank = rank
        self._totals: Counter[tuple[int, ...]] = Counter()
        for placement, nbytes in held:
            self._totals[placement.holders] += nbytes
        self._passed: Counter[tuple[int, ...]] = Counter()

    def takes(self, placement: Placement, nbytes: int) -> bool:
        """Whether this rank writes the next chunk. To be asked for every one of them, in the
        order of leaves and chunks."""
        holders = placement.holders
        if len(holders) == 1:
            return True
        passed = self._passed[holders]
        self._passed[holders] += nbytes
        return holders[passed * len(holders) // self._totals[holders]] == self._rank
