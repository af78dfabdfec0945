"""How one order of samples is dealt out to the processes that train together.

torch's `DistributedSampler` gives rank r of W every W-th sample of one order, which is the
same on all ranks. So after n samples on each of them the first n * W are taken, whoever had
which; what is left can be dealt out anew to any number of ranks. Pure, without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from typing import Any, Self

from holdfast.core.group import Ranks

_NAMES = (("rank", "num_replicas"), ("process_index", "num_processes"), ("rank", "world_size"))
"""Attributes that say whose part it is: of torch's samplers, of Accelerate's, of people's."""


def ranks_in(*holders: object) -> Ranks | None:
    """What the first of these (a loader's samplers and dataset) that knows says of whose part
    of the data it deals; None if none of them says anything."""
    for holder in holders:
        for rank_name, size_name in _NAMES:
            rank, size = getattr(holder, rank_name, None), getattr(holder, size_name, None)
            if isinstance(rank, int) and isinstance(size, int):
                return Ranks(rank, size)
    return None


@dataclass(frozen=True)
class Deal:
    """An epoch's order, from some place on, dealt to so many ranks."""

    size: int
    """Ranks."""
    behind: int = 0
    """Samples at the start of the order that are not dealt: they were taken before."""
    items: int = 0
    """Items of each rank that were taken before."""

    @property
    def goes_on(self) -> bool:
        """Whether the epoch began on another number of ranks."""
        return self.items > 0

    def each(self, total: int, *, drop_last: bool) -> int:
        """How many samples each rank gets, of an order with `total` in all."""
        left = max(0, total - self.behind)
        return left // self.size if drop_last else -(-left // self.size)

    def of(self, order: Sequence[Any], rank: int, *, drop_last: bool) -> list[Any]:
        """The samples of one rank. As DistributedSampler does, the last ones are dropped, or
        completed with the first ones of the order, so that each rank gets equally many.

        >>> [Deal(2, behind=4).of("abcdefg", rank, drop_last=False) for rank in (0, 1)]
        [['e', 'g'], ['f', 'a']]
        """
        dealt = self.size * self.each(len(order), drop_last=drop_last)
        rest = list(order[self.behind : self.behind + dealt])
        rest += islice(cycle(order), dealt - len(rest))
        return rest[rank :: self.size]

    def to_tree(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> Self:
        return cls(**{name: int(tree[name]) for name in cls.__dataclass_fields__})
