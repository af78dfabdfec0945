"""Holdfast for PyTorch: modules, optimizers, schedulers, tensors and random states.

Tracked torch objects are found by themselves; this module is imported when one turns
up. For people who want no more than two functions:

    holdfast.torch.save_checkpoint("runs/a", model=model, optimizer=optimizer, step=step)
    holdfast.torch.load_checkpoint("runs/a", model=model, optimizer=optimizer)
"""

from __future__ import annotations

from importlib import import_module

from holdfast.errors import HoldfastError

try:
    import torch as _torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise HoldfastError(
        "holdfast.torch needs PyTorch", hint="pip install 'holdfast[torch]'"
    ) from None

from holdfast.torch.adapter import adapter as adapter
from holdfast.torch.group import process_group as process_group
from holdfast.torch.plain import load_checkpoint as load_checkpoint
from holdfast.torch.plain import save_checkpoint as save_checkpoint
from holdfast.torch.tensors import recorded_devices as recorded_devices
from holdfast.torch.untracked import find_untracked as find_untracked
from holdfast.torch.untracked import untracked_parameters as untracked_parameters

__all__ = [
    "adapter",
    "find_untracked",
    "load_checkpoint",
    "process_group",
    "recorded_devices",
    "save_checkpoint",
    "untracked_parameters",
]


def __getattr__(name: str) -> object:
    if name != "dcp":  # torch.distributed.checkpoint takes a second to import
        raise AttributeError(f"module 'holdfast.torch' has no attribute {name!r}")
    return import_module("holdfast.torch.dcp")


del _torch
