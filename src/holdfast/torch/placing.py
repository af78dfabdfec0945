"""Where the state tensors of an optimizer go: into live ones, or to the right device."""

from __future__ import annotations

from typing import Any

import torch

from holdfast.core.adapters import NOTHING, Decoder
from holdfast.core.leaves import settle
from holdfast.core.types import Node
from holdfast.torch.dtypes import name_of
from holdfast.torch.saved import Saved, read_node
from holdfast.torch.sharded import is_sharded, like
from holdfast.torch.sparse import decode_sparse
from holdfast.torch.tensors import decode_tensor, is_claimed


class Placing:
    """The live parameter that a piece of state belongs to."""

    def __init__(self, param: torch.Tensor, saved_device: str, on_device: bool) -> None:
        """`saved_device`: of the parameter, when it was saved. `on_device`: its group
        is fused or capturable, which keeps step counts beside the parameter."""
        self.param = param
        self._saved_with_cpu = saved_device.startswith("cpu")
        self._on_device = on_device

    def device(self, name: str, saved: str) -> torch.device:
        """For the tensor called `name` that was saved from the device `saved`."""
        if self._saved_with_cpu:
            # All was on the CPU, which does not tell where it belongs: torch's rule.
            beside = name != "step" or self._on_device
        else:
            beside = not saved.startswith("cpu")  # else it was offloaded
        return self.param.device if beside else torch.device("cpu")

    def sharded(self, saved: Saved) -> Any:
        """A new DTensor for what was saved, laid out as the parameter, if it has its shape.
        Else None: step counts are plain tensors."""
        if is_sharded(self.param) and saved.shape == tuple(self.param.shape):
            return like(self.param, saved.dtype)
        return None


class Moving:
    """A value whose tensors have to move once their bytes have come."""

    def __init__(self, value: Any, device: torch.device) -> None:
        self.value = value
        self.device = device


def entry_in_place(
    node: Node,
    pairs: list[Any] | None,
    current: object,
    placing: Placing,
    path: str,
    decoder: Decoder,
) -> Any:
    """One parameter's saved state. `pairs` are those of `node` if it is a plain dict,
    `current` is the live state. Pass the result through `moved` in a finisher."""
    if pairs is None:
        device = placing.device("", "")
        return Moving(decoder.decode(node, NOTHING, path), device)
    values: dict[Any, Any] = {}
    for name, value in pairs:
        existing = current.get(name) if isinstance(current, dict) else None
        values[name] = _value_in_place(
            value, str(name), existing, placing, f"{path}/{name}", decoder
        )
    if isinstance(current, dict):
        for name, existing in current.items():
            if name not in values and not decoder.selection.wanted(f"{path}/{name}"):
                values[name] = existing
    return values


def _value_in_place(
    node: Node, name: str, existing: object, placing: Placing, path: str, decoder: Decoder
) -> Any:
    if not isinstance(node, dict | list):
        return node
    tag = node.get("!") if isinstance(node, dict) else None
    if not isinstance(node, dict) or tag not in ("torch.tensor", "torch.sparse") or "id" in node:
        # A list of tensors (LBFGS), or one tensor that parameters share.
        return Moving(decoder.decode(node, NOTHING, path), placing.device(name, ""))
    device = placing.device(name, str(node.get("device", "cpu")))
    if _can_hold(existing, node, device, decoder):
        return decoder.decode(node, existing, path)
    if tag == "torch.sparse":
        return decode_sparse(node, NOTHING, path, decoder, device)
    fresh = placing.sharded(read_node(node, path, decoder))
    if fresh is not None:
        return decode_tensor(node, fresh, path, decoder)
    return decode_tensor(node, NOTHING, path, decoder, device)


def _can_hold(
    existing: object, node: dict[str, Node], device: torch.device, decoder: Decoder
) -> bool:
    """Whether the live tensor, once written, is exactly what was saved."""
    if (
        not isinstance(existing, torch.Tensor)
        or not (type(existing) is torch.Tensor or is_sharded(existing))
        or node["!"] != "torch.tensor"
        or "offset" in node  # it shared memory then
        or existing.layout is not torch.strided
        or existing.device != device
        or name_of(existing.dtype) != node.get("dtype")
        or existing.requires_grad
        or type(node.get("leaf")) is not int
    ):
        return False
    if is_claimed(existing, decoder):
        return False  # it shares memory with something that is restored, too
    _, shape = decoder.spec(node["leaf"])
    items = shape if len(shape) == existing.dim() else shape[:-1]
    return tuple(existing.shape) == tuple(items)


def moved(value: Any, memo: dict[int, Any]) -> Any:
    """`value` with everything that is `Moving` at its place. For finishers.

    `memo` keeps tensors that are one object one object.
    """
    if isinstance(value, Moving):
        return _to(settle(value.value), value.device, memo)
    if type(value) is dict:
        return {name: moved(item, memo) for name, item in value.items()}
    return settle(value)


def _to(value: Any, device: torch.device, memo: dict[int, Any]) -> Any:
    if isinstance(value, torch.Tensor):
        if value.device == device:
            return value
        key = id(value)
        if key not in memo:
            # The original is kept too, so that its id stays its own.
            memo[key] = (value, value.to(device))
        return memo[key][1]
    if type(value) is dict:
        for name, item in value.items():
            value[name] = _to(item, device, memo)
    elif type(value) is list:
        value[:] = [_to(item, device, memo) for item in value]
    elif type(value) is tuple:
        return tuple(_to(item, device, memo) for item in value)
    return value
