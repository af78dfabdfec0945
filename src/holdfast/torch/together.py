"""Thousands of dense tensors as nodes and leaves, an attribute at a time.

A call for each tensor, and in it one for each attribute, costs several times what the copy
of a small tensor does. Here each attribute is read of all tensors (`map` over torch's own
getters runs no Python code), and what follows from a combination of them is worked out
once. Nothing is remembered from save to save: to see that a tensor still is what it was,
one would have to read the same attributes.

This is a short cut of `tensors.encode_tensor`, which makes the same nodes and leaves and to
which every tensor is left that has something unusual: shared memory, a device, an order
of dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from holdfast.core.adapters import Encoder, LeafSource, Waiting
from holdfast.core.placement import Placement
from holdfast.core.types import Node
from holdfast.torch.dtypes import STORED
from holdfast.torch.memory import TensorSource
from holdfast.torch.sharded import shared_placement
from holdfast.torch.tensors import first_keys, memory_memo

TOGETHER = frozenset({torch.Tensor, torch.nn.Parameter})

_T: Any = torch.Tensor
_FACTS: tuple[Callable[[torch.Tensor], Any], ...] = (
    type,
    _T.dtype.__get__,
    _T.shape.__get__,  # nested tensors have none, and no other layout has a storage
    _T.is_cpu.__get__,
    _T.is_contiguous,
    _T.is_neg,
    _T.requires_grad.__get__,
    _T.is_leaf.__get__,
)
"""What decides whether a tensor is a usual one, and what its node says besides the leaf."""

_Facts = tuple[Any, ...]
_NONE = torch.empty(0)


class _Kind(NamedTuple):
    """Usual tensors that have all facts in common."""

    keys: dict[str, Node]
    """Of their nodes, without the leaf."""
    stored: str
    shape: tuple[int, ...]
    nbytes: int
    detached: bool


def encode_together(
    waiting: Sequence[Waiting],
    encoder: Encoder,
    encode_one: Callable[[torch.Tensor, str, dict[str, Node], Encoder], object],
) -> None:
    """Complete the nodes of tensors, in their order; with `encode_one` where one has
    something unusual."""
    memory = memory_memo(torch.device("cpu"), encoder)
    pins = torch.cuda.is_initialized()  # asking is slow, and without a device nothing is pinned
    nodes: list[dict[str, Node]] = []
    paths: list[str] = []
    sources: list[LeafSource] = []
    placements: list[Placement | None] | None = None if encoder.ranks is None else []

    def register() -> None:
        leaves = encoder.leaves_of(sources, paths, placements)
        for node, leaf in zip(nodes, leaves, strict=True):
            node["leaf"] = leaf
        for column in (nodes, paths, sources, placements or []):
            column.clear()

    # All types are torch's own. Under `torch.set_default_device` each attribute would
    # be a call of a Python function.
    with torch._C.DisableTorchFunction():
        rows = _rows([value for value, _, _ in waiting])
        kinds: dict[_Facts, _Kind | None] = {}
        for (value, path, node), (facts, base) in zip(waiting, rows, strict=True):
            kind = None
            if base and base not in memory:  # neither empty, nor tied or a view of the same
                try:
                    kind = kinds[facts]
                except KeyError:  # few: most tensors have their facts in common with others
                    kind = kinds[facts] = _kind(value)
            if kind is None or (pins and value.is_pinned()):
                register()
                encode_one(value, path, node, encoder)
                continue
            keys, stored, shape, nbytes, detached = kind
            tensor = value.detach() if detached else value
            source = TensorSource(tensor, stored, shape, nbytes)
            node.update(keys)
            placement = None
            if placements is not None:
                placement = shared_placement(value, encoder)
                placements.append(placement)
            memory[base] = tensor, node, source, placement
            nodes.append(node)
            paths.append(path)
            sources.append(source)
        register()


def _rows(tensors: list[torch.Tensor]) -> list[tuple[_Facts, int]]:
    """Of each tensor: its facts, and the address of its storage."""
    try:
        return _read(tensors)
    except RuntimeError:  # not all of them are dense
        return _read([tensor if _is_dense(tensor) else _NONE for tensor in tensors])


def _read(tensors: list[torch.Tensor]) -> list[tuple[_Facts, int]]:
    # All of one tensor before the next: it is in no cache, and comes into it once.
    facts = zip(*(map(read, tensors) for read in _FACTS), strict=True)
    bases = map(torch.UntypedStorage.data_ptr, map(_T.untyped_storage, tensors))
    return list(zip(facts, bases, strict=True))


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested


def _kind(tensor: torch.Tensor) -> _Kind | None:
    """None for tensors that are left to `encode_one`."""
    stored = STORED.get(tensor.dtype)
    shape = tuple(tensor.shape)
    if (
        stored is None
        or not _is_dense(tensor)
        or not tensor.is_cpu
        or not tensor.is_contiguous()
        or 1 in shape  # contiguous in several orders at once
        or 0 in shape
        or tensor.dtype.is_complex  # whether one is conjugated is asked of no other
        or tensor.is_neg()
    ):
        return None
    keys = first_keys(tensor)
    keys.pop("device", None)  # whether it is pinned is asked of each tensor
    return _Kind(keys, stored, shape, tensor.nbytes, tensor.requires_grad)
