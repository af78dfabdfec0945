"""FullyShardedDataParallel (FSDP1): its flat parameters as those that they were made of.

Of each original parameter torch keeps where it lies in the flat one (`_shard_param_infos`). Here
it is a RangeShard, under the name that it had: saved and restored where it lives, as DTensors
are. torch's own state_dict gathers every flat parameter first, and cuts it again: that takes
time and memory, and all ranks at the same moment, where one that fails would leave the others
in the middle of it.

Names of torch's that begin with an underscore are those of 2.6 to 2.13.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import distributed
from torch.utils.weak import WeakIdKeyDictionary

from holdfast.errors import StateError, UnsupportedValue
from holdfast.torch.ranges import RangeShard

WRAPPED = "_fsdp_wrapped_module"
INSTEAD = "Use torch.distributed.fsdp.fully_shard(module), which has replaced it."
_HYBRID = ("HYBRID_SHARD", "_HYBRID_SHARD_ZERO2")
_MAX_DEPTH = 6


class _Owner(NamedTuple):
    """Which originals a parameter is, or holds."""

    unit: ref[Any]
    numbers: tuple[int, ...]


_owners: Any = WeakIdKeyDictionary()
"""What an optimizer may have got as a parameter -> its _Owner."""
_orders: Any = WeakIdKeyDictionary()
"""Parameters that are not in flat ones -> their places in the model."""
_orders_in: WeakKeyDictionary[Any, dict[int, int]] = WeakKeyDictionary()
"""Module of FSDP1 -> places of its originals in the model, by their number."""


def wrapper() -> Any:
    """The class; nothing that anything is an instance of, if nobody has imported it."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())


def units(parts: Iterable[torch.nn.Module]) -> Iterator[Any]:
    """The modules of FSDP1 among `parts` that have a flat parameter."""
    kind = wrapper()
    if kind == ():
        return
    for part in parts:
        if isinstance(part, kind) and part._handle is not None:  # type: ignore[union-attr]
            yield part


def units_in(value: Any, depth: int = 0) -> Iterator[Any]:
    """Those of tracked objects."""
    if isinstance(value, torch.nn.Module):
        yield from units(value.modules())
    elif isinstance(value, Mapping | list | tuple) and depth < _MAX_DEPTH:
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from units_in(item, depth + 1)


def is_flat(tensor: object) -> bool:
    """Whether it is a parameter that FSDP1 has made of others."""
    return getattr(tensor, "_is_flat_param", False) is True


def is_flattened(param: object) -> bool:
    """Whether it is such a one, or what is left of an original (`use_orig_params=True`)."""
    return getattr(param, "_fsdp_flattened", False) is True


def check(parts: Iterable[torch.nn.Module], path: str) -> bool:
    """Whether there are any. Raises StateError or UnsupportedValue for what is no range of a
    plain parameter now."""
    found = False
    for unit in units(parts):
        found = True
        handle, flat = unit._handle, unit._handle.flat_param
        if handle._training_state.name == "SUMMON_FULL_PARAMS":
            raise StateError(
                f"{path!r} is inside summon_full_params, where its parameters are copies",
                hint="Save and restore outside of it.",
            )
        if any(extension is not None for extension in flat._param_extensions):
            raise UnsupportedValue(
                path,
                "FullyShardedDataParallel (FSDP1) over a model whose parameters are DTensors",
                hint=INSTEAD,
            )
        if not all(flat._contiguities):
            name = flat._fqns[flat._contiguities.index(False)]
            raise UnsupportedValue(
                path,
                f"FullyShardedDataParallel (FSDP1) with {name}, whose dimensions are in another "
                "order in memory (channels_last)",
                hint="Leave them in their own order, or use fully_shard(module).",
            )
    return found


def reshard(parts: Iterable[torch.nn.Module]) -> None:
    """Free whole parameters: after an evaluation some are left as they were used. No process
    speaks to another."""
    for unit in units(parts):
        handle = unit._handle
        if not handle.uses_sharded_strategy or not hasattr(handle.flat_param, "_local_shard"):
            continue
        if handle._training_state.name != "IDLE":
            continue
        if not handle.needs_unshard() or handle._skipped_use_sharded_views:
            handle.reshard(True)
            handle.post_reshard()
            handle._prefetched = False


def local_of(unit: Any) -> torch.Tensor:
    """This rank's piece of the flat parameter, with padding."""
    flat = unit._handle.flat_param
    local = getattr(flat, "_local_shard", None)  # from the first forward on
    return flat.data if local is None else local


def parameters(module: torch.nn.Module) -> dict[int, dict[str, RangeShard]]:
    """The original parameters: id() of the part that has them -> {name: shard}. Parts of the
    model are made known for `owner_of` and `order_of`."""
    if wrapper() == ():
        return {}  # to look at thousands of modules takes longer than their tensors
    parts = list(module.modules())
    found: dict[int, dict[str, RangeShard]] = {}
    numbers: dict[tuple[int, str], tuple[Any, int]] = {}
    for unit in units(parts):
        _make_known(unit)
        flat = unit._handle.flat_param
        named: dict[tuple[int, str], RangeShard] = {}
        for number, (info, shard) in enumerate(
            zip(flat._param_infos, shards_of(unit), strict=True)
        ):
            key = id(info.module), info.param_name
            named[key] = shard
            numbers[key] = unit, number
        for info in flat._shared_param_infos:
            key = id(info.module), info.param_name
            named[key] = named[id(info.prim_module), info.prim_param_name]
        for (part, name), shard in named.items():
            found.setdefault(part, {})[name] = shard
    if found:
        _number(parts, found, numbers)
    return found


def _make_known(unit: Any) -> None:
    flat = unit._handle.flat_param
    everything = tuple(range(flat._num_params))
    _owners[flat] = _Owner(ref(unit), everything)
    for number, param in enumerate(flat._params or ()):
        _owners[param] = _Owner(ref(unit), (number,))


def _number(
    parts: Iterable[torch.nn.Module],
    found: Mapping[int, Mapping[str, RangeShard]],
    numbers: Mapping[tuple[int, str], tuple[Any, int]],
) -> None:
    """Remember the order in which the model had its parameters before it was wrapped."""
    places = count()
    for part in parts:
        for name, param in {**part._parameters, **found.get(id(part), {})}.items():
            place = next(places)
            if (id(part), name) in numbers:
                unit, number = numbers[id(part), name]
                _orders_in.setdefault(unit, {})[number] = place
            elif param is not None and type(param) is not RangeShard:
                _orders[param] = place


def shards_of(unit: Any) -> list[RangeShard]:
    """The originals of a flat parameter."""
    handle, flat, base = unit._handle, unit._handle.flat_param, local_of(unit)
    holders, sharers = _holders(unit)
    found: list[RangeShard] = []
    for number, (shape, info) in enumerate(zip(flat._shapes, flat._shard_param_infos, strict=True)):
        outer = flat._params[number] if handle._use_orig_params else flat
        found.append(
            RangeShard.of(
                part_of(base, info),
                shape,
                info.intra_param_start_idx or 0,
                holders=holders,
                sharers=sharers,
                place=("fsdp1", id(flat), number),
                outer=outer,
            )
        )
    return found


def part_of(base: torch.Tensor, info: Any) -> torch.Tensor:
    """Of a tensor as long as this rank's piece: what belongs to an original parameter."""
    if not info.in_shard:
        return base.detach()[:0]
    return base.detach()[info.offset_in_shard : info.offset_in_shard + info.numel_in_shard]


def _holders(unit: Any) -> tuple[tuple[int, ...], int]:
    """Which ranks have the same piece, and how many have one."""
    handle = unit._handle
    if not handle.uses_sharded_strategy:
        ranks = distributed.get_process_group_ranks(handle.process_group)
        return tuple(sorted(ranks)), len(ranks)
    if handle._sharding_strategy.name in _HYBRID:
        ranks = distributed.get_process_group_ranks(unit._inter_node_pg)
        return tuple(sorted(ranks)), len(ranks) * handle.world_size
    return (distributed.get_rank(),), handle.world_size


def owner_of(param: torch.Tensor) -> tuple[Any, tuple[int, ...]] | None:
    """(the module of FSDP1, the numbers of the originals that it is or holds); None for any
    other parameter. Raises StateError if its model was not seen yet."""
    known: _Owner | None = _owners.get(param)
    if known is not None and (unit := known.unit()) is not None:
        return unit, known.numbers
    if is_flattened(param):
        raise StateError(
            "an optimizer has parameters of FullyShardedDataParallel (FSDP1), and their model is "
            "not tracked with it",
            hint="Track both: run.track(model=model, optimizer=optimizer).",
        )
    return None


def order_of(param: torch.Tensor) -> int:
    """The place of a parameter that FSDP1 has left alone, in the model."""
    return _orders.get(param, -1)


def orders_in(unit: Any) -> Mapping[int, int]:
    """The places of originals in the model, by their number."""
    return _orders_in.get(unit, {})


def unreduced(unit: Any) -> bool:
    """Whether it keeps gradients of whole parameters, as in `no_sync()`."""
    flat = unit._handle.flat_param
    return (
        unit._handle.uses_sharded_strategy
        and flat.grad is not None
        and flat.grad.shape != local_of(unit).shape
    )
