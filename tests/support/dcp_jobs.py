"""What ranks do in the tests of `holdfast.torch.dcp`."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from holdfast.torch.dcp import StorageReader, StorageWriter
from tests.support.forked_ranks import die

dcp: Any = torch.distributed.checkpoint

PLACEMENTS: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {
    "rows": ((-1,), (Shard(0),)),
    "columns": ((-1,), (Shard(1),)),
    "whole": ((-1,), (Replicate(),)),
    "hsdp": ((2, -1), (Replicate(), Shard(0))),
    "grid": ((2, -1), (Shard(0), Shard(1))),
}
"""Shape of the mesh, and how a tensor lies on it."""


def full(number: int, shape: tuple[int, ...] = (7, 5)) -> torch.Tensor:
    """The same on all ranks."""
    return torch.arange(shape[0] * shape[1], dtype=torch.float32).reshape(shape) + 1000 * number


def sharded(layout: str, size: int, tensor: torch.Tensor) -> DTensor:
    dims, placements = PLACEMENTS[layout]
    known = abs(int(torch.tensor(dims).prod()))
    mesh = init_device_mesh("cpu", tuple(size // known if dim < 0 else dim for dim in dims))
    return distribute_tensor(tensor, mesh, placements)


def save(rank: int, size: int, address: str, step: int, layout: str, changed: int = 0) -> None:
    """Tensors of one layout, a replicated one, and values of which one is a rank's own."""
    state = {
        "model": {
            "a.weight": sharded(layout, size, full(1)),
            "b.weight": sharded(layout, size, full(2) + changed),
            "plain": torch.ones(3),
        },
        "step": step,
        f"rank{rank}": {"note": "x" * 5000 + str(rank), "twice": (shared := {"n": rank}, shared)},
    }
    dcp.save(state, storage_writer=StorageWriter(address, step=step))


def over_s3(rank: int, size: int, address: str, environment: dict[str, str]) -> dict[str, Any]:
    os.environ.update(environment)
    save(rank, size, address, 5, "rows")
    return load(rank, size, f"{address}@latest", "columns")


def twice(rank: int, size: int, address: str, layout: str) -> None:
    save(rank, size, address, 1, layout)
    save(rank, size, address, 2, layout, changed=1)


def load(rank: int, size: int, reference: str, layout: str) -> dict[str, Any]:
    """What another layout, on any number of ranks, gets of it."""
    state = {
        "model": {
            "a.weight": sharded(layout, size, torch.zeros(7, 5)),
            "b.weight": sharded(layout, size, torch.zeros(7, 5)),
            "plain": torch.zeros(3),
        },
        "step": 0,
    }
    dcp.load(state, storage_reader=StorageReader(reference))
    model: Any = state["model"]
    whole = {name: getattr(t, "full_tensor", lambda t=t: t)().tolist() for name, t in model.items()}
    return {**whole, "step": state["step"]}


def build(size: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model of uneven shards under FSDP2, and its optimizer."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    mesh = init_device_mesh("cpu", (size,))
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.05)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)  # the same batch everywhere
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model: torch.nn.Module) -> dict[str, list[Any]]:
    return {name: value.full_tensor().tolist() for name, value in model.state_dict().items()}


def fsdp(
    rank: int, size: int, address: str, until: int, end: int = 0, asynchronous: str = ""
) -> dict[str, list[Any]]:
    """Train up to `until` and save there; go on from what is there; the weights at `end`."""
    model, optimizer = build(size)
    done = 0
    if Path(address).exists():
        names, state = get_state_dict(model, optimizer)
        both = {"model": names, "optim": state, "done": 0}
        dcp.load(both, storage_reader=StorageReader(address))
        set_state_dict(
            model, optimizer, model_state_dict=both["model"], optim_state_dict=both["optim"]
        )
        done = both["done"]
    train(model, optimizer, range(done, until))
    if until > done:
        names, state = get_state_dict(model, optimizer)
        both = {"model": names, "optim": state, "done": until}
        writer = StorageWriter(address, step=until, metrics={"done": until})
        if asynchronous:
            kind = AsyncCheckpointerType[asynchronous]
            # The training uses the other one meanwhile.
            group: Any = dist.new_group(backend="gloo")
            saved = dcp.async_save(
                both, storage_writer=writer, async_checkpointer_type=kind, process_group=group
            )
            train(model, optimizer, range(until, max(until, end)))
            saved.result()
            return weights(model)
        dcp.save(both, storage_writer=writer)
    train(model, optimizer, range(until, end))
    return weights(model)


class Dying(StorageWriter):
    """Ends a rank's process at one place of the protocol."""

    def __init__(self, address: str, step: int, rank: int, place: str) -> None:
        super().__init__(address, step=step)
        self.who, self.place = rank, place

    def _at(self, place: str) -> None:
        if place == self.place and dist.get_rank() == self.who:
            die()

    def write_data(self, plan: Any, planner: Any) -> Any:
        self._at("before writing")
        written = super().write_data(plan, planner)
        self._at("after writing")
        return written

    def finish(self, metadata: Any, results: Any) -> None:
        self._at("before the commit")
        super().finish(metadata, results)
        self._at("after the commit")


def dying(rank: int, size: int, address: str, step: int, who: int, place: str) -> None:
    state = {"w": sharded("rows", size, full(step)), "step": step}
    dcp.save(state, storage_writer=Dying(address, step, who, place))


def apart(rank: int, size: int, address: str) -> str:
    """What is said where each rank has a folder of its own under one name."""
    state = {"w": sharded("rows", size, full(1))}
    try:
        dcp.save(state, storage_writer=StorageWriter(f"{address}{rank}", step=1))
    except dcp.api.CheckpointException as error:
        return str(error.failures[0][0])
    return ""


def lost(rank: int, size: int, address: str) -> str:
    """What is said where one rank cannot find what all are to load."""
    place = f"{address}-elsewhere" if rank else address
    try:
        dcp.load({"step": 0}, storage_reader=StorageReader(place))
    except dcp.api.CheckpointException as error:
        return str({rank: str(cause) for rank, (cause, _) in error.failures.items()})
    return ""


class Odd:
    """No plain value."""


def refused(rank: int, size: int, address: str) -> str:
    """What each rank is told of a value that one of them cannot save; then a save that works."""
    told = ""
    state = {"w": sharded("rows", size, full(1)), f"odd{rank}": Odd() if rank else 1}
    try:
        dcp.save(state, storage_writer=StorageWriter(address, step=1))
    except dcp.api.CheckpointException as error:
        told = str({rank: str(cause) for rank, (cause, _) in error.failures.items()})
    gc.collect()
    state = {"w": sharded("rows", size, full(1))}
    dcp.save(state, storage_writer=StorageWriter(address, step=2))
    return told
