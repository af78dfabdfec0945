"""One rank of a training on the CPU, for test_two_ranks.py: `python -m … FOLDER KIND STOP`.

It prints the samples of each step and the weights, as JSON. With STOP it ends with an exception
in that step.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

import holdfast

SAMPLES = 22


def main(folder: str, kind: str, stop: int) -> None:
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model: Any = torch.nn.Linear(1, 1)
    data = torch.arange(SAMPLES, dtype=torch.float32)[:, None]
    sampler: Any = None
    if kind == "torch":
        dist.init_process_group("gloo")
        sampler = DistributedSampler(data, seed=4)  # type: ignore[arg-type]
        loader: Any = DataLoader(data, 2, sampler=sampler)  # type: ignore[arg-type]
        model = DistributedDataParallel(model)
    else:
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        loader = DataLoader(data, 2, shuffle=True)  # type: ignore[arg-type]
        model, loader = accelerator.prepare(model, loader)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    rows: list[Any] = []
    with holdfast.Run(f"{folder}/{rank}", every=1, quiet=True) as run:
        run.track(model=model, optimizer=optimizer, data=loader)
        for epoch in run.epochs(3):
            if sampler is not None:
                sampler.set_epoch(epoch)
            for batch in run.batches(loader):
                if run.step == stop:
                    raise KeyboardInterrupt
                noise = 0.1 * torch.rand(batch.shape)
                loss = (model(batch + noise) - 1).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rows.append([epoch, run.step, batch[:, 0].int().tolist()])
    weights = [value.flatten().tolist() for value in model.state_dict().values()]
    print(json.dumps({"rows": rows, "weights": weights}))
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    except KeyboardInterrupt:
        os._exit(9)  # what others wait for does not matter
