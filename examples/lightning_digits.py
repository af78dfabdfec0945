"""A small network on scikit-learn's handwritten digits, with Lightning.

    pip install 'holdfast[lightning]' scikit-learn
    python examples/lightning_digits.py      # press Ctrl-C, use kill -9 ...
    python examples/lightning_digits.py      # ... and the same command goes on where it was
    holdfast ls runs/lightning

It goes on inside an epoch, with the batches that are left of it.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset, random_split

import holdfast
import holdfast.lightning


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(64, 64),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.2),
            torch.nn.Linear(64, 10),
        )

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        images, labels = batch
        loss = torch.nn.functional.cross_entropy(self.net(images), labels)
        self.log("loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        wrong = self.net(images).argmax(1) != labels
        self.log("val_error", wrong.float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.7)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", default="runs/lightning", help="where the checkpoints are kept")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--every", default="5s", help='batches ("50"), "5s" or "5min"')
    args = parser.parse_args()

    warnings.filterwarnings("ignore")  # advice on small data
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    digits = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    train, valid = random_split(digits, [0.75, 0.25])

    every = int(args.every) if args.every.isdigit() else args.every
    with holdfast.Run(args.run, every=every, keep="last=2 best=1:val_error") as run:
        trainer = pl.Trainer(
            max_epochs=args.epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[holdfast.lightning.Callback(run)],
        )
        trainer.fit(
            Digits(),
            DataLoader(train, batch_size=32, shuffle=True),
            DataLoader(valid, batch_size=256),
        )

    print(f"{float(trainer.callback_metrics['val_error']):.6f} of the digits misread at the end")


if __name__ == "__main__":
    main()
