"""Trainings with Lightning, tiny and deterministic, and a callback that leaves copies of the run
behind at each place of them."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import holdfast
import holdfast.lightning
from tests.support.jobs import copied

for noisy in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch"):
    logging.getLogger(noisy).setLevel(logging.ERROR)

_chance = torch.Generator().manual_seed(1)
X = torch.randn(18, 4, generator=_chance)
Y = X.sum(1, keepdim=True)
DATA = TensorDataset(X, Y)


def loader(**options: Any) -> DataLoader[Any]:
    """Five batches, shuffled by the global stream of random numbers; the last is smaller."""
    return DataLoader(DATA, **{"batch_size": 4, "shuffle": True, **options})


class Stream(IterableDataset[Any]):
    """Rows without a known number, with noise from the global stream."""

    def __iter__(self) -> Iterator[Any]:
        for x, y in zip(X, Y, strict=True):
            yield x + 0.1 * torch.randn(4), y


class Model(LightningModule):
    """Dropout, so that each batch draws; loss means of an epoch; all that is in a state_dict."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Dropout(0.3)
        )
        self.head = torch.nn.Linear(6, 1)

    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return ((self.head(self.net(x)) - y) ** 2).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("largest", loss, on_step=False, on_epoch=True, reduce_fx=max)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class Counting(Callback):
    """A user's own, with a state: the hooks that it has heard, and the batches of the epoch."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.heard.append(f"epoch {trainer.current_epoch}")

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, n: int
    ) -> None:
        self.heard.append(f"{n}: {trainer.global_step}")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.heard.append(f"validated at {trainer.global_step}")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.heard.append("end")

    def state_dict(self) -> dict[str, Any]:
        return {"heard": list(self.heard)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.heard = list(state["heard"])


class Leaving(Callback):
    """Copies the run (and a folder) at each place: what a process that is killed there leaves."""

    def __init__(self, address: str, folder: Path | None = None) -> None:
        self.address = address
        self.folder = folder
        self.left: list[str] = []

    def _copy(self) -> None:
        if self.folder is not None:
            shutil.copytree(self.folder, self.folder.with_name(f"left-{len(self.left)}"))
        self.left.append(copied(self.address))

    def on_train_epoch_start(self, *args: Any) -> None:
        self._copy()

    def on_train_batch_end(self, *args: Any) -> None:
        self._copy()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._copy()

    def on_train_epoch_end(self, *args: Any) -> None:
        self._copy()

    def on_train_end(self, *args: Any) -> None:
        self._copy()


def train(
    address: str, *callbacks: Callback, run_options: dict[str, Any] | None = None, **options: Any
) -> dict[str, Any]:
    """One process's part of a training, and all that is left of it."""
    with holdfast.Run(address, **{"every": 1, "quiet": True, **(run_options or {})}) as run:
        found = bare(*callbacks, holdfast.lightning.Callback(run), **options)
        return {**found, "run": (run.step, run.epoch, run.metrics)}


def bare(
    *callbacks: Callback,
    model: Any = Model,
    data: Any = None,
    plugins: Any = tuple,
    more: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """A training with these callbacks, and all that is left of it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    made = model()
    counting = Counting()
    trainer = Trainer(
        **{
            "max_epochs": 3,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
            "plugins": list(plugins()),
            "callbacks": [*callbacks[:-1], counting, *callbacks[-1:]],
        }
    )
    given: dict[str, Any] = {
        "train_dataloaders": loader(),
        "val_dataloaders": loader(shuffle=False),
    }
    trainer.fit(made, **(given if data is None else data()))
    return {
        "model": {name: _whole(one).tolist() for name, one in made.state_dict().items()},
        "optimizers": [one.state_dict() for one in trainer.optimizers],
        "rates": [one["lr"] for each in trainer.optimizers for one in each.param_groups],
        "global_step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "metrics": {name: float(one) for name, one in trainer.callback_metrics.items()},
        "heard": counting.heard,
        "drawn": torch.rand(1).item(),
        "more": None if more is None else more(trainer),
    }


def _whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


RARELY = {"every": None}
"""It saves at its end only."""


def check_killed_anywhere(address: str, *callbacks: Any, nth: int = 6, **options: Any) -> Any:
    """Each `nth` place that a process can be killed at leads to the same end. `callbacks`: what
    makes them, for each process its own. Returns that end."""
    leaving = Leaving(address)
    whole = train(address, leaving, *(make() for make in callbacks), **options)
    assert len(leaving.left) >= 2 * nth
    for place, left in list(enumerate(leaving.left))[4::nth]:
        again = train(left, *(make() for make in callbacks), run_options=RARELY, **options)
        assert str(again) == str(whole), f"killed at place {place}"
    assert str(train(address, *(make() for make in callbacks), **options)) == str(whole), "over"
    return whole
