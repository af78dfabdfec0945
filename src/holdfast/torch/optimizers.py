"""Optimizers: their state and hyperparameters, restored without any conversion.

    {"!": "torch.optimizer", "type": "torch.optim.adam:Adam",
     "params": [[["float32", [10, 4], "cpu"], ...], ...],   one list per group
     "state": [[key, [[name, node], ...]], ...],
     "groups": [[[name, node], ...], ...]}

`state` and `groups` hold what `state_dict()` gives, parameters as numbers. Further
entries of a state_dict are under `more`. An optimizer whose state_dict is something
else has it under `v`.

torch's own `load_state_dict` casts state to the dtype of the parameter, which loses
the bits of float32 moments of bfloat16 parameters. Here every tensor keeps the dtype
it was saved with, live tensors of that dtype and shape are written in place, and the
dicts of the parameter groups, to which schedulers refer, stay the same objects.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.optim import Optimizer

from holdfast.core.adapters import NOTHING, Decoder, Encoder
from holdfast.core.classes import type_name
from holdfast.core.types import Node
from holdfast.errors import StateError
from holdfast.torch.dtypes import describe, name_of, words
from holdfast.torch.modules import bare
from holdfast.torch.sparse import decode_sparse
from holdfast.torch.tensors import decode_tensor, malformed

_HOOKS = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


# -- capture ------------------------------------------------------------------


def encode_optimizer(optimizer: Optimizer, path: str, encoder: Encoder) -> Node:
    saved = optimizer.state_dict()
    node: dict[str, Node] = {"!": "torch.optimizer", "type": type_name(type(optimizer))}
    if not _is_standard(saved):
        node["v"] = encoder.encode(saved, path)
        return node
    node["params"] = [
        [_describe_param(param) for param in group["params"]] for group in optimizer.param_groups
    ]
    node["state"] = [
        [encoder.encode(key, path), _encode_entry(entry, f"{path}/state/{key}", encoder)]
        for key, entry in saved["state"].items()
    ]
    node["groups"] = [
        _encode_items(group, f"{path}/param_groups/{number}", encoder)
        for number, group in enumerate(saved["param_groups"])
    ]
    more = {key: value for key, value in saved.items() if key not in ("state", "param_groups")}
    if more:
        node["more"] = _encode_items(more, path, encoder)
    return node


def _is_standard(saved: object) -> bool:
    return (
        isinstance(saved, dict)
        and all(isinstance(key, str) for key in saved)
        and isinstance(saved.get("state"), dict)
        and isinstance(saved.get("param_groups"), list)
        and all(
            isinstance(group, dict)
            and all(isinstance(key, str) for key in group)
            and isinstance(group.get("params"), list)
            and all(isinstance(number, int) for number in group["params"])
            for group in saved["param_groups"]
        )
    )


def _describe_param(param: torch.Tensor) -> Node:
    if torch.nn.parameter.is_lazy(param):
        return None
    return [name_of(param.dtype), list(param.shape), str(param.device)]


def _encode_entry(entry: object, path: str, encoder: Encoder) -> Node:
    """One parameter's state: a list of pairs, or what a few optimizers have instead
    of a dict, in an object of its own."""
    if isinstance(entry, dict) and all(isinstance(name, str) for name in entry):
        return _encode_items(entry, path, encoder)
    return {"v": encoder.encode(entry, path)}


def _encode_items(items: dict[str, Any], path: str, encoder: Encoder) -> list[Node]:
    return [[name, encoder.encode(value, f"{path}/{name}")] for name, value in items.items()]


# -- the checked node ---------------------------------------------------------


class _SavedState:
    """The parts of a node, checked for their form."""

    def __init__(self, node: dict[str, Node], path: str) -> None:
        try:
            self.groups = [_pairs(group) for group in node["groups"]]
            self.state = [(key, entry) for key, entry in node["state"]]
            self.params = [list(group) for group in node["params"]]
            self.more = _pairs(node.get("more", []))
            self.ids = [_ids(group["params"]) for group in self.groups]
        except (KeyError, TypeError, ValueError) as error:
            raise malformed(path, "its optimizer state is malformed") from error


def _pairs(node: Node) -> dict[str, Node]:
    pairs = dict(node)
    if len(pairs) != len(node) or not all(isinstance(name, str) for name in pairs):
        raise ValueError("names are malformed")
    return pairs


def _ids(node: Node) -> list[int]:
    # After a reference to the same list elsewhere its first item is a marker.
    numbers = [number for number in node if type(number) is int]
    if len(numbers) != len(set(numbers)) or len(numbers) < len(node) - 1:
        raise ValueError("parameter numbers are malformed")
    return numbers


# -- restore ------------------------------------------------------------------


def decode_optimizer(node: dict[str, Node], target: object, path: str, decoder: Decoder) -> Any:
    """Into the live optimizer `target`, or the state_dict that was saved if there is none."""
    live = target if isinstance(target, Optimizer) else None
    if "v" in node:
        state = decoder.decode(node["v"], NOTHING, path)
        if live is not None:
            decoder.finish(lambda: _load(live, state, path))
        return state if live is None else live
    saved = _SavedState(node, path)
    if live is None:
        return _state_dict(saved, path, decoder)
    if not _same_parameters(saved, live, path, decoder):
        return live
    if plain_loading(live) and not saved.more:
        _restore_in_place(saved, live, path, decoder)
    else:
        state = _state_dict(saved, path, decoder)
        decoder.finish(lambda: _load_and_repair(live, state, path))
    return live


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


def _state_dict(saved: _SavedState, path: str, decoder: Decoder) -> dict[str, Any]:
    state: dict[str, Any] = {"state": {}, "param_groups": []}
    for key_node, entry in saved.state:
        key = decoder.decode(key_node, NOTHING, path)
        state["state"][key] = _decode_entry(entry, f"{path}/state/{key}", decoder)
    for number, group in enumerate(saved.groups):
        group_path = f"{path}/param_groups/{number}"
        state["param_groups"].append(_decode_items(group, group_path, decoder))
    state.update(_decode_items(saved.more, path, decoder))
    return state


def _decode_entry(entry: Node, path: str, decoder: Decoder) -> Any:
    if isinstance(entry, dict):
        return decoder.decode(entry.get("v"), NOTHING, path)
    return _decode_items(_entry_pairs(entry, path), path, decoder)


def _entry_pairs(entry: Node, path: str) -> dict[str, Node]:
    try:
        return _pairs(entry)
    except (TypeError, ValueError) as error:
        raise malformed(path, "its state is malformed") from error


def _decode_items(items: dict[str, Node], path: str, decoder: Decoder) -> dict[str, Any]:
    return {
        name: decoder.decode(value, NOTHING, f"{path}/{name}") for name, value in items.items()
    }


def _same_parameters(saved: _SavedState, live: Optimizer, path: str, decoder: Decoder) -> bool:
    """Whether the parameters correspond by their order; reports it if not."""
    saved_counts = [len(ids) for ids in saved.ids]
    live_counts = [len(group["params"]) for group in live.param_groups]
    if saved_counts != live_counts:
        decoder.changed(f"{path}/param_groups", _count(saved_counts), _count(live_counts))
        return False
    same = True
    for number, (descriptions, group) in enumerate(
        zip(saved.params, live.param_groups, strict=False)
    ):
        group_path = f"{path}/param_groups/{number}"
        for position, (saved_param, param) in enumerate(
            zip(descriptions, group["params"], strict=False)
        ):
            saved_words = _param_words(saved_param, group_path)
            if torch.nn.parameter.is_lazy(param) or saved_words is None:
                continue
            if saved_words != describe(param):
                decoder.changed(f"{group_path}/params/{position}", saved_words, describe(param))
                same = False
        same = _same_names(saved.groups[number], group, group_path, decoder) and same
    return same


def _count(counts: list[int]) -> str:
    groups = "1 group" if len(counts) == 1 else f"{len(counts)} groups"
    numbers = " + ".join(map(str, counts)) or "0"
    return f"{groups} of {numbers} parameters"


def _param_words(param: Node, path: str) -> str | None:
    if param is None:
        return None
    if not isinstance(param, list) or len(param) != 3 or not isinstance(param[1], list):
        raise malformed(path, "its parameters are malformed")
    return f"{param[0]}[{', '.join(map(str, param[1]))}]"


def _same_names(
    saved: dict[str, Node], live: dict[str, Any], path: str, decoder: Decoder
) -> bool:
    """Parameters correspond by order alone; where both sides know names, a changed
    order can be seen."""
    names, live_names = saved.get("param_names"), live.get("param_names")
    if not isinstance(names, list) or not isinstance(live_names, list):
        return True
    names = [name for name in names if isinstance(name, str)]
    if [bare(name) for name in names] == [bare(name) for name in live_names]:
        return True
    decoder.changed(f"{path}/param_names", _shortened(names), _shortened(live_names))
    return False


def _shortened(names: list[str]) -> str:
    text = ", ".join(names)
    return text if len(text) <= 200 else f"{text[:200]}… ({len(names)} names)"


# -- in place -----------------------------------------------------------------


def _restore_in_place(
    saved: _SavedState, live: Optimizer, path: str, decoder: Decoder
) -> None:
    params: dict[int, tuple[torch.Tensor, str, dict[str, Node]]] = {}
    for ids, group, described, live_group in zip(
        saved.ids, saved.groups, saved.params, live.param_groups, strict=True
    ):
        for number, description, param in zip(ids, described, live_group["params"], strict=True):
            device = description[2] if description else str(param.device)
            params[number] = (param, str(device), group)
    state: list[tuple[Any, Any]] = []
    for key_node, entry in saved.state:
        key = decoder.decode(key_node, NOTHING, path)
        entry_path = f"{path}/state/{key}"
        if not isinstance(key, int) or key not in params:
            state.append((key, _decode_entry(entry, entry_path, decoder)))
        else:
            param, device, group = params[key]
            placing = _Placing(param, device, group)
            state.append((param, _entry_in_place(entry, placing, live, entry_path, decoder)))
    groups = [
        _group_in_place(group, live_group, f"{path}/param_groups/{number}", decoder)
        for number, (group, live_group) in enumerate(
            zip(saved.groups, live.param_groups, strict=True)
        )
    ]
    decoder.finish(lambda: _apply(live, state, groups))


def _apply(
    live: Optimizer, state: list[tuple[Any, Any]], groups: list[dict[str, Any]]
) -> None:
    entries = []
    for key, value in state:
        current = live.state.get(key)
        if isinstance(value, dict) and isinstance(current, dict):
            current.clear()
            current.update(value)
            value = current
        entries.append((key, value))
    live.state.clear()
    live.state.update(entries)
    for group, values in zip(live.param_groups, groups, strict=True):
        group.update(values)
    # Subclasses fill in there what older versions of them did not save.
    live.__setstate__({"state": live.state, "param_groups": live.param_groups})


class _Placing:
    """Where the tensors of one parameter's state belong."""

    def __init__(self, param: torch.Tensor, saved_device: str, group: dict[str, Node]) -> None:
        self.param = param
        self._saved_device = saved_device
        self._on_device = group.get("capturable") is True or group.get("fused") is True

    def device(self, name: str, saved: str) -> torch.device:
        """For the tensor `name` that was saved from the device `saved`."""
        cpu = torch.device("cpu")
        if torch.device(self._saved_device).type != "cpu":
            # It shows whether the tensor was with its parameter or offloaded.
            return cpu if saved.startswith("cpu") else self.param.device
        if name == "step" and not self._on_device:
            return cpu
        return self.param.device


def _entry_in_place(
    entry: Node, placing: _Placing, live: Optimizer, path: str, decoder: Decoder
) -> Any:
    current = live.state.get(placing.param)
    if isinstance(entry, dict):
        return _moved(decoder.decode(entry.get("v"), NOTHING, path), "", placing, decoder)
    values: dict[str, Any] = {}
    for name, node in _entry_pairs(entry, path).items():
        existing = current.get(name) if isinstance(current, dict) else None
        value_path = f"{path}/{name}"
        tag = node.get("!") if isinstance(node, dict) else None
        if tag not in ("torch.tensor", "torch.sparse") or "id" in node:
            # Plain values, and tensors in lists (LBFGS) or shared by parameters.
            value = decoder.decode(node, NOTHING, value_path)
            values[name] = _moved(value, name, placing, decoder)
            continue
        device = placing.device(name, str(node.get("device", "cpu")))
        if _can_hold(existing, node, device, decoder):
            values[name] = decoder.decode(node, existing, value_path)
        elif tag == "torch.tensor":
            values[name] = decode_tensor(node, NOTHING, value_path, decoder, device)
        else:
            values[name] = decode_sparse(node, NOTHING, value_path, decoder, device)
    return values


def _can_hold(
    existing: object, node: dict[str, Node], device: torch.device, decoder: Decoder
) -> bool:
    """Whether the live state tensor can be written in place and be exactly as saved."""
    if (
        type(existing) is not torch.Tensor
        or node["!"] != "torch.tensor"
        or "offset" in node
        or existing.layout is not torch.strided
        or existing.device != device
        or existing.is_meta
    ):
        return False
    if name_of(existing.dtype) != node.get("dtype") or type(node.get("leaf")) is not int:
        return False
    storage = existing.untyped_storage()
    if decoder.alias(("torch.claimed", str(device), storage.data_ptr())):
        return False  # it shares memory with something else that is restored
    _, shape = decoder.spec(node["leaf"])
    return tuple(existing.shape) == tuple(shape)[: existing.dim()]


def _moved(value: Any, name: str, placing: _Placing, decoder: Decoder) -> Any:
    """`value` with its tensors where they belong. A container is changed in place,
    after the bytes came."""
    if isinstance(value, torch.Tensor):
        device = placing.device(name, "cuda")
        if value.device == device:
            return value
    elif all(tensor.device == placing.device(name, "cuda") for tensor in _tensors(value)):
        return value
    raise NotImplementedError


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _group_in_place(
    saved: dict[str, Node], live: dict[str, Any], path: str, decoder: Decoder
) -> dict[str, Any]:
    """Values to put into the live group."""
    values: dict[str, Any] = {}
    for name, node in saved.items():
        if name in ("params", "param_names"):
            continue
    return values


def _load(optimizer: Optimizer, state: Any, path: str) -> None:
    try:
        optimizer.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise StateError(
            f"load_state_dict of {type_name(type(optimizer))} at {path!r} failed: {error}",
            hint="The optimizer may be partly restored: do not go on with it.",
        ) from error


def _load_and_repair(optimizer: Optimizer, state: dict[str, Any], path: str) -> None:
    ...
