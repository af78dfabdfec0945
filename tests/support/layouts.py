"""One small model in each way of dividing it among processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from holdfast.torch.modules import bare


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """Nine words, of which no world size but 1 and 3 has as many rows in each rank."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 4)
        self.blocks = nn.ModuleList(Block(4, 6) for _ in range(2))
        self.head = nn.Linear(4, 9, bias=False)
        self.register_buffer("seen", torch.zeros(3))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, 0.1, 0.9)  # nothing is zero, or what another one is
        if tied:
            self.head.weight = self.words.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.words(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def plain(model: Net, size: int) -> nn.Module:
    return model


def ddp(model: Net, size: int) -> nn.Module:
    return DistributedDataParallel(model)


def _sharded(model: Net, **options: Any) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def fsdp(model: Net, size: int) -> nn.Module:
    return _sharded(model)


def fsdp_columns(model: Net, size: int) -> nn.Module:
    """Parameters are cut where it leaves no rest: on dimension 1, else on 0."""
    return _sharded(
        model,
        shard_placement_fn=lambda p: Shard(1) if p.ndim == 2 and p.shape[1] % size == 0 else None,
    )


def fsdp_mixed(model: Net, size: int) -> nn.Module:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return _sharded(model, mp_policy=policy)


def fsdp_offloaded(model: Net, size: int) -> nn.Module:
    return _sharded(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


def hsdp(model: Net, size: int) -> nn.Module:
    return _sharded(
        model, mesh=init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("copy", "cut"))
    )


def _parallel(model: Net, mesh: Any) -> None:
    parallelize_module(
        model,
        mesh,
        {
            "words": RowwiseParallel(input_layouts=Replicate()),
            "head": ColwiseParallel(output_layouts=Replicate()),
        },
    )
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def tp(model: Net, size: int) -> nn.Module:
    _parallel(model, init_device_mesh("cpu", (size,), mesh_dim_names=("tp",)))
    return model


def sequence(model: Net, size: int) -> nn.Module:
    """Its norms work on a part of each sequence: their parameters are replicated DTensors."""
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))
    parallelize_module(
        model,
        mesh,
        {
            "words": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        },
    )
    for block in model.blocks:
        parallelize_module(
            block,
            mesh,
            {
                "norm": SequenceParallel(),
                "up": ColwiseParallel(input_layouts=Shard(1)),
                "down": RowwiseParallel(output_layouts=Shard(1)),
            },
        )
    return model


def fsdp_tp(model: Net, size: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "tp"))
    _parallel(model, mesh["tp"])
    return _sharded(model, mesh=mesh["dp"])


def tp_in_copies(model: Net, size: int) -> nn.Module:
    """Tensor-parallel in each half of the ranks; the halves have the same."""
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "tp"))
    _parallel(model, mesh["tp"])
    return model


LAYOUTS: dict[str, tuple[Callable[[Net, int], nn.Module], tuple[int, ...]]] = {
    made.__name__: (made, sizes)
    for made, sizes in [
        (plain, (1,)),
        (ddp, (2, 3)),
        (fsdp, (2, 4)),
        (fsdp_columns, (2,)),
        (fsdp_mixed, (3,)),
        (fsdp_offloaded, (2,)),
        (hsdp, (4,)),
        (tp, (2, 3)),
        (sequence, (2,)),
        (fsdp_tp, (4,)),
        (tp_in_copies, (4,)),
    ]
}
"""Name -> how, and in which sizes."""


def named(model: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    """Parameters by the names that they have without wrappers, in the sharded state."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    return [(bare(name), parameter) for name, parameter in model.named_parameters()]


def full(value: Any) -> torch.Tensor:
    """All of a tensor, in each rank, as torch gathers it."""
    whole = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole.detach().cpu().clone()


def full_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Parameters, and what the optimizer knows of each, by name."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in named(model):
        found[name] = full(parameter)
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                found[f"{name}/{key}"] = full(value)
    return found
