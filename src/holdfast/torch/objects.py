"""Schedulers, gradient scalers and generators; sizes, dtypes and devices as values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from holdfast.core.adapters import NOTHING, Decoder, Encoder
from holdfast.core.classes import type_name
from holdfast.core.leaves import settle
from holdfast.core.types import Node
from holdfast.errors import StateError
from holdfast.torch.dtypes import name_of
from holdfast.torch.saved import malformed, naturals

STATEFUL = (LRScheduler, torch.amp.GradScaler)
# Parts of a scheduler's state that have one item per optimizer group or sub-scheduler.
_COUNTED = ("_schedulers", "base_lrs", "lr_lambdas", "min_lrs")


# -- schedulers and scalers ---------------------------------------------------


def encode_stateful(value: Any, path: str, encoder: Encoder) -> Node:
    node = encoder.encode(value.state_dict(), path)
    return {"!": "torch.object", "type": type_name(type(value)), "v": node}


def decode_stateful(node: dict[str, Node], target: object, path: str, decoder: Decoder) -> Any:
    """Into the live scheduler or scaler `target`, or the state_dict if there is none."""
    state = decoder.decode(node.get("v"), NOTHING, path)
    if not isinstance(target, STATEFUL):
        return state
    saved_kind, live_kind = str(node.get("type")), type_name(type(target))
    if saved_kind.rpartition(":")[2] != live_kind.rpartition(":")[2]:
        decoder.changed(path, saved_kind, live_kind)
        return target
    if not isinstance(state, dict):
        raise malformed(path, "its state is not a dict")
    if isinstance(target, LRScheduler):
        if _same_counts(state, target, path, decoder):
            decoder.finish(lambda: _load_scheduler(target, state, path))
    elif target.is_enabled() and not state:
        decoder.changed(path, "the state of a disabled scaler", "an enabled scaler")
    else:
        if decoder.selection:
            state = {**target.state_dict(), **state}  # it takes nothing less than all
        decoder.finish(lambda: _load(target, state, path))
    return target


def _same_counts(state: dict[Any, Any], live: LRScheduler, path: str, decoder: Decoder) -> bool:
    """A scheduler takes any state and fails steps later if its lists have other lengths."""
    current = live.state_dict()
    same = True
    for name in _COUNTED:
        saved, here = state.get(name), current.get(name)
        if isinstance(saved, list) and isinstance(here, list) and len(saved) != len(here):
            decoder.changed(f"{path}/{name}", f"{len(saved)} items", f"{len(here)} items")
            same = False
    return same


def _load_scheduler(scheduler: LRScheduler, state: dict[Any, Any], path: str) -> None:
    state = _on_devices_of(state, scheduler.state_dict())
    optimizer = getattr(scheduler, "optimizer", None)
    groups = getattr(optimizer, "param_groups", [])
    with _unchanged(groups):
        _load(scheduler, state, path)


def _load(value: Any, state: dict[Any, Any], path: str) -> None:
    try:
        value.load_state_dict({key: settle(item) for key, item in state.items()})
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise StateError(
            f"load_state_dict of {type_name(type(value))} at {path!r} failed: {error}",
            hint="It may be partly restored: do not go on with it.",
        ) from error


@contextlib.contextmanager
def _unchanged(groups: list[dict[str, Any]]) -> Iterator[None]:
    """Learning rates belong to the optimizer, which restores them itself: a scheduler
    that sets them while loading would undo that."""
    before = [
        {
            name: value.clone() if isinstance(value, torch.Tensor) else value
            for name, value in group.items()
            if name != "params"
        }
        for group in groups
    ]
    yield
    for group, values in zip(groups, before, strict=True):
        for name, value in values.items():
            current = group.get(name)
            if isinstance(value, torch.Tensor) and isinstance(current, torch.Tensor):
                if not torch.equal(current, value):
                    with torch.no_grad():
                        current.copy_(value)
            elif current is not value:
                group[name] = value


def _on_devices_of(value: Any, live: Any) -> Any:
    """`value` with tensors (learning rates may be) on the device of their live ones."""
    if isinstance(value, torch.Tensor):
        return value.to(live.device) if isinstance(live, torch.Tensor) else value
    if type(value) is dict and isinstance(live, dict):
        return {key: _on_devices_of(item, live.get(key)) for key, item in value.items()}
    if type(value) is list and isinstance(live, list) and len(live) == len(value):
        return [_on_devices_of(item, here) for item, here in zip(value, live, strict=True)]
    return value


# -- generators ---------------------------------------------------------------


def encode_generator(value: torch.Generator, path: str, encoder: Encoder) -> Node:
    state = encoder.encode(value.get_state(), path)
    return {"!": "torch.generator", "device": str(value.device), "v": state}


def decode_generator(node: dict[str, Node], target: object, path: str, decoder: Decoder) -> Any:
    """Into the live generator `target`, or a new one on its device."""
    state = decoder.decode(node.get("v"), NOTHING, path)
    text = node.get("device")
    if not isinstance(state, torch.Tensor) or state.dtype != torch.uint8:
        raise malformed(path, "the state of its generator is no bytes")
    if isinstance(target, torch.Generator):
        if torch.device(_device_text(text, path)).type != target.device.type:
            decoder.changed(path, f"a generator on {text}", f"a generator on {target.device}")
            return target
        generator = target
    else:
        try:
            generator = torch.Generator(_device_text(text, path))
        except RuntimeError:
            raise StateError(
                f"{path!r} is a generator on {text!r}, which is not here",
                hint="Leave it out with skip=, or load it where that device is.",
            ) from None

    def finish() -> None:
        try:
            generator.set_state(state)
        except RuntimeError as error:
            raise malformed(path, f"the state of its generator is refused: {error}") from None

    decoder.finish(finish)
    return generator


def _device_text(text: Node, path: str) -> str:
    try:
        return str(torch.device(text))
    except (RuntimeError, TypeError):
        raise malformed(path, f"{text!r} is no device") from None


# -- values -------------------------------------------------------------------

_NAMED = (torch.dtype, torch.layout, torch.memory_format)


def encode_value(value: object) -> Node | None:
    """The node of a torch value that has no state; None for anything else."""
    if isinstance(value, torch.Size):
        return {"!": "torch.size", "v": list(value)}
    if isinstance(value, torch.device):
        return {"!": "torch.device", "v": str(value)}
    if isinstance(value, _NAMED):
        return {"!": "torch.name", "v": name_of(value)}
    return None


def decode_value(node: dict[str, Node], path: str) -> Any:
    value = node.get("v")
    if node["!"] == "torch.size":
        return torch.Size(naturals(value, path))
    if node["!"] == "torch.device":
        return torch.device(_device_text(value, path))
    found = getattr(torch, value, None) if isinstance(value, str) else None
    if not isinstance(found, _NAMED):
        raise malformed(path, f"torch has no dtype, layout or memory format {value!r}")
    return found
