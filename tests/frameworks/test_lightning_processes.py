"""A real program, by Lightning's other name, with workers that persist."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.interrupted import check_stopped_and_killed

_PROGRAM = """
import logging
import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")
logging.disable(logging.INFO)
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

import holdfast
import holdfast.lightning


class Noisy(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        x = torch.full((4,), float(index)) / 40 + 0.1 * torch.rand(4)
        return x, x.sum(0, keepdim=True)


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        layers = torch.nn.Linear(4, 8), torch.nn.Dropout(), torch.nn.Linear(8, 1)
        self.net = torch.nn.Sequential(*layers)

    def training_step(self, batch, number):
        x, y = batch
        loss = ((self.net(x) - y) ** 2).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Telling(pl.Callback):
    def on_train_batch_end(self, trainer, *args):
        print(trainer.global_step, flush=True)


torch.set_num_threads(1)
pl.seed_everything(1, verbose=False)
run = holdfast.Run(sys.argv[1], every=5, quiet=True)
model = Model()
trainer = pl.Trainer(
    max_epochs=4,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    callbacks=[holdfast.lightning.Callback(run), Telling()],
)
assert isinstance(trainer.callbacks[0], pl.Callback)
trainer.fit(model, DataLoader(Noisy(), 4, shuffle=True, num_workers=2, persistent_workers=True))
state = b"".join(one.numpy().tobytes() for one in model.state_dict().values())
Path(sys.argv[2]).write_bytes(state)
"""


@pytest.mark.slow
def test_stopped_and_killed(tmp_path: Path) -> None:
    check_stopped_and_killed(_PROGRAM, tmp_path)
