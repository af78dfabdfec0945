"""`torchrun --nproc-per-node N -m bench.group PLAN`: saves and restores of several ranks.

PLAN is JSON: `folder`, `mib` of parameters (Adam keeps twice as much), `kind` ("ddp", "fsdp"),
`rounds`, and `actions` of "save", "load", "loop" and "steps". Both tools take turns in the same
processes. Rank 0 prints JSON: for each tool a list with the figures of each round, in seconds:
`save`; `warm` and `cold` restores; of an asynchronous save the `stall`, which is for how long the
loop stood still, and `lost`, which is what the steps behind it took longer than as many without;
`written`, the bytes that are on the disk then. "steps" gives `boundary`, of Holdfast: what a step
of a `Run` takes that does nothing.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import holdfast
import holdfast.torch
from bench import durable

_WIDTH = 1024
_STEPS = 4
_EMPTY_STEPS = 400


def build(plan: dict[str, Any]) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    count = max(2, plan["mib"] // 4)
    net = torch.nn.Sequential(*(torch.nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(count)))
    model: torch.nn.Module = net
    if plan["kind"] == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(net)
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in net:
            fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
    return model, torch.optim.Adam(model.parameters())


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(4, _WIDTH)).square().mean().backward()
    optimizer.step()


class HoldfastTool:
    name = "Holdfast"

    def __init__(self, folder: Path, model: Any, optimizer: Any) -> None:
        group = holdfast.torch.process_group()
        self._manager = holdfast.CheckpointManager(folder, group=group, keep="last=1")
        self._state = {"model": model, "optimizer": optimizer}
        self._step = 0
        self._drained_s = 0.0
        self._hook = optimizer.register_step_pre_hook(self._drain)

    def _drain(self, *ignored: object) -> None:
        start = time.perf_counter()
        self._manager.drain()
        self._drained_s += time.perf_counter() - start

    def save(self) -> None:
        self._step += 1
        self._manager.save(self._step, self._state, block=True)

    def begin(self) -> Any:
        self._step += 1
        self._drained_s = 0.0
        steady = lambda source, path: True  # noqa: E731 -- the steps' hook drains
        return self._manager.save(self._step, self._state, in_place=steady).result

    def settle(self) -> None:
        """Wait until what the last save has retired is deleted."""
        self._manager.wait()

    def waited_s(self) -> float:
        """For how long the steps have waited for the last save."""
        return self._drained_s

    def load(self) -> None:
        self._manager.restore(dict(self._state))

    def close(self) -> None:
        self._hook.remove()
        self._manager.close()


class DcpTool:
    name = "DCP"

    def __init__(self, folder: Path, model: Any, optimizer: Any) -> None:
        self._folder, self._model, self._optimizer = folder, model, optimizer
        # Its thread's messages would get mixed up with those of the training.
        self._group: Any = dist.new_group(backend="gloo")

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self._model, self._optimizer)
        return {"model": model, "optimizer": optimizer}

    def save(self) -> None:
        dcp.save(self._state(), checkpoint_id=str(self._folder))  # pyright: ignore[reportPrivateImportUsage]

    def begin(self) -> Any:
        saved: Any = dcp.async_save(  # pyright: ignore[reportPrivateImportUsage]
            self._state(), checkpoint_id=str(self._folder), process_group=self._group
        )
        return saved.result

    def settle(self) -> None: ...

    def waited_s(self) -> float:
        return 0.0

    def load(self) -> None:
        state = self._state()
        dcp.load(state, checkpoint_id=str(self._folder))  # pyright: ignore[reportPrivateImportUsage]
        set_state_dict(
            self._model,
            self._optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )

    def close(self) -> None: ...


def main() -> None:
    plan = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("cpu:gloo")
    model, optimizer = build(plan)
    step(model, optimizer)
    found: dict[str, list[dict[str, float]]] = {}
    folders = {tool.name: Path(plan["folder"]) / tool.name for tool in (HoldfastTool, DcpTool)}
    for turn in range(plan["rounds"]):
        for kind in (HoldfastTool, DcpTool):
            folder = folders[kind.name]
            tool = kind(folder, model, optimizer)
            figures = _figures(tool, folder, model, optimizer, plan["actions"])
            if "steps" in plan["actions"] and kind is HoldfastTool:
                figures["boundary"] = _boundary_s(folder.with_name(f"empty{turn}"))
            tool.close()
            found.setdefault(kind.name, []).append(figures)
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def _figures(
    tool: HoldfastTool | DcpTool, folder: Path, model: Any, optimizer: Any, actions: list[str]
) -> dict[str, float]:
    found: dict[str, float] = {}
    if "save" in actions:
        tool.save()  # memory and threads are there for the next one
        step(model, optimizer)
        found["save"] = _timed(tool.save)
        tool.settle()
        dist.barrier()
        found["written"] = durable.nbytes_of(folder)
    if "load" in actions:
        for key in ("warm", "cold"):
            if _prepare(folder, key):
                found[key] = _timed(tool.load)
    if "loop" in actions:
        found |= _loop(tool, model, optimizer)
    return found


def _prepare(folder: Path, key: str) -> bool:
    """Have the page cache hold all of the folder, or nothing of it; False on all ranks if a file
    system in memory does not let that go."""
    done = [True]
    dist.barrier()
    if dist.get_rank() == 0:
        if key == "warm":
            durable.warm_cache(folder)
        else:
            done = [durable.cool(folder)]
    dist.broadcast_object_list(done)
    return done[0]


def _timed(work: Any) -> float:
    dist.barrier()
    start = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - start


def _loop(tool: HoldfastTool | DcpTool, model: Any, optimizer: Any) -> dict[str, float]:
    """Steps without a save, and as many behind one."""

    def steps() -> None:
        for _ in range(_STEPS):
            step(model, optimizer)

    steps()
    without = _timed(steps)
    start = time.perf_counter()
    wait = tool.begin()
    stall = time.perf_counter() - start
    steps()
    dist.barrier()
    took = time.perf_counter() - start
    stall += tool.waited_s()
    wait()
    return {"stall": stall, "lost": took - without}


def _boundary_s(folder: Path) -> float:
    run = holdfast.Run(folder, every="1h", quiet=True)
    with run:
        dist.barrier()
        start = time.perf_counter()
        for _ in run.range(_EMPTY_STEPS):
            pass
        return (time.perf_counter() - start) / _EMPTY_STEPS


if __name__ == "__main__":
    main()
