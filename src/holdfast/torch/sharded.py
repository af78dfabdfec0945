"""DTensors: which part of a tensor of several processes this one holds.

A DTensor is one tensor of all the processes of its mesh. Each holds a box of it, or a replica
of one. That box is the source of the leaf, and where a restore writes: nothing is gathered,
and no process speaks to another. Where the box lies follows from the mesh, from the placements
and from the global shape.

Parameters of FSDP1 are RangeShards (see `ranges`): a process has a range of the elements.

A replicated parameter of a module (DistributedDataParallel) is a plain tensor, of which each
process has all: see `mark_shared`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch

from holdfast.core.adapters import Destination, Encoder
from holdfast.core.arrays import dense_order
from holdfast.core.group import Ranks
from holdfast.core.placement import Placement, replicated
from holdfast.core.plan import slices
from holdfast.core.types import Node
from holdfast.errors import StateError
from holdfast.torch.memory import TensorDestination, source_of, stored_shape
from holdfast.torch.ranges import RangeDestination, RangeShard

_ONE_MESH = (
    "Make one mesh of all processes, init_device_mesh(device, (2, 2), mesh_dim_names=('dp', "
    "'tp')), and give the model a slice of it: mesh['tp']."
)


def is_sharded(value: object) -> bool:
    """Whether `value` is a DTensor, or a parameter that is one; or a RangeShard."""
    if type(value) is RangeShard:
        return True
    # Importing it takes a second; without it there is none.
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def local_of(tensor: Any) -> torch.Tensor:
    """What this process holds of a sharded tensor, in place."""
    # Not to_local(): of parameters it makes a new tensor, or a node for autograd.
    local = tensor._local_tensor
    waiting = getattr(local, "wait", None)  # a collective's result that nobody has used yet
    return local if waiting is None else waiting()


def outer_of(tensor: Any) -> torch.Tensor:
    """The tensor whose version is advanced by changes in place that do not advance that of the
    local part."""
    if type(tensor) is not RangeShard:
        return tensor
    return tensor._local_tensor if tensor.outer is None else tensor.outer


class Held(NamedTuple):
    """The box of a DTensor that this process holds."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    whole: bool
    """Whether it is all of it."""


def held(tensor: Any, path: str) -> Held:
    """Where this process's part of a DTensor lies in it. Raises StateError for sums that
    have not been made yet, and what is no box."""
    mesh, placements = tensor.device_mesh, tensor.placements
    if any(placement.is_partial() for placement in placements):
        raise StateError(
            f"{path!r} is a DTensor with the placements {list(placements)}: of a part of it each "
            "process has a summand only",
            hint="Give it another first: tensor.redistribute(placements=[Replicate()]).",
        )
    at = mesh.get_coordinate()
    if at is None:
        raise StateError(
            f"{path!r} is a DTensor of other processes: this one is not in its mesh",
            hint=_ONE_MESH,
        )
    shape = tuple(tensor.shape)
    box = box_at(shape, mesh.shape, at, placements)
    local = tuple(local_of(tensor).shape)
    if box is None or (box[1] != local and prod(local)):
        raise StateError(
            f"{path!r} is a DTensor with the placements {list(placements)}: what a process has of "
            "it is no box",
            hint="Give it plain placements first: tensor.redistribute(placements=[Shard(0)]).",
        )
    start, extent = box
    return Held(start, extent, extent == shape)


def box_at(
    shape: Sequence[int],
    mesh_shape: Sequence[int],
    at: Sequence[int],
    placements: Sequence[Any],
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(start, shape) of what the process at the place `at` of a mesh has of a tensor; None
    if that is no box.

    >>> from torch.distributed.tensor import Replicate, Shard
    >>> box_at((5, 4), (4,), (2,), [Shard(0)])
    ((4, 0), (1, 4))
    >>> box_at((5, 4), (2, 2), (1, 1), [Replicate(), Shard(1)])
    ((0, 2), (5, 2))
    """
    start, extent = [0] * len(shape), list(shape)
    for dim in range(len(shape)):
        order = _order(dim, mesh_shape, placements)
        if order is None:
            return None
        for mesh_dim in order:
            # As torch.chunk: all are as large as the first, but for the last and those behind.
            size = -(-extent[dim] // mesh_shape[mesh_dim])
            first = min(extent[dim], at[mesh_dim] * size)
            start[dim] += first
            extent[dim] = min(size, extent[dim] - first)
    return tuple(start), tuple(extent)


def _order(dim: int, mesh_shape: Sequence[int], placements: Sequence[Any]) -> list[int] | None:
    """The dimensions of the mesh that cut this one of the tensor, in the order in which they
    do. From left to right; but FSDP over a tensor-parallel model is left of what has cut
    before it, and says by its `split_factor` into how many parts."""
    order: list[int] = []
    for mesh_dim in reversed(range(len(placements))):
        placement = placements[mesh_dim]
        if getattr(placement, "dim", None) != dim:  # Replicate has none
            continue
        parts, position = getattr(placement, "split_factor", 1), 0
        while position < len(order) and parts > prod(mesh_shape[i] for i in order[:position]):
            position += 1
        if parts != prod(mesh_shape[i] for i in order[:position]):
            return None
        order.insert(position, mesh_dim)
    return order


def holders(tensor: Any, ranks: Ranks, path: str) -> tuple[int, ...]:
    """The ranks that hold the very box that this one does. Raises StateError if the mesh
    does not tell of all ranks."""
    mesh = tensor.device_mesh
    names = tuple(mesh.mesh_dim_names or range(mesh.ndim))
    cuts = {
        name: at
        for name, at, placement in zip(names, mesh.get_coordinate(), tensor.placements, strict=True)
        if not placement.is_replicate()
    }
    all_ranks, known = mesh, names
    if mesh.size() != ranks.size:
        all_ranks = _root_of(mesh)
        known = tuple(all_ranks.mesh_dim_names or ())
    if all_ranks.size() != ranks.size or not set(names) <= set(known):
        raise StateError(
            f"{path!r} is a DTensor of {mesh.size()} of {ranks.size} processes, and its mesh does "
            "not tell what the others have of it",
            hint=_ONE_MESH,
        )
    # Along what cuts it, here; along the rest, and what its own mesh leaves out, everywhere.
    alike = all_ranks.mesh[tuple(cuts.get(name, slice(None)) for name in known)]
    found = tuple(sorted(alike.flatten().tolist()))
    if ranks.rank not in found:
        raise StateError(f"{path!r}: rank {ranks.rank} is not in its mesh", hint=_ONE_MESH)
    return found


def _root_of(mesh: Any) -> Any:
    """The mesh that this one is a slice of; itself if it is none."""
    if hasattr(mesh, "_get_root_mesh"):
        return mesh._get_root_mesh()
    from torch.distributed.device_mesh import _mesh_resources  # torch < 2.10

    return _mesh_resources.get_root_mesh(mesh)


def placement_of(tensor: Any, path: str, encoder: Encoder) -> Placement | None:
    """Of a sharded tensor; None where one process saves alone. Raises StateError."""
    if type(tensor) is RangeShard:
        return _placement_of_range(tensor, path, encoder)
    box = held(tensor, path)
    ranks = encoder.ranks
    if ranks is None and box.whole:
        return None
    start = box.start
    shape = stored_shape(tensor.dtype, tensor.shape)
    if len(shape) > len(start):
        start = (*start, 0)
    if ranks is None:
        _check_stays(tensor.device_mesh.size(), path, encoder)
        return Placement(shape, start, ())
    return Placement(shape, start, holders(tensor, ranks, path))


def _placement_of_range(tensor: RangeShard, path: str, encoder: Encoder) -> Placement | None:
    ranks = encoder.ranks
    if ranks is None and tensor.whole:
        return None
    shape = stored_shape(tensor.dtype, tensor.shape)
    zeros = (0,) * len(shape)
    boxes = None if tensor.whole else tuple(tensor.boxes())
    if ranks is None:
        _check_stays(tensor.sharers, path, encoder)
        return Placement(shape, zeros, (), boxes)
    if tensor.sharers != ranks.size:
        raise StateError(
            f"{path!r} is divided among {tensor.sharers} of {ranks.size} processes, and nothing "
            "tells what the others have of it",
            hint="Give FullyShardedDataParallel no process_group, or HYBRID_SHARD.",
        )
    return Placement(shape, zeros, tensor.holders, boxes)


def _check_stays(size: int, path: str, encoder: Encoder) -> None:
    if not encoder.stays:
        raise StateError(
            f"{path!r} is divided among {size} processes, and this one saves alone",
            hint="Save from all of them, under torch.distributed, or save what is gathered: of a "
            "DTensor tensor.full_tensor().",
        )


def destination_in(tensor: Any, path: str) -> Destination:
    """For the bytes of a leaf that belong into a sharded tensor here. It has elements."""
    if type(tensor) is RangeShard:
        return RangeDestination(tensor)
    return TensorDestination(local_of(tensor), part_of(tensor, path))


def cut_out(whole: torch.Tensor, tensor: Any, path: str) -> torch.Tensor:
    """What a sharded tensor has here, of another tensor that is whole."""
    if type(tensor) is RangeShard:
        return tensor.part_of(whole)
    box = held(tensor, path)
    return whole[slices(box.start, box.shape)]


def check_box(tensor: Any, path: str) -> None:
    """Raises StateError if what is here of a sharded tensor is nothing to restore into."""
    if type(tensor) is not RangeShard:
        held(tensor, path)


def part_of(tensor: Any, path: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The box of the leaf that belongs into a DTensor here, in stored elements."""
    box = held(tensor, path)
    shape = stored_shape(tensor.dtype, box.shape)
    return (*box.start, *(0,) * (len(shape) - len(box.shape))), shape


def layout_keys(tensor: Any) -> dict[str, Node]:
    """How a DTensor was laid out, for readers who want to know; a restore does not."""
    if type(tensor) is RangeShard:
        return {}
    placements: list[Node] = [str(placement) for placement in tensor.placements]
    return {"mesh": list(tensor.device_mesh.shape), "placements": placements}


def place_of(tensor: Any) -> tuple[Any, ...]:
    """Equal for sharded tensors that are the same elements of the same memory."""
    if type(tensor) is RangeShard:
        return tensor.place
    local = local_of(tensor)
    return (
        # Not an address of elements: where this process has none, it is 0.
        local.untyped_storage()._cdata,
        local.storage_offset(),
        local.shape,
        local.stride(),
        local.dtype,
        tuple(tensor.shape),
        tuple(map(str, tensor.placements)),
    )


def like(tensor: Any, dtype: torch.dtype) -> Any:
    """A new one with the layout of another. No process speaks to another."""
    if type(tensor) is RangeShard:
        return tensor.like(torch.zeros_like(local_of(tensor), dtype=dtype))
    with torch.no_grad():
        return torch.zeros_like(tensor, dtype=dtype, requires_grad=False)


def encode_sharded(
    value: Any, path: str, node: dict[str, Node], encoder: Encoder
) -> dict[str, Node]:
    """Complete and return the node of a sharded tensor: of a dense tensor, as of any other."""
    placement = placement_of(value, path, encoder)
    node.update(layout_keys(value))
    order = dense_order(value.shape, value.stride(), 1) if value.numel() else None
    if order and order != sorted(order):
        node["order"] = order
    local = local_of(value).detach()
    if type(value) is RangeShard and value.whole:
        local = local.view(value.shape)
    if local.is_conj() or local.is_neg():
        local = local.resolve_conj().resolve_neg()
    # Tied ones are one leaf. Other views of the same memory are leaves of their own: a union
    # of them would be bytes of this process, which are in no order of the whole tensor.
    memo = sharded_memo(value.device, encoder)
    place = place_of(value)
    if place not in memo:
        memo[place] = encoder.leaf(source_of(local, outer_of(value)), path, placement)
    node["leaf"] = memo[place]
    return node


def sharded_memo(device: torch.device, encoder: Encoder) -> dict[Any, int]:
    """The leaves of the sharded tensors on a device, by their `place_of`."""
    return encoder.alias(("torch", device), None).setdefault("sharded", {})


def cut_like(whole: torch.Tensor, tensor: Any, path: str) -> Any:
    """A new DTensor with the layout of another and the elements of `whole`, a plain tensor."""
    part = cut_out(whole, tensor, path)
    made = like(tensor, whole.dtype)
    with torch.no_grad():
        local_of(made).copy_(part)
    return made


def summed(tensor: Any) -> Any:
    """A DTensor without the sums that have not been made yet. If there are any, all processes
    of its mesh must come here, in the thread that trains."""
    if not is_sharded(tensor) or not any(p.is_partial() for p in tensor.placements):
        return tensor
    from torch.distributed.tensor import Replicate

    with torch.no_grad():
        return tensor.redistribute(
            placements=[Replicate() if p.is_partial() else p for p in tensor.placements]
        )


def version_of(tensor: torch.Tensor) -> object:
    """What every change in place makes another one. An operation on a DTensor advances its own
    version and not that of the local part; FSDP adds to the local part of gradients."""
    return (tensor._version, local_of(tensor)._version) if is_sharded(tensor) else tensor._version


# -- plain tensors that all processes have --------------------------------------------------


def is_shared(param: torch.Tensor, encoder: Encoder) -> bool:
    """Whether a parameter is one of all processes: sharded, or one of a module that was
    encoded before."""
    return is_sharded(param) or id(param) in _shared(encoder)


def mark_shared(tensors: Iterable[object], encoder: Encoder) -> None:
    """These are the same in all processes that save together."""
    marked = _shared(encoder)
    marked.update((id(tensor), tensor) for tensor in tensors)  # kept: an id() is used again


def shared_placement(value: torch.Tensor, encoder: Encoder) -> Placement | None:
    """Of a plain tensor: a replica, if it was marked; None if it is this process's own."""
    if encoder.ranks is None or id(value) not in _shared(encoder):
        return None
    return replicated(stored_shape(value.dtype, value.shape), encoder.ranks.size)


def _shared(encoder: Encoder) -> dict[Any, Any]:
    return encoder.alias(("torch", "shared"), None)
