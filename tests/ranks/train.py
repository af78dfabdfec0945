"""A training of several ranks, which is ended and started again.

    python train.py ADDRESS RESULT KIND EPOCHS EVERY STOP

In each step from STOP on rank 0 is asked to stop, if it is not 0. In the environment: WORKERS of
its loader; HOLD, a file: as long as it is there nobody gets beyond the fifth step. What torchrun
has started notes its pid in the file RESULT.starts.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import holdfast

_FEATURES, _SAMPLES, _BATCH = 12, 48, 4


def model_of(kind: str, world: int, device: torch.device) -> torch.nn.Module:
    torch.manual_seed(7)
    net: Any = torch.nn.Sequential(
        torch.nn.Linear(_FEATURES, 17),
        torch.nn.BatchNorm1d(17) if kind == "ddp" else torch.nn.Tanh(),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(17, 1),
    ).to(device)
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(net)
    if kind == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        warnings.simplefilter("ignore", FutureWarning)  # it is deprecated
        return FullyShardedDataParallel(net, device_id=device, use_orig_params=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world,))
    for layer in (net[0], net[3], net):
        fully_shard(layer, mesh=mesh)
    return net


def main() -> None:
    address, result, kind, epochs, every, stop = sys.argv[1:]
    device = torch.device(os.environ.get("DEVICE", "cpu"))
    dist.init_process_group(os.environ.get("BACKEND", "gloo"))
    rank, world = dist.get_rank(), dist.get_world_size()
    if restart := os.environ.get("TORCHELASTIC_RESTART_COUNT"):
        with open(f"{result}.starts", "a") as file:
            file.write(f"{restart} {rank} {os.getpid()}\n")
    model = model_of(kind, world, device)
    torch.manual_seed(100 + rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.9)
    data = torch.randn(_SAMPLES, _FEATURES + 1, generator=torch.Generator().manual_seed(1))
    sampler = torch.utils.data.distributed.DistributedSampler(data, seed=3)  # pyright: ignore
    workers = int(os.environ.get("WORKERS", "0"))
    loader = torch.utils.data.DataLoader(data, _BATCH, sampler=sampler, num_workers=workers)  # pyright: ignore
    run = holdfast.Run(address, every=int(every) if every.isdigit() else every, keep="last=2")
    run.track(model=model, optimizer=optimizer, scheduler=scheduler)
    box = run.box(losses=[])
    with run:
        for epoch in run.epochs(int(epochs)):
            sampler.set_epoch(epoch)
            for batch in run.batches(loader):
                batch = batch.to(device)
                loss = (model(batch[:, :-1]) - batch[:, -1:]).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
                box.losses.append(loss.item())
                if rank == 0 and 0 < int(stop) <= run.step:
                    os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)  # so that signals come between steps
                while run.step == 4 and os.path.exists(os.environ.get("HOLD", "")):
                    time.sleep(0.01)
            run.log(loss=sum(box.losses[-3:]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        whole = {
            name: getattr(value, "full_tensor", lambda value=value: value)().double().sum().item()
            for name, value in model.state_dict().items()
        }
    whole = {name: value.hex() for name, value in whole.items()}
    told = {"model": whole, "losses": box.losses, "next": torch.randn(1).item()}
    Path(f"{result}.{rank}").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()
    os.write(1, f"rank {rank} is done\n".encode())


if __name__ == "__main__":
    main()
