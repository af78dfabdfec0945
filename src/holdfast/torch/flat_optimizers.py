"""Optimizers of FSDP1's parameters, as optimizers of those that the model had before.

A rank has no state of a parameter of which it has no element (`use_orig_params=True`), and yet
its tree must say what there is of it: another number of ranks may read that tree. So the
ranks tell one another, before anything is captured, what kinds of values they have (`meet`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from holdfast.core.adapters import Encoder
from holdfast.errors import StateError, UnsupportedValue
from holdfast.torch import fsdp1
from holdfast.torch.dtypes import DTYPES, name_of
from holdfast.torch.group import process_group
from holdfast.torch.ranges import RangeShard

_PLAIN = (bool, int, float, str, type(None))
_NO_ELEMENTS = -1

Kind = tuple[tuple[Any, ...], ...]
"""Of the state of a parameter: (name, "range", dtype), (name, "number", dtype, dimensions,
device) or (name, "plain", value) of each value; (name, "other", words) for what cannot be saved."""


class Known(NamedTuple):
    """What all ranks together have of a parameter's state."""

    kind: Kind
    """Empty: nobody has any."""
    holders: tuple[int, ...]
    why: str = ""
    """What is wrong with it."""


def of_originals(optimizer: Optimizer, path: str, encoder: Encoder | None = None) -> Any:
    """The optimizer; or `Originals` in its place, if it has parameters of FSDP1. `encoder`: it is
    to be saved."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if not any(map(fsdp1.is_flattened, params)):
        return optimizer
    known = None
    if encoder is not None and encoder.ranks is not None and any(True for _ in _divided(optimizer)):
        known = encoder.alias(_MET, None).get(str(id(optimizer)))
        if known is None:
            raise UnsupportedValue(
                path,
                "optimizer of FullyShardedDataParallel's (FSDP1) parameters inside of an object",
                hint="Track it by itself: run.track(optimizer=optimizer).",
            )
    return Originals(optimizer, path, known)


# -- what ranks tell one another ---------------------------------------------------------

_MET = ("torch", "fsdp1", "met")


def meet(optimizers: Iterable[Optimizer], encoder: Encoder) -> None:
    """Tell the other ranks what there is of each parameter's state. All ranks come here at the
    same save, before anything in it can fail."""
    found: list[Optimizer] = []
    mine: list[Any] = []
    for optimizer in optimizers:
        kinds: dict[Kind, int] = {}
        places = [
            _NO_ELEMENTS if kind is None else kinds.setdefault(kind, len(kinds))
            for kind in _divided(optimizer)
        ]
        if places:
            found.append(optimizer)
            mine.append([list(kinds), places])
    group = process_group() if mine else None
    if group is None:
        return
    given = group.gather(mine)
    memo = encoder.alias(_MET, found)
    for number, optimizer in enumerate(found):
        memo[str(id(optimizer))] = list(_joined([each[number] for each in given]))


def _divided(optimizer: Optimizer) -> Iterator[Kind | None]:
    """What there is of each parameter of which other ranks have other elements; None: this
    rank has no elements of it."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if not fsdp1.is_flattened(param) or fsdp1.is_flat(param):
                continue
            owner = fsdp1.owner_of(param)
            if owner is None or not owner[0]._handle.uses_sharded_strategy:
                continue
            unit, (number,) = owner
            info = unit._handle.flat_param._shard_param_infos[number]
            if not info.in_shard:
                yield None
            else:
                state = optimizer.state.get(param, {})
                yield tuple(_kind(name, value, info) for name, value in state.items())


def _kind(name: Any, value: Any, info: Any) -> tuple[Any, ...]:
    if isinstance(value, torch.Tensor):
        if value.shape == (info.numel_in_shard,):
            return name, "range", name_of(value.dtype)
        if value.numel() == 1:
            return name, "number", name_of(value.dtype), value.ndim, value.device.type
        return name, "other", f"a tensor of {list(value.shape)}"
    if isinstance(value, _PLAIN):
        return name, "plain", value
    return name, "other", f"a {type(value).__name__}"


def _joined(given: list[Any]) -> Iterator[Known]:
    """Of each parameter, what all ranks together have."""
    for places in zip(*(places for _, places in given), strict=True):
        found = {
            rank: tuple(tuple(value) for value in given[rank][0][place])
            for rank, place in enumerate(places)
            if place != _NO_ELEMENTS
        }
        kinds, holders = set(found.values()), tuple(found)
        other = [value for kind in kinds for value in kind if value[1] == "other"]
        if other:
            name, _, words = other[0]
            yield Known((), holders, f"{name!r} is {words}: no number, and not divided as it is")
        elif len(kinds) > 1:
            yield Known((), holders, f"ranks {list(holders)} have different state of it")
        else:
            yield Known(kinds.pop() if kinds else (), holders)


# -- the optimizer -------------------------------------------------------------------------


class Originals:
    """An optimizer of flat parameters, as one of those that they were made of; of others as it
    is. What is put into it comes to the optimizer with `__setstate__`, which ends a restore."""

    def __init__(self, live: Optimizer, path: str, known: list[Known] | None) -> None:
        """`known`: of parameters that are divided, what all ranks have; None: only what is here
        counts."""
        self.live = live
        self.state: dict[Any, Any] = {}
        self.param_groups: list[dict[str, Any]] = []
        self._path = path
        self._known = None if known is None else iter(known)
        self._made: list[tuple[torch.Tensor, Any, list[RangeShard]]] = []
        for group in live.param_groups:
            found: list[tuple[int, Any, str]] = []
            names = group.get("param_names") or [""] * len(group["params"])
            for param, name in zip(group["params"], names, strict=True):
                found += self._originals(param, name)
            found.sort(key=lambda one: one[0])  # stable: where nothing is known, as they are
            copy = {**group, "params": [param for _, param, _ in found]}
            if "param_names" in group:
                copy["param_names"] = [name for _, _, name in found]
            self.param_groups.append(copy)
        params = {id(param) for group in live.param_groups for param in group["params"]}
        for key, value in live.state.items():
            if id(key) not in params:
                self.state[key] = value

    def state_dict(self) -> dict[str, Any]:
        """As an optimizer's."""
        params = [param for group in self.param_groups for param in group["params"]]
        numbers = {id(param): number for number, param in enumerate(params)}
        state = {numbers[id(param)]: self.state[param] for param in params if param in self.state}
        more = {key: value for key, value in self.state.items() if id(key) not in numbers}
        groups = [
            {**group, "params": [numbers[id(param)] for param in group["params"]]}
            for group in self.param_groups
        ]
        return {"state": {**state, **more}, "param_groups": groups}

    def _originals(self, param: torch.Tensor, name: str) -> Iterator[tuple[int, Any, str]]:
        """(place in the model, parameter, name) of each; their state is taken."""
        owner = fsdp1.owner_of(param)
        if owner is None:
            if param in self.live.state:
                self.state[param] = self.live.state[param]
            yield fsdp1.order_of(param), param, name
            return
        unit, numbers = owner
        flat = unit._handle.flat_param
        every = fsdp1.shards_of(unit)
        shards = [every[number] for number in numbers]
        self._made.append((param, unit, shards))
        entry = self.live.state.get(param)
        for number, shard in zip(numbers, shards, strict=True):
            if fsdp1.is_flat(param):
                name = flat._fqns[number]
                values = entry and self._cut(entry, flat, number, shard)
            else:
                values = self._entry(entry, unit, shard)
            if values:
                self.state[shard] = values
            yield fsdp1.orders_in(unit).get(number, -1), shard, name

    def _cut(self, entry: Mapping[Any, Any], flat: Any, number: int, shard: RangeShard) -> Any:
        """Of the state of a flat parameter, what belongs to an original."""
        length = flat._sharded_size.numel()
        values: dict[Any, Any] = {}
        for name, value in entry.items():
            if not isinstance(value, torch.Tensor):
                values[name] = value
            elif value.shape == (length,):
                part = fsdp1.part_of(value, flat._shard_param_infos[number])
                values[name] = shard.like(part, (id(value), number))
            elif value.numel() == 1:
                # Not one tensor of many parameters: each counts its own steps elsewhere.
                values[name] = value.clone() if number else value
            else:
                raise self._unsupported(f"{name!r} is a tensor of {list(value.shape)}")
        return values

    def _entry(self, entry: Mapping[Any, Any] | None, unit: Any, shard: RangeShard) -> Any:
        """The state of what is left of an original."""
        handle = unit._handle
        known = None
        if self._known is not None and handle.uses_sharded_strategy:
            known = next(self._known)
            if known.why:
                raise self._unsupported(known.why)
            if not shard._local_tensor.numel():
                return {name: _absent(kind, shard, known.holders) for name, *kind in known.kind}
        values: dict[Any, Any] = {}
        for name, value in (entry or {}).items():
            if isinstance(value, torch.Tensor):
                value = self._value(value, name, handle, shard, known)
            values[name] = value
        return values

    def _value(
        self, value: torch.Tensor, name: Any, handle: Any, shard: RangeShard, known: Known | None
    ) -> torch.Tensor:
        local = shard._local_tensor
        if value.shape == local.shape and handle.uses_sharded_strategy:
            return shard.like(value, (id(value), 0))
        if not handle.uses_sharded_strategy and value.shape == shard.shape:
            return shard.like(value.reshape(-1), (id(value), 0)) if value.is_contiguous() else value
        if value.numel() > 1 and handle.uses_sharded_strategy:
            raise self._unsupported(f"{name!r} is a tensor of {list(value.shape)}")
        if known is None:
            return value
        return RangeShard.of(
            value.reshape(-1),
            value.shape,
            0,
            holders=known.holders,
            sharers=shard.sharers,
            place=(id(value), 0),
        )

    def _unsupported(self, why: str) -> UnsupportedValue:
        return UnsupportedValue(
            self._path,
            f"state of a parameter of FullyShardedDataParallel (FSDP1): {why}",
            hint=fsdp1.INSTEAD,
        )

    # -- back to the optimizer ------------------------------------------------------------

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        live = self.live
        mine = {id(shard) for _, _, shards in self._made for shard in shards}
        for param, unit, shards in self._made:
            if fsdp1.is_flat(param):
                self._put(param, self._flattened(param, unit, shards))
            elif shards[0]._local_tensor.numel():
                entry = self.state.get(shards[0])
                self._put(param, entry and {k: _plain(v, unit) for k, v in entry.items()})
        for key in [key for key in live.state if fsdp1.is_flattened(key) is False]:
            if key not in self.state:
                del live.state[key]
        live.state.update((k, v) for k, v in self.state.items() if id(k) not in mine)
        for group, values in zip(live.param_groups, self.param_groups, strict=True):
            group.update((k, v) for k, v in values.items() if k not in ("params", "param_names"))
        live.__setstate__({"state": live.state, "param_groups": live.param_groups})

    def _put(self, param: torch.Tensor, values: dict[Any, Any] | None) -> None:
        if not values:
            self.live.state.pop(param, None)
            return
        entry = self.live.state[param]
        entry.clear()
        entry.update(values)

    def _flattened(self, param: Any, unit: Any, shards: list[RangeShard]) -> dict[Any, Any] | None:
        """The state of a flat parameter, from that of its originals."""
        entries = [self.state.get(shard) for shard in shards]
        found = [entry for entry in entries if entry is not None]
        if not found:
            return None
        if len(found) < len(entries) or any(one.keys() != found[0].keys() for one in found):
            raise self._no_one_state("some of them have state, and some have not")
        before = self.live.state.get(param, {})
        return {
            name: self._one_value(name, before.get(name), [one[name] for one in found], unit)
            for name in found[0]
        }

    def _one_value(self, name: Any, before: Any, values: list[Any], unit: Any) -> Any:
        first = values[0]
        if type(first) is not RangeShard:
            for value in values[1:]:
                same = (
                    torch.equal(value, first)
                    if isinstance(first, torch.Tensor)
                    else type(value) is type(first) and value == first
                )
                if not same:
                    raise self._no_one_state(f"they differ in {name!r}")
            return first
        flat = unit._handle.flat_param
        pairs = list(zip(values, flat._shard_param_infos, strict=True))
        if isinstance(before, torch.Tensor) and all(
            value._local_tensor.untyped_storage().data_ptr() == before.untyped_storage().data_ptr()
            for value, info in pairs
            if info.in_shard
        ):
            return before  # filled in place
        local = first._local_tensor
        whole = torch.zeros(flat._sharded_size, dtype=local.dtype, device=local.device)
        for value, info in pairs:
            fsdp1.part_of(whole, info).copy_(value._local_tensor)
        return whole

    def _no_one_state(self, why: str) -> StateError:
        return StateError(
            f"{self._path!r}: FullyShardedDataParallel (FSDP1) has one state for many parameters, "
            f"and {why}",
            hint="Wrap the model with use_orig_params=True. Do not go on with this optimizer.",
        )


def _absent(kind: list[Any], shard: RangeShard, holders: tuple[int, ...]) -> Any:
    """A value that other ranks have."""
    how, what, *rest = kind
    if how == "plain":
        return what
    if how == "range":
        return shard.like(torch.empty(0, dtype=DTYPES[what], device=shard.device))
    ndim, device = rest
    local = torch.empty(0, dtype=DTYPES[what], device=device)
    return RangeShard.of(local, (1,) * ndim, 0, holders=holders, sharers=shard.sharers)


def _plain(value: Any, unit: Any) -> Any:
    """What the optimizer itself has of a value."""
    if type(value) is not RangeShard:
        return value
    local = value._local_tensor
    return local if unit._handle.uses_sharded_strategy else local.view(value.shape)
