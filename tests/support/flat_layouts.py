"""The small model of `layouts` in FullyShardedDataParallel (FSDP1)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy

from holdfast.torch.modules import bare
from tests.support.layouts import LAYOUTS, Net

CPU = torch.device("cpu")
Options = Callable[[Net, int], dict[str, Any]]

_OPTIONS: dict[str, tuple[Options, tuple[int, ...]]] = {
    "full": (lambda net, size: {}, (2, 3, 4)),
    "flat": (lambda net, size: {"use_orig_params": False}, (2, 3)),
    "zero2": (lambda net, size: {"sharding_strategy": ShardingStrategy.SHARD_GRAD_OP}, (2,)),
    "copies": (lambda net, size: {"sharding_strategy": ShardingStrategy.NO_SHARD}, (2,)),
    "flat copies": (
        lambda net, size: {
            "sharding_strategy": ShardingStrategy.NO_SHARD,
            "use_orig_params": False,
        },
        (2,),
    ),
    "hybrid": (
        lambda net, size: {
            "sharding_strategy": ShardingStrategy.HYBRID_SHARD,
            "device_mesh": init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("copy", "cut")),
        },
        (4,),
    ),
    "mixed": (
        lambda net, size: {
            "mixed_precision": MixedPrecision(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32
            )
        },
        (2,),
    ),
    "ignored": (lambda net, size: {"ignored_modules": [net.head]}, (2,)),
    "flat ignored": (
        lambda net, size: {"ignored_modules": [net.head], "use_orig_params": False},
        (3,),
    ),
}
FLAT = {name: sizes for name, (_, sizes) in _OPTIONS.items()}
"""Name -> in which sizes."""


def wrapped(layout: str, net: Net, size: int) -> Any:
    """In this layout, or in one of `LAYOUTS`."""
    if layout not in _OPTIONS:
        return LAYOUTS[layout][0](net, size)
    options = {"use_orig_params": True, "device_id": CPU, **_OPTIONS[layout][0](net, size)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        ignored = options.pop("ignored_modules", None)
        for number, block in enumerate(net.blocks):
            net.blocks[number] = FullyShardedDataParallel(block, **options)
        return FullyShardedDataParallel(net, **options, ignored_modules=ignored)


def gathered(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Parameters, buffers and what the optimizer knows, by name, as torch's own state-dict API
    gathers them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = StateDictOptions(full_state_dict=True)
        both: Any = get_state_dict(model, optimizer, options=options)
    weights, state = both
    found = {bare(name): value.clone() for name, value in weights.items()}
    for name, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                found[f"{bare(name)}/{key}"] = value.clone()
    return found
