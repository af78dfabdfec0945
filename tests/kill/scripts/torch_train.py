"""Everything that a resume can get wrong, in one short torch training."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import holdfast
from holdfast.core.digest import digest
from tests.kill.child import place

run_dir, out, workers = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
random.seed(1)
np.random.seed(2)
torch.manual_seed(3)


class Noisy(Dataset[tuple[torch.Tensor, int]]):
    """Augments with all three random generators."""

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        noise = random.random() + np.random.rand() + torch.rand(16)
        return torch.arange(16) * (index % 7) / 50 + noise / 10, index % 3


train = DataLoader(Noisy(), batch_size=8, shuffle=True, num_workers=workers)
model = nn.Sequential(
    nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 3)
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)
average = torch.optim.swa_utils.AveragedModel(model)

with holdfast.Run(
    run_dir, every=3, keep="last=2 best=1:val_loss", mirror=os.environ.get("MIRROR"), quiet=True
) as run:
    run.track(model=model, optimizer=optimizer, scheduler=scheduler, average=average)
    box = run.box(losses=[], rates=[], prologues=[])
    for epoch in run.epochs(3):
        place("prologue")
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.01 * (epoch + 1) + random.random() / 100
        box.prologues.append((epoch, torch.rand(()).item()))
        model.train()
        place("prologue")
        for x, y in run.batches(train):
            place("body")
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            place("body")
            optimizer.step()
            average.update_parameters(model)
            box.losses.append(loss.item())
            run.log(loss=loss)
            place("last batch" if len(box.losses) % len(train) == 0 else "body")
        place("tail")
        scheduler.step()
        box.rates.append(scheduler.get_last_lr()[0])
        model.eval()
        with torch.no_grad():
            val = nn.functional.cross_entropy(model(torch.ones(4, 16)), torch.tensor([0, 1, 2, 0]))
        run.log(val_loss=val)
        place("tail")
    place("after")


def bits(module: nn.Module) -> dict[str, str]:
    return {k: digest(v.contiguous().numpy().tobytes()) for k, v in module.state_dict().items()}


moments = [
    digest(value.numpy().tobytes())
    for state in optimizer.state_dict()["state"].values()
    for value in state.values()
]
out.write_text(
    json.dumps(
        {
            "losses": [value.hex() for value in box.losses],
            "rates": box.rates,
            "prologues": box.prologues,
            "model": bits(model),
            "average": bits(average),
            "moments": moments,
            "scheduler": scheduler.state_dict(),
            "random": [random.random(), float(np.random.rand()), torch.rand(()).item()],
        }
    )
)
