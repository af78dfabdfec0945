"""Optimizers: their state and hyperparameters, restored without any conversion.

    {"!": "torch.optimizer", "type": "torch.optim.adam:Adam", "v": node of state_dict(),
     "params": [[[0, "float32", [10, 4], "cpu"], ...], ...], "leaves": [[3, ...], ...]}

`params` describes the parameters of each group: number in the state_dict, dtype, shape,
device. `leaves` are those that hold the parameters, as far as it is known.

torch's own `load_state_dict` casts state to the dtype of the parameter, which loses
the bits of float32 moments of bfloat16 parameters. Here every tensor keeps the dtype
it was saved with, live tensors of that dtype and shape are written in place, and the
dicts of the parameter groups, to which schedulers refer, stay the same objects.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch.optim import Optimizer

from holdfast.core.adapters import NOTHING, Decoder, Encoder
from holdfast.core.classes import type_name
from holdfast.core.leaves import settle
from holdfast.core.selection import Selection
from holdfast.core.types import Node
from holdfast.errors import StateError, UnsupportedValue
from holdfast.torch import fsdp1
from holdfast.torch.flat_optimizers import of_originals
from holdfast.torch.memory import copy_bits
from holdfast.torch.modules import bare
from holdfast.torch.pairing import Pairing, describe_parameters, pair_parameters
from holdfast.torch.placing import Placing, entry_in_place, moved
from holdfast.torch.saved import malformed
from holdfast.torch.sharded import is_sharded, is_shared, mark_shared

_HOOKS = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


# -- capture ------------------------------------------------------------------


def is_divided(optimizer: Optimizer) -> bool:
    """Whether its state_dict() needs all processes: each has the state of some parameters."""
    return type(optimizer).__module__.startswith("torch.distributed.optim.zero_redundancy")


def encode_optimizer(optimizer: Optimizer, path: str, encoder: Encoder) -> Node:
    if is_divided(optimizer):
        raise UnsupportedValue(
            path,
            "ZeroRedundancyOptimizer, of which each process has another part",
            hint="Use torch.distributed.fsdp.fully_shard(model), which divides the state of any "
            "optimizer, or the optimizer that is inside.",
        )
    original = of_originals(optimizer, path, encoder)
    if original is not optimizer:
        _check_plain(optimizer, path)
    if encoder.ranks is not None and not (encoder.own is not None and encoder.own(path)):
        mark_shared(_replicas(original, type(optimizer), encoder), encoder)
    return {
        "!": "torch.optimizer",
        "type": type_name(type(optimizer)),
        "v": encoder.encode(original.state_dict(), path),
        **describe_parameters(original, encoder),
    }


def _check_plain(optimizer: Optimizer, path: str) -> None:
    if not plain_loading(optimizer):
        raise UnsupportedValue(
            path,
            "optimizer of FullyShardedDataParallel's (FSDP1) parameters with a state_dict of its "
            "own",
            hint=fsdp1.INSTEAD,
        )


def _replicas(optimizer: Optimizer, kind: Any, encoder: Encoder) -> Iterator[torch.Tensor]:
    """State tensors that are the same in all processes, as the parameter is that they belong
    to. What DTensors are is said by their own mesh.

    Of torch's own optimizers that is all state of a replicated parameter. Others may have
    divided it among the processes; not if it has the parameter's shape. Of a sharded parameter
    it is what has no elements of it, such as the number of steps.
    """
    all_of_it = getattr(kind.step, "__module__", "").startswith("torch.optim.")
    for param, state in optimizer.state.items():
        if not isinstance(param, torch.Tensor) or not is_shared(param, encoder):
            continue
        sharded = is_sharded(param)
        for value in _tensors_in(state):
            alike = not sharded and (all_of_it or value.shape == param.shape)
            if not is_sharded(value) and (alike or value.numel() <= 1):
                yield value


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)


# -- restore ------------------------------------------------------------------


def decode_optimizer(node: dict[str, Node], target: object, path: str, decoder: Decoder) -> Any:
    """Into the live optimizer `target`, or the state_dict that was saved if there is none."""
    if not isinstance(target, Optimizer):
        return decoder.decode(node.get("v"), NOTHING, path)
    live_kind, saved_kind = type_name(type(target)), str(node.get("type"))
    if live_kind.rpartition(":")[2] != saved_kind.rpartition(":")[2]:
        # Nor would its hyperparameters fit: those of Adam turn an AdamW into an Adam.
        decoder.changed(path, saved_kind, live_kind)
        return target
    parts = _parts(node.get("v"))
    original = of_originals(target, path)
    if original is not target:
        _check_plain(target, path)
    pairing = pair_parameters(node, _names(parts), original, path, decoder)
    if pairing is None:
        return target
    if parts is not None and plain_loading(target):
        _restore_in_place(parts, pairing, original, path, decoder)
    elif original is not target:
        raise malformed(path, "its state_dict is not that of one of torch's optimizers")
    elif pairing.complete:
        _restore_by_loading(node, pairing, target, path, decoder)
    else:
        return target  # its own load_state_dict wants all of it
    decoder.finish(lambda: _remember_steps(target))
    return target


def _remember_steps(optimizer: Optimizer) -> None:
    # A resume that runs only the tail of the first epoch comes to `scheduler.step()` before
    # this process has stepped. torch would warn that it is called in the wrong order.
    optimizer._opt_called = True  # type: ignore[attr-defined]


def plain_loading(optimizer: Optimizer) -> bool:
    """Whether the optimizer's state is all in `state` and `param_groups`, as torch's
    own state_dict and load_state_dict have it."""
    kind = type(optimizer)
    return (
        kind.state_dict is Optimizer.state_dict
        and kind.load_state_dict is Optimizer.load_state_dict
        and "state_dict" not in optimizer.__dict__
        and "load_state_dict" not in optimizer.__dict__
        and not any(getattr(optimizer, hooks, None) for hooks in _HOOKS)
    )


# -- the state_dict's node ------------------------------------------------------


class _Parts:
    """The parts of a state_dict that are in the checkpoint and were not skipped."""

    def __init__(self, state: list[Any] | None, groups: list[dict[str, Node]] | None) -> None:
        self.state = state
        self.groups = groups


def _parts(node: Node) -> _Parts | None:
    """None if the state_dict is not of the form that torch's own optimizers have."""
    entries = _pairs(node)
    if entries is None:
        return None
    parts = dict(entries)
    if not parts.keys() <= {"state", "param_groups"}:
        return None
    state = _pairs(parts["state"]) if "state" in parts else None
    groups = None
    if "param_groups" in parts:
        nodes = parts["param_groups"]
        if not isinstance(nodes, list):
            return None
        found = [_pairs(group) for group in nodes]
        if any(group is None for group in found):
            return None
        groups = [dict(group) for group in found if group is not None]
    if "state" in parts and state is None:
        return None
    return _Parts(state, groups)


def _names(parts: _Parts | None) -> list[list[str] | None] | None:
    """The parameters' names that each group was saved with; None if no groups were."""
    if parts is None or parts.groups is None:
        return None
    return [_strings(group.get("param_names")) for group in parts.groups]


def _strings(node: Node) -> list[str] | None:
    return [name for name in node if isinstance(name, str)] if isinstance(node, list) else None


def _pairs(node: Node) -> list[Any] | None:
    """The [key, node] pairs of a dict node that nothing else refers to."""
    if not isinstance(node, dict) or node.get("!") != "dict" or "id" in node:
        return None
    pairs = node.get("v")
    if not isinstance(pairs, list):
        return None
    if not all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str | int)
        for pair in pairs
    ):
        return None
    return pairs if len({(type(key), key) for key, _ in pairs}) == len(pairs) else None


# -- in place -----------------------------------------------------------------


def _restore_in_place(
    parts: _Parts, pairing: Pairing, live: Optimizer, path: str, decoder: Decoder
) -> None:
    saved_groups = [
        None if parts.groups is None or number is None else parts.groups[number]
        for number in pairing.groups
    ]
    placings: dict[Any, Placing] = {}
    for pairs, saved_group, live_group in zip(
        pairing.pairs, saved_groups, live.param_groups, strict=True
    ):
        group = live_group if saved_group is None else saved_group
        on_device = group.get("capturable") is True or group.get("fused") is True
        for pair in pairs:
            placings.setdefault(pair.number, Placing(pair.param, pair.device, on_device))
    state: list[tuple[Any, Any]] | None = None
    if parts.state is not None:
        state = []
        for key, entry in parts.state:
            where = f"{path}/state/{key}"
            placing = placings.get(key)
            if placing is not None:
                current = live.state.get(placing.param)
                pairs = _pairs(entry)
                state.append(
                    (placing.param, entry_in_place(entry, pairs, current, placing, where, decoder))
                )
            elif not pairing.is_gone(key):
                state.append((key, decoder.decode(entry, NOTHING, where)))
    groups = [
        {}
        if saved_group is None
        else _group_in_place(saved_group, live_group, f"{path}/param_groups/{number}", decoder)
        for number, saved_group, live_group in zip(
            pairing.groups, saved_groups, live.param_groups, strict=True
        )
    ]
    kept = {*pairing.fresh, *_not_wanted(live, pairing, path, decoder.selection)}
    decoder.finish(lambda: _apply(live, state, groups, kept))


def _not_wanted(
    live: Optimizer, pairing: Pairing, path: str, selection: Selection
) -> Iterator[Any]:
    """Keys of the live state whose entries are not to be restored."""
    numbers = {pair.param: pair.number for pairs in pairing.pairs for pair in pairs}
    for key in live.state if selection else ():
        name = numbers.get(key, key)
        if isinstance(name, str | int) and not selection.wanted(f"{path}/state/{name}"):
            yield key


def _group_in_place(
    saved: dict[str, Node], live: dict[str, Any], path: str, decoder: Decoder
) -> dict[str, Any]:
    """Values for the live group, to be put there when the bytes are in."""
    values: dict[str, Any] = {}
    for name, node in saved.items():
        if name == "params":
            continue
        current = live.get(name)
        where = f"{path}/{name}"
        if not decoder.selection.wanted(where):
            continue
        if name == "param_names" and isinstance(current, list):
            _same_names(node, current, where, decoder)
        elif isinstance(current, torch.Tensor):
            # A captured graph reads this very tensor: it is filled, not replaced.
            if isinstance(node, int | float):
                decoder.finish(_filling(current, node))
            else:
                values[name] = decoder.decode(node, current, where)
        else:
            values[name] = decoder.decode(node, NOTHING, where)
    return values


def _filling(tensor: torch.Tensor, number: float) -> Any:
    def fill() -> None:
        with torch.no_grad():
            tensor.fill_(number)

    return fill


def _same_names(node: Node, live: list[str], path: str, decoder: Decoder) -> None:
    """Parameters correspond by order alone; where both sides know names, a changed
    order can be seen."""
    names = _strings(node) or []
    if [bare(name) for name in names] != [bare(name) for name in live]:
        decoder.changed(path, _shortened(names), _shortened(live))


def _shortened(names: list[str]) -> str:
    text = ", ".join(names)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(names)} names)"


def _apply(
    live: Optimizer,
    state: list[tuple[Any, Any]] | None,
    groups: list[dict[str, Any]],
    kept: set[Any],
) -> None:
    memo: dict[int, Any] = {}
    if state is not None:
        entries: list[tuple[Any, Any]] = []
        for key, value in state:
            value = moved(value, memo)
            current = live.state.get(key)
            if type(value) is dict and type(current) is dict:
                current.clear()
                current.update(value)
                value = current
            entries.append((key, value))
        for key in [key for key in live.state if key not in kept]:
            del live.state[key]
        live.state.update(entries)
    for group, values in zip(live.param_groups, groups, strict=False):
        for name, value in values.items():
            _put(group, name, settle(value))
    # Subclasses fill in there what older versions of them did not save.
    live.__setstate__({"state": live.state, "param_groups": live.param_groups})


def _put(group: dict[str, Any], name: str, value: Any) -> None:
    current = group.get(name)
    if isinstance(value, torch.Tensor) and value is not current:
        if type(current) in (int, float) and value.numel() == 1:
            value = value.item()  # built with a plain number this time
        elif value.device.type == "cpu" and value.dim() and group["params"]:
            value = value.to(group["params"][0].device)
    group[name] = value


# -- through load_state_dict ----------------------------------------------------


def _restore_by_loading(
    node: dict[str, Node], pairing: Pairing, live: Optimizer, path: str, decoder: Decoder
) -> None:
    state = decoder.decode(node.get("v"), NOTHING, path)
    selection = decoder.selection
    numbers = [pair.number for pairs in pairing.pairs for pair in pairs]

    def finish() -> None:
        complete = settle(state)
        if selection:
            complete = _completed(complete, live.state_dict(), path, selection)
        _load_and_repair(live, complete, numbers, path)

    decoder.finish(finish)


def _completed(saved: Any, live: Any, path: str, selection: Selection) -> Any:
    """`saved` with the `live` values where nothing is to be restored: torch's
    load_state_dict replaces all that it is not given."""
    if not selection.wanted(path):
        return live
    if isinstance(saved, dict) and isinstance(live, dict):
        stays = [
            name for name in live if name not in saved and not selection.wanted(f"{path}/{name}")
        ]
        both = {
            name: _completed(value, live.get(name, value), f"{path}/{name}", selection)
            for name, value in saved.items()
        }
        return {**both, **{name: live[name] for name in stays}}
    if isinstance(saved, list) and isinstance(live, list) and len(saved) == len(live):
        return [
            _completed(value, here, f"{path}/{number}", selection)
            for number, (value, here) in enumerate(zip(saved, live, strict=True))
        ]
    return saved


def _load_and_repair(optimizer: Optimizer, state: Any, numbers: list[int], path: str) -> None:
    """Through the optimizer's own load_state_dict, then undo what torch's one changes:
    the dtypes of state tensors, and which objects the groups are."""
    groups = list(optimizer.param_groups)
    rates = [
        {name: value for name, value in group.items() if isinstance(value, torch.Tensor)}
        for group in groups
    ]
    try:
        optimizer.load_state_dict(state)
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise StateError(
            f"load_state_dict of {type_name(type(optimizer))} at {path!r} failed: {error}",
            hint="The optimizer may be partly restored: do not go on with it.",
        ) from error
    if len(optimizer.param_groups) == len(groups):
        for number, (group, tensors) in enumerate(zip(groups, rates, strict=True)):
            loaded = dict(optimizer.param_groups[number])
            for name, tensor in tensors.items():
                value = loaded.get(name)
                if isinstance(value, torch.Tensor) and _alike(value, tensor):
                    if value is not tensor:
                        copy_bits(value, tensor)
                    loaded[name] = tensor
            group.clear()
            group.update(loaded)
            optimizer.param_groups[number] = group
    saved = state.get("state") if isinstance(state, dict) else None
    live = list(chain.from_iterable(group["params"] for group in optimizer.param_groups))
    if isinstance(saved, dict) and len(live) == len(numbers):
        for number, param in zip(numbers, live, strict=True):
            entry, loaded = saved.get(number), optimizer.state.get(param)
            if isinstance(entry, dict) and isinstance(loaded, dict):
                _repair(entry, loaded)


def _repair(saved: dict[Any, Any], loaded: dict[Any, Any]) -> None:
    for name, value in saved.items():
        current = loaded.get(name)
        if (
            isinstance(value, torch.Tensor)
            and isinstance(current, torch.Tensor)
            and value.dtype != current.dtype
            and value.shape == current.shape
        ):
            loaded[name] = value.to(current.device)


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape
