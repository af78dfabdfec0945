"""A tensor of several processes, of which this one has a range of the elements.

FullyShardedDataParallel (FSDP1) lays parameters end to end and cuts the whole in as many pieces
as there are ranks. So a rank has all elements of a parameter, none, or a range of them in C
order: several boxes, `2 * ndim - 1` at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from holdfast.core.plan import Part
from holdfast.torch.memory import TensorDestination, boxes_of_range, stored_shape


class RangeShard(torch.Tensor):
    """Has dtype, shape and device of the whole tensor. No operation can be done with it."""

    _local_tensor: torch.Tensor
    """What this process has, in one dimension."""
    first: int
    """Where that begins, in elements."""
    holders: tuple[int, ...]
    """The ranks that have the same range."""
    sharers: int
    """How many ranks have a range, be it without elements."""
    place: tuple[Any, ...]
    """Equal for those that are the same elements of the same memory."""
    outer: torch.Tensor | None
    """Whose version changes in place advance, if it is not that of the local tensor."""

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def of(
        local: torch.Tensor,
        shape: Sequence[int],
        first: int,
        *,
        holders: tuple[int, ...],
        sharers: int,
        place: tuple[Any, ...] = (),
        outer: torch.Tensor | None = None,
    ) -> RangeShard:
        made: Any = torch.Tensor._make_wrapper_subclass(
            RangeShard, torch.Size(shape), dtype=local.dtype, device=local.device
        )
        made._local_tensor = local.detach()
        made.first, made.holders, made.sharers = first, holders, sharers
        made.place = place or (id(made._local_tensor), 0)
        made.outer = outer
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise TypeError(f"a RangeShard stands for a tensor, and {func} needs one")

    def like(self, local: torch.Tensor, place: tuple[Any, ...] = ()) -> RangeShard:
        """The same range of another tensor."""
        return RangeShard.of(
            local,
            self.shape,
            self.first,
            holders=self.holders,
            sharers=self.sharers,
            place=place,
        )

    @property
    def whole(self) -> bool:
        """Whether this process has all of it."""
        return self._local_tensor.numel() == self.numel()

    def boxes(self) -> list[Part]:
        """The range as boxes that follow one another, in stored elements."""
        end = self.first + self._local_tensor.numel()
        found = boxes_of_range(tuple(self.shape), self.first, end)
        return [_stored(self.dtype, start, shape) for start, shape in found]

    def part_of(self, whole: torch.Tensor) -> torch.Tensor:
        """These elements of another tensor of the same shape."""
        return whole.reshape(-1)[self.first : self.first + self._local_tensor.numel()]


class RangeDestination:
    """Writes verified bytes into the range that is here; implements
    core.adapters.Destination."""

    def __init__(self, tensor: RangeShard) -> None:
        local, at = tensor._local_tensor, 0
        self._boxes: list[TensorDestination] = []
        parts: list[Part] = []
        end = tensor.first + local.numel()
        for start, shape in boxes_of_range(tuple(tensor.shape), tensor.first, end):
            count = prod(shape)
            parts.append(_stored(tensor.dtype, start, shape))
            self._boxes.append(TensorDestination(local[at : at + count].view(shape), parts[-1]))
            at += count
        low = tuple(map(min, zip(*(start for start, _ in parts), strict=True)))
        ends = zip(*(map(sum, zip(*part, strict=True)) for part in parts), strict=True)
        self.part: Part = low, tuple(max(end) - first for end, first in zip(ends, low, strict=True))

    def write(self, start: Sequence[int], shape: Sequence[int], data: memoryview) -> None:
        for box in self._boxes:
            box.write(start, shape, data)


def _stored(dtype: torch.dtype, start: Sequence[int], shape: Sequence[int]) -> Part:
    extent = stored_shape(dtype, shape)
    return (*start, *(0,) * (len(extent) - len(start))), extent
