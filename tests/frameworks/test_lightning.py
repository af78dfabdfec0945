"""Trainings with Lightning that are killed at any place and started again end as if left alone."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import CombinedLoader
from torchmetrics import MeanSquaredError

from tests.support.jobs import fresh_address
from tests.support.lightning_jobs import (
    Model,
    Stream,
    X,
    Y,
    bare,
    check_killed_anywhere,
    loader,
    train,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on small data


def test_killed_anywhere() -> None:
    whole = check_killed_anywhere(fresh_address(), nth=3)
    alone = bare()
    assert (whole["model"], whole["drawn"]) == (alone["model"], alone["drawn"])
    assert whole["global_step"] == 15
    assert whole["run"][:2] == (15, 3)


class OneCycle(Model):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=int(steps))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def test_accumulation_and_validation_inside_epochs() -> None:
    whole = check_killed_anywhere(
        fresh_address(),
        model=OneCycle,
        accumulate_grad_batches=2,
        val_check_interval=2,
        gradient_clip_val=0.5,
    )
    assert whole["global_step"] == 9
    assert [one for one in whole["heard"] if one.startswith("validated")][:3] == [
        "validated at 0",  # the sanity check
        "validated at 1",
        "validated at 2",
    ]


class Adversarial(Model):
    """Two optimizers by turns, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        schedulers: Any = self.lr_schedulers()
        for optimizer, schedule in zip(optimizers, schedulers, strict=True):
            self.toggle_optimizer(optimizer)
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            schedule.step()
            self.untoggle_optimizer(optimizer)
            self.log("loss", loss, on_epoch=True, on_step=False)

    def configure_optimizers(self) -> Any:
        optimizers = [
            torch.optim.Adam(self.net.parameters(), lr=0.01),
            torch.optim.SGD(self.head.parameters(), lr=0.01, momentum=0.9),
        ]
        return optimizers, [torch.optim.lr_scheduler.StepLR(one, 3) for one in optimizers]


def test_several_optimizers_and_max_steps() -> None:
    whole = check_killed_anywhere(
        fresh_address(), model=Adversarial, max_epochs=-1, max_steps=26, limit_train_batches=4
    )
    assert whole["global_step"] == 26
    assert whole["run"][0] == 13


class Watching(Model):
    """Its rate depends on the mean loss of an epoch, and it counts with torchmetrics."""

    def __init__(self) -> None:
        super().__init__()
        self.error = MeanSquaredError()
        self.val_error = MeanSquaredError()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.error(self.head(self.net(x)), y)
        self.log("error", self.error, on_step=True, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.val_error(self.head(self.net(x)), y)
        self.log("val_error", self.val_error)

    def on_train_epoch_end(self) -> None:
        self.log("late", self.error.compute())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.9)
        monitored = {"scheduler": plateau, "monitor": "loss_epoch"}
        return {"optimizer": optimizer, "lr_scheduler": monitored}


def test_means_of_an_epoch_and_early_stopping() -> None:
    """A resume that knew only the rest of its epoch would change the learning rate elsewhere."""
    whole = check_killed_anywhere(
        fresh_address(),
        lambda: EarlyStopping("late", patience=1, min_delta=2.0),
        model=Watching,
        max_epochs=10,
    )
    assert whole["epoch"] < 10
    assert whole["rates"] != [0.02]


def endless() -> dict[str, Any]:
    return {"train_dataloaders": torch.utils.data.DataLoader(Stream(), batch_size=4)}


class Knowing:
    """Its place, but not how many there are; it draws from the global stream."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[Any]:
        while self.at < 5:
            self.at += 1
            yield X[self.at :] + 0.1 * torch.randn(4), Y[self.at :]
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def knowing() -> dict[str, Any]:
    return {"train_dataloaders": Knowing()}


def pairs(mode: Any, *, shuffle: bool = True) -> Any:
    def build() -> dict[str, Any]:
        loaders = {"a": loader(shuffle=shuffle), "b": loader(batch_size=9, shuffle=shuffle)}
        return {"train_dataloaders": CombinedLoader(loaders, mode)}

    return build


class Paired(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        losses = [self.loss(one) for one in batch.values() if one is not None]
        return super().training_step(batch["a"] or batch["b"], batch_idx) + sum(losses)


@pytest.mark.parametrize("data", [endless, knowing])
def test_data_without_a_length(data: Any) -> None:
    whole = check_killed_anywhere(fresh_address(), data=data)
    assert whole["global_step"] == 15


@pytest.mark.parametrize(
    ("mode", "steps"), [("max_size_cycle", 5), ("max_size", 5), ("min_size", 2)]
)
def test_several_loaders(mode: str, steps: int) -> None:
    whole = check_killed_anywhere(
        fresh_address(), data=pairs(mode), model=Paired, max_epochs=2, nth=4
    )
    assert whole["global_step"] == 2 * steps
    options = {"data": pairs(mode, shuffle=False), "model": Paired, "max_epochs": 2}
    assert train(fresh_address(), **options)["model"] == bare(**options)["model"]


class Data(LightningDataModule):
    """A state of its own, new loaders in each epoch, and a validation that draws its order."""

    def __init__(self) -> None:
        super().__init__()
        self.chance = torch.Generator().manual_seed(7)
        self.made = 0

    def train_dataloader(self) -> Any:
        self.made += 1
        assert self.trainer is not None
        return loader(batch_size=4 + self.trainer.current_epoch)

    def val_dataloader(self) -> Any:
        self.made += 100
        return loader(generator=self.chance)

    def state_dict(self) -> dict[str, Any]:
        return {"made": self.made}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.made = state["made"]


class Hooked(Model):
    """Keeps what is no tensor in Lightning's checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.scale *= 0.99
        return super().training_step(batch, batch_idx) * self.scale

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("order", batch[0][0, 0] * batch_idx)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["scale"] = self.scale

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.scale = checkpoint["scale"]


def test_datamodules_and_hooks() -> None:
    check_killed_anywhere(
        fresh_address(),
        model=Hooked,
        data=lambda: {"datamodule": Data()},
        reload_dataloaders_every_n_epochs=2,
        val_check_interval=0.5,
        max_epochs=4,
        nth=9,
        more=lambda trainer: (trainer.datamodule.made, trainer.lightning_module.scale),
    )


def test_averaged_weights() -> None:
    check_killed_anywhere(
        fresh_address(),
        lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2, annealing_epochs=1),
        max_epochs=4,
    )


if find_spec("lightning.pytorch.callbacks.weight_averaging"):  # since 2.6

    def test_exponential_averages() -> None:
        from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging

        check_killed_anywhere(fresh_address(), EMAWeightAveraging)


class Fine(Model):
    """A backbone that is frozen at first."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = self.net

    def configure_optimizers(self) -> Any:
        trained = [one for one in self.parameters() if one.requires_grad]
        return torch.optim.Adam(trained, lr=0.02)


def test_a_backbone_that_thaws() -> None:
    whole = check_killed_anywhere(
        fresh_address(),
        lambda: BackboneFinetuning(1, backbone_initial_ratio_lr=0.5),
        model=Fine,
        max_epochs=3,
    )
    assert len(whole["rates"]) == 2


def scaled() -> Any:
    return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", growth_interval=3))]


def test_the_gradient_scaler() -> None:
    check_killed_anywhere(fresh_address(), plugins=scaled, max_epochs=2)
