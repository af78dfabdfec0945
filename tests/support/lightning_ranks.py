"""Trainings with Lightning on several ranks, and what all of these go through with them.

python lightning_ranks.py SCENARIO FOLDER    # with the environment that torchrun gives a rank

What a scenario returns is written to FOLDER/RANK.json.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError

import holdfast
import holdfast.lightning
from holdfast.errors import LoopError, UsageError
from tests.support.jobs import _savers
from tests.support.lightning_jobs import RARELY, Leaving, Model, bare, train

_X = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
NUMBERED = TensorDataset(torch.cat([_X, torch.arange(20.0)[:, None]], 1), _X.sum(1, keepdim=True))


def loaders() -> dict[str, Any]:
    """Shuffled by Lightning, which gives each of two ranks five batches of two."""
    return {
        "train_dataloaders": DataLoader(NUMBERED, 2, shuffle=True),
        "val_dataloaders": DataLoader(NUMBERED, 3),
    }


class Together(Model):
    """With sums over the ranks, and noise that each draws for itself."""

    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return super().loss((x[:, :4], y))

    def setup(self, stage: str) -> None:
        torch.manual_seed(100 + self.global_rank)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        numbers = batch[0][:, 4]
        self.log("number", numbers.mean(), on_step=True, on_epoch=True, sync_dist=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)


class Measured(Together):
    """With a metric of torchmetrics, which sums over the ranks for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.error = MeanSquaredError()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.error(self.head(self.net(x[:, :4])), y)
        self.log("error", self.error, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


class Flat(Together):
    """For batches of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh())


class Sharded(Flat):
    """FSDP2, as ModelParallelStrategy has it."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
        for part in (self.net, self.head, self):
            if not isinstance(part, FSDPModule):
                fully_shard(part, mesh=mesh)


class Seen(Callback):
    """The samples of each batch, behind the number of its epoch."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, number: int) -> None:
        self.batches.append([trainer.current_epoch, *batch[0][:, 4].int().tolist()])


class LeftTogether(Leaving):
    """Copies the job's folder as all ranks together leave it, once no save is in progress."""

    def _copy(self) -> None:
        for saver in list(_savers):
            saver.finish()
        dist.barrier()
        left = f"{self.address}-{len(self.left):02}"
        if dist.get_rank() == 0:
            shutil.copytree(self.address, left)
        dist.barrier()
        self.left.append(left)


class At(Callback):
    """Does something in the n-th batch, on one rank."""

    def __init__(self, batch: int, rank: int, act: Callable[[Any], None]) -> None:
        self.batch, self.rank, self.act = batch, rank, act

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        self.batch -= 1
        if self.batch == -1 and trainer.global_rank == self.rank:
            self.act(trainer)


class InSanity(Callback):
    """One rank is asked to stop before the run listens."""

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_rank == 1:
            _stop(trainer)


@functools.cache
def world() -> int:
    """Once: Lightning takes it out of the environment behind a training."""
    return int(os.environ["WORLD_SIZE"])


def together(job: str, *callbacks: Callback, **options: Any) -> dict[str, Any]:
    """This rank's part of a training whose run, files and logs are in the folder `job`."""
    defaults = {"model": Together, "data": loaders, "strategy": "ddp", "devices": world()}
    return train(f"{job}/run", *callbacks, **{**defaults, **options})


def killed_anywhere(
    job: str, make: Callable[[str], tuple[list[Any], dict[str, Any]]], nth: int
) -> Any:
    """Each `nth` place that the ranks can be killed at leads to the same end, which is returned.
    `make` gives callbacks and options for a job."""
    leaving = LeftTogether(job)
    callbacks, options = make(job)
    whole = together(job, leaving, *callbacks, **options)
    for place, left in list(enumerate(leaving.left))[4::nth]:
        callbacks, options = make(left)
        again = together(left, *callbacks, run_options=RARELY, **options)
        assert str(again) == str(whole), f"killed at place {place}"
    callbacks, options = make(job)
    assert str(together(job, *callbacks, **options)) == str(whole), "over"
    return whole


# -- scenarios -----------------------------------------------------------------------------


def killed(folder: str) -> Any:
    """Gradients are accumulated, and validated is inside epochs; what Lightning writes goes on,
    and it stops early by what all ranks have evaluated. Once as two nodes with a process each."""

    def make(job: str) -> tuple[list[Any], dict[str, Any]]:
        kept = ModelCheckpoint(f"{job}/files", monitor="val_loss", save_top_k=2)
        logger = CSVLogger(f"{job}/logs")

        def more(trainer: Any) -> Any:
            dist.barrier()
            rows = "" if dist.get_rank() else Path(logger.log_dir, "metrics.csv").read_text()
            score = kept.best_model_score
            assert Path(kept.best_model_path).is_file()
            return rows, None if score is None else float(score)

        options = {
            "model": Measured,
            "accumulate_grad_batches": 2,
            "val_check_interval": 2,
            "max_epochs": 5,
            "logger": logger,
            "enable_checkpointing": True,
            "log_every_n_steps": 2,
            "more": more,
        }
        if nodes := job.endswith("-15"):
            options |= {"num_nodes": world(), "devices": 1}
        local, node = ("0", os.environ["RANK"]) if nodes else (os.environ["RANK"], "0")
        os.environ |= {"LOCAL_RANK": local, "GROUP_RANK": node}
        return [kept, EarlyStopping("val_loss", min_delta=0.5, patience=2)], options

    return killed_anywhere(f"{folder}/job", make, 11)


SMALL: dict[str, Any] = {"model": Flat, "max_epochs": 2, "run_options": {"every": 1, "keep": None}}


def leave(folder: str) -> Any:
    """The run as it is at each place, and what was seen up to there."""
    leaving, seen = LeftTogether(f"{folder}/job"), Seen()
    found = together(leaving.address, leaving, seen, **SMALL)
    return {**found, "seen": seen.batches}


def go_on(folder: str) -> Any:
    """With some of the runs that were left, in both epochs, on another number of ranks."""
    found: dict[str, Any] = {}
    for left in sorted(Path(folder).glob("job-*"))[5 :: 5 + 2 * (world() - 1)]:
        seen = Seen()
        found[left.name] = {**together(str(left), seen, **SMALL), "seen": seen.batches}
    return found


def without_a_rule(folder: str) -> str:
    """On one process Lightning's own order is another one: refused inside an epoch."""
    left = sorted(Path(folder).glob("job-*"))[4]
    try:
        together(str(left), **{**SMALL, "strategy": "auto"})
    except LoopError as error:
        return str(error)
    raise AssertionError


def asked(folder: str) -> Any:
    """What one rank alone knows all do; they stop twice, once between two halves of a gradient,
    and start behind the end, which is that of a training without Holdfast. The statuses with
    which they stop."""
    job, halves = f"{folder}/job", {"accumulate_grad_batches": 2}
    whole = together(f"{folder}/whole", run_options=RARELY, **halves)
    rarely = {"every": None, "keep": None}
    statuses: list[Any] = []
    for acts in ([At(2, 1, _save), At(6, 1, _stop)], [At(4, 0, _stop)], [], []):
        try:
            assert str(together(job, *acts, run_options=rarely, **halves)) == str(whole)
        except SystemExit as stopped:
            statuses.append(stopped.code)
    alone = bare(model=Together, data=loaders, strategy="ddp", devices=world(), **halves)
    assert (whole["model"], whole["drawn"]) == (alone["model"], alone["drawn"])
    now = iter(range(1000))
    rules = {
        "every": "2s",
        "keep": "last=99 best=1:val_loss",
        "clock": lambda: float(next(now) // 2),
    }
    together(f"{folder}/rules", run_options=rules)
    return statuses


def _save(trainer: Any) -> None:
    trainer.callbacks[0]._run.save()


def _stop(trainer: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def of_more_than_two(folder: str) -> Any:
    return killed_anywhere(f"{folder}/job", lambda job: ([], {"model": Flat}), 5)


def sharded(folder: str) -> Any:
    def make(job: str) -> tuple[list[Any], dict[str, Any]]:
        return [], {"strategy": ModelParallelStrategy(world(), 1), "model": Sharded}

    return killed_anywhere(f"{folder}/job", make, 12)


class OnTheCPU(FSDPStrategy):
    """Lightning offers it on GPUs only."""

    def _setup_model(self, model: Any) -> Any:
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


def sharded_by_fsdp1(folder: str) -> Any:
    """What is here of the model; and the whole one, as another strategy has it."""

    def make(job: str) -> tuple[list[Any], dict[str, Any]]:
        policy = ModuleWrapPolicy({torch.nn.Linear})
        return [], {"strategy": OnTheCPU(auto_wrap_policy=policy)}

    whole = killed_anywhere(f"{folder}/job", make, 12)
    alone = bare(model=Together, data=loaders, devices=world(), **make("")[1])
    assert (whole["model"], whole["drawn"]) == (alone["model"], alone["drawn"])
    return whole["model"], together(f"{folder}/job")["model"]


def left(folder: str) -> Any:
    """The status with which a rank leaves that is asked to stop, and what is refused."""
    said: list[Any] = []
    apart = {"every": None, "quiet": True, "group": False}
    hook = {"strategy": DDPStrategy(ddp_comm_state=object())}
    for act in (
        lambda: together(f"{folder}/stopped", At(1, 1, _stop)),
        lambda: together(f"{folder}/sanity", InSanity()),
        lambda: together(f"{folder}/{os.environ['RANK']}", run_options=apart),
        lambda: together(f"{folder}/hook", **hook),
    ):
        try:
            act()
        except SystemExit as stopped:
            said.append(stopped.code)
        except UsageError as error:
            said.append(str(error))
    return said


def folds(folder: str) -> Any:
    """Trainings in a loop of the run, which has met the group before them."""
    dist.init_process_group("gloo")

    def each(job: str, *callbacks: Callback) -> list[Any]:
        torch.manual_seed(0)
        rules = {"every": 1 if callbacks else None, "quiet": True}
        with holdfast.Run(f"{job}/run", **rules) as run:
            found = run.box(all=[]).all
            callback = holdfast.lightning.Callback(run)
            for _ in run.range(2):
                options = {"model": Flat, "data": loaders, "strategy": "ddp", "max_epochs": 2}
                one = bare(*callbacks, callback, devices=world(), **options)
                found.append(one["metrics"]["val_loss"])
            return list(found)

    leaving = LeftTogether(f"{folder}/job")
    whole = each(leaving.address, leaving)
    for left in leaving.left[6::13]:
        assert each(left) == whole
    return whole


SCENARIOS: dict[str, Callable[[str], Any]] = {
    one.__name__: one
    for one in (
        killed,
        leave,
        go_on,
        without_a_rule,
        asked,
        of_more_than_two,
        sharded,
        sharded_by_fsdp1,
        folds,
        left,
    )
}


def main() -> None:
    scenario, folder = sys.argv[1:]
    warnings.simplefilter("ignore")
    answer = SCENARIOS[scenario](folder)
    Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(answer, default=str))


if __name__ == "__main__":
    main()
