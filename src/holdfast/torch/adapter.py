"""The adapter: which node and which function belong to which torch value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from holdfast.core.adapters import Decoder, Encoder, Waiting
from holdfast.core.classes import type_name
from holdfast.core.group import Group
from holdfast.core.types import Node
from holdfast.errors import FormatTooNew
from holdfast.torch import attributes, buckets, contents, flat_optimizers, fsdp1, rng, settings
from holdfast.torch.accelerated import unwrapped
from holdfast.torch.gradients import Gradients, gradients_aside
from holdfast.torch.group import process_group
from holdfast.torch.modules import decode_module, encode_module
from holdfast.torch.objects import (
    STATEFUL,
    decode_generator,
    decode_stateful,
    decode_value,
    encode_generator,
    encode_stateful,
    encode_value,
)
from holdfast.torch.optimizers import decode_optimizer, encode_optimizer
from holdfast.torch.overlap import Barrier
from holdfast.torch.sharded import mark_shared
from holdfast.torch.sparse import decode_sparse, encode_sparse
from holdfast.torch.tensors import check_supported, decode_tensor, encode_tensor
from holdfast.torch.together import TOGETHER, encode_together
from holdfast.torch.untracked import find_untracked, tracked_optimizers, untracked_parameters

# Tag -> what it restores into in place, in words, and how.
_LIVE: dict[str, tuple[Any, str, Callable[[dict[str, Node], object, str, Decoder], Any]]] = {
    "torch.tensor": (torch.Tensor, "a tensor", decode_tensor),
    "torch.sparse": (torch.Tensor, "a sparse tensor", decode_sparse),
    "torch.module": (torch.nn.Module, "a module", decode_module),
    "torch.optimizer": (torch.optim.Optimizer, "an optimizer", decode_optimizer),
    "torch.object": (STATEFUL, "a scheduler or scaler", decode_stateful),
    "torch.generator": (torch.Generator, "a generator", decode_generator),
}
_STATE_DICTS = frozenset({"dict", "odict"})
_IN_PLACE = (
    torch.Tensor,
    torch.nn.Module,
    torch.optim.Optimizer,
    torch.Generator,
    torch.optim.lr_scheduler.LRScheduler,
    torch.amp.GradScaler,
)
_VALUES = ("torch.size", "torch.device", "torch.name")


class TorchAdapter:
    """Implements core.adapters.Adapter for PyTorch."""

    name = "torch"
    together = TOGETHER
    contents = contents
    """What objects hold, for the search for state that nobody saves."""
    process_group = staticmethod(process_group)

    def mark_common(self, state: Mapping[str, object], encoder: Encoder) -> None:
        """Parameters of modules: an optimizer may stand in front of the module that has them."""
        for name, value in state.items():
            module = unwrapped(value)
            own = encoder.own is not None and encoder.own(name)
            if isinstance(module, torch.nn.Module) and not own:
                mark_shared(module.parameters(), encoder)
                fsdp1.parameters(module)  # known to optimizers from now on
        optimizers = tracked_optimizers(state)
        flat_optimizers.meet((optimizer for _, optimizer in optimizers), encoder)

    def encode(self, value: object, path: str, encoder: Encoder) -> Node | None:
        if isinstance(value, torch.Tensor):
            return _encode_tensor(value, path, {}, encoder)
        value = unwrapped(value)
        if isinstance(value, torch.nn.Module):
            return encode_module(value, path, encoder)
        if isinstance(value, torch.optim.Optimizer):
            return encode_optimizer(value, path, encoder)
        if isinstance(value, STATEFUL):
            return encode_stateful(value, path, encoder)
        if isinstance(value, torch.Generator):
            return encode_generator(value, path, encoder)
        return encode_value(value)

    def encode_together(self, waiting: Sequence[Waiting], encoder: Encoder) -> None:
        encode_together(waiting, encoder, _encode_tensor)

    def decode(self, node: dict[str, Node], target: object, path: str, decoder: Decoder) -> Any:
        tag = node["!"]
        if tag in _VALUES:
            return decode_value(node, path)
        if tag not in _LIVE:
            raise FormatTooNew(
                f"{path!r} is a {tag[:80]!r}, which this Holdfast does not know",
                hint="Upgrade: pip install -U holdfast",
            )
        kind, words, decode = _LIVE[tag]
        inner = unwrapped(target)
        if not isinstance(inner, kind) and self.is_live(inner):
            decoder.changed(path, words, f"a {type_name(type(inner))}")
            return target
        value = decode(node, inner, path, decoder)
        return target if value is inner else value

    def state_node(self, node: dict[str, Node], target: object) -> dict[str, Node] | None:
        """A dict that was saved, as the state_dict of the live module that it is to go to."""
        if not isinstance(unwrapped(target), torch.nn.Module) or node["!"] not in _STATE_DICTS:
            return None
        kind = type_name(type(unwrapped(target)))
        return {"!": "torch.module", "type": kind, "v": {**node, "!": "odict"}}

    def is_live(self, value: object) -> bool:
        return isinstance(unwrapped(value), _IN_PLACE)

    def find_untracked(self, scope: Mapping[str, Any], tracked: Mapping[str, Any]) -> list[str]:
        """Names in a caller's frame of what should be tracked, too."""
        return find_untracked(scope, tracked)

    def untracked_parameters(self, tracked: Mapping[str, Any]) -> list[str]:
        """Parameters that tracked optimizers train and nothing tracked saves."""
        return untracked_parameters(tracked)

    def gradients(self) -> Gradients:
        """A watch on the gradients that tracked optimizers have not used yet."""
        return Gradients()

    def gradients_aside(self, tracked: Mapping[str, Any]) -> Callable[[], None]:
        """Take the gradients of tracked parameters away until the result is called."""
        return gradients_aside(tracked)

    def barrier(self, drain: Callable[[], None]) -> Barrier:
        """What calls `drain` before tracked optimizers change anything."""
        return Barrier(drain)

    def settings(self, tracked: Mapping[str, Any]) -> dict[str, Any] | None:
        """What tracked optimizers and schedulers were built with, by name."""
        return settings.read(tracked)

    def put_settings(self, tracked: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """Set some of them."""
        settings.write(tracked, values)

    def is_derived(self, name: str) -> bool:
        """Whether torch computed a setting from others."""
        return settings.is_derived(name)

    def attributes(self, tracked: Mapping[str, Any]) -> dict[str, Any]:
        """What programs change in tracked modules beside their state, by name."""
        return attributes.read(tracked)

    def put_attributes(self, tracked: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """Set those of them that are something else."""
        attributes.write(tracked, values)

    def unsaved_attributes(self, tracked: Mapping[str, Any]) -> dict[str, Any]:
        """Numbers that modules keep outside of their state, by name."""
        return attributes.unsaved(tracked)

    def bucket_orders(self, tracked: Mapping[str, Any]) -> dict[str, Any]:
        """See buckets.read."""
        return buckets.read(tracked)

    def put_bucket_orders(
        self, tracked: Mapping[str, Any], saved: Mapping[str, Any], group: Group
    ) -> dict[str, str]:
        """See buckets.write."""
        return buckets.write(tracked, saved, group)

    def write_pt(self, read: Callable[[], Any], file: Path) -> tuple[list[str], list[str]]:
        """See exports.write_pt."""
        from holdfast.torch.exports import write_pt

        return write_pt(read, file)

    def write_dcp(
        self, read: Callable[[], Any], folder: Path, target: Path
    ) -> tuple[list[str], list[str]]:
        """See exports.write_dcp."""
        from holdfast.torch.exports import write_dcp  # DCP takes a second to import

        return write_dcp(read, folder, target)

    def capture_rng(self) -> dict[str, object]:
        return rng.capture_rng()

    def apply_rng(self, states: dict[str, Any]) -> None:
        rng.apply_rng(states)

    def derived_rng(self, states: dict[str, Any], rank: int) -> dict[str, Any]:
        return rng.derived_rng(states, rank)


def _encode_tensor(
    value: torch.Tensor, path: str, node: dict[str, Node], encoder: Encoder
) -> dict[str, Node]:
    check_supported(value, path)
    if value.layout is torch.strided:
        return encode_tensor(value, path, node, encoder)
    node.update(encode_sparse(value, path, encoder))
    return node


adapter = TorchAdapter()
