"""The rules of a run with a Trainer: when it saves, how it stops, what it refuses."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

import holdfast
import holdfast.transformers
from holdfast.errors import LoopError, UsageError
from tests.support.damage import damage_newest
from tests.support.jobs import copied, fresh_address, steps_of
from tests.support.tiny_transformers import (
    Fixed,
    Leaving,
    Texts,
    arguments,
    tiny_model,
    train,
)


class CopyingFolder(Leaving):
    """Copies the Trainer's own folder, too."""

    def __init__(self, address: str, folder: Path) -> None:
        super().__init__(address)
        self.folder = folder

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        super().on_step_begin()
        shutil.copytree(self.folder, f"{self.folder}-{len(self.left)}")

    on_epoch_end = on_train_end = on_step_begin


@pytest.mark.filterwarnings("ignore:mtime may not be reliable")
def test_early_stopping_and_the_best_model(tmp_path: Path) -> None:
    """Beside the Trainer's own saves, from which it loads the best model at the end."""
    folder = tmp_path / "trainer"
    folder.mkdir()

    def go(address: str, *others: TrainerCallback) -> Any:
        return train(
            address,
            EarlyStoppingCallback(early_stopping_patience=3),
            *others,
            output_dir=str(folder),
            num_train_epochs=9,
            learning_rate=0.05,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            save_total_limit=2,
            metric_for_best_model="eval_loss",
            greater_is_better=True,  # it never is for long
            load_best_model_at_end=True,
            run={"keep": "last=3 best=1:eval_loss:max"},
        )

    address = fresh_address()
    leaving = CopyingFolder(address, folder)
    whole = go(address, leaving)
    assert whole["state"][0] < 40, "it stopped early"
    assert whole["best"][1] < whole["state"][0], "and the last is not the best"
    for place, left in [*list(enumerate(leaving.left, 1))[4::9], (len(leaving.left), address)]:
        shutil.rmtree(folder)
        shutil.copytree(f"{folder}-{place}", folder)
        assert go(left) == whole, f"killed at place {place}"
    shutil.rmtree(folder)  # the machine is another one: the run has the best model, too
    assert go(address)["weights"] == whole["weights"]


def test_the_rules_of_saving() -> None:
    address = fresh_address()
    train(address, run={"every": "epoch", "keep": None})
    assert steps_of(address) == [5, 10]
    address = fresh_address()
    keep = "last=1 best=1:eval_loss:max"
    settings: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.1}
    history = train(address, run={"every": None, "keep": keep}, **settings)["history"]
    losses = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    best = max(losses, key=lambda step: losses[step])
    assert best < 10
    assert steps_of(address) == [best, 10]
    info = holdfast.open(f"{address}@best").info
    assert info.metrics["eval_loss"] == losses[best]
    assert info.metrics["loss"] > 0
    address = fresh_address()
    now = iter(range(0, 10_000, 6))
    train(address, run={"every": "20s", "keep": None, "clock": lambda: float(next(now))})
    assert 1 < len(steps_of(address)) < 8


class Signalled(TrainerCallback):
    """Is asked to stop in a step."""

    def on_step_end(self, args: Any, state: Any, *others: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            signal.raise_signal(signal.SIGTERM)


def test_preempted(capsys: pytest.CaptureFixture[str]) -> None:
    address = fresh_address()
    with pytest.raises(SystemExit) as caught:
        train(address, Signalled(), run={"every": None})
    assert caught.value.code == 75
    assert steps_of(address) == [4]
    assert train(address, run={"every": None}) == train(fresh_address())


class SignalledInEvaluation(TrainerCallback):
    def on_prediction_step(self, args: Any, state: Any, *others: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            signal.raise_signal(signal.SIGTERM)


def test_preempted_in_an_evaluation() -> None:
    """Which ends, since what was trained before it is not saved yet."""
    address = fresh_address()
    with pytest.raises(SystemExit):
        train(address, SignalledInEvaluation(), eval_strategy="epoch")
    assert steps_of(address)[-1] == 5
    assert "eval_loss" in holdfast.open(address).info.metrics
    again = train(address, eval_strategy="epoch")
    assert again == train(fresh_address(), eval_strategy="epoch")
    assert sum("eval_loss" in entry for entry in again["history"]) == 2


def test_what_was_seen_is_not_loaded_again() -> None:
    address = fresh_address()
    leaving = Leaving(address)
    seen: list[Texts] = []

    def data() -> Texts:
        seen.append(Texts())
        return seen[-1]

    train(address, leaving, data=data)
    train(leaving.left[8], data=data)  # killed in its eighth step
    whole, rest = (one.read for one in seen)
    assert len(whole) == 2 * 18
    assert rest == whole[18 + 8 :]
    assert whole[:18] != whole[18:], "each epoch has an order of its own"


def test_workers_of_the_loader() -> None:
    settings: dict[str, Any] = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    address = fresh_address()
    leaving = Leaving(address)
    whole = train(address, leaving, **settings)
    assert train(leaving.left[8], **settings) == whole


class WorkersSignalled(TrainerCallback):
    """The workers of the loader are gone before the signal comes."""

    def on_step_end(self, args: Any, state: Any, *others: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            for worker in multiprocessing.active_children():
                worker.kill()
                worker.join()
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()


def test_preempted_through_the_workers() -> None:
    settings: dict[str, Any] = {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 1}
    address = fresh_address()
    with pytest.raises(SystemExit) as caught:
        train(address, WorkersSignalled(), run={"every": None}, **settings)
    assert caught.value.code == 75
    assert steps_of(address)[-1] >= 2
    assert train(address, **settings) == train(fresh_address(), **settings)


def test_a_damaged_checkpoint(tmp_path: Path) -> None:
    """The Trainer has computed where it goes on from a checkpoint that is not restored."""
    address = tmp_path / "run"
    with pytest.raises(SystemExit):
        train(str(address), Signalled())
    damage_newest(address)
    assert train(str(address)) == train(fresh_address())


@pytest.mark.parametrize("rules", [{"max_steps": 4}, {"num_train_epochs": 1}])
def test_more_of_them(rules: dict[str, Any]) -> None:
    """The schedule of the rate is that of the new number of steps, as bare trainings have it."""
    constant: dict[str, Any] = {"lr_scheduler_type": "constant", "logging_steps": 1}
    address = fresh_address()
    first = train(address, **constant, **rules)
    more = train(address, **constant)
    whole = train(fresh_address(), **constant)
    assert first["state"][0] < more["state"][0] == 10
    assert more["weights"] == whole["weights"]
    assert more["moments"] == whole["moments"]


def test_a_schedule_that_looks_at_the_loss() -> None:
    settings: dict[str, Any] = {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"patience": 0},
        "learning_rate": 0.2,
        "metric_for_best_model": "loss",
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    address = fresh_address()
    leaving = Leaving(address)
    whole = train(address, leaving, **settings)
    rates = {entry["learning_rate"] for entry in whole["history"] if "learning_rate" in entry}
    assert len(rates) > 1
    for left in leaving.left[4::4]:
        assert train(left, **settings) == whole


@pytest.mark.parametrize("place", [1, 6, 9, 14])
def test_over_folds(place: int) -> None:
    """Trainings in a loop of the run, where one name serves all."""

    def folds(address: str) -> Any:
        leaving = Leaving(address)
        with holdfast.Run(address, every=1, quiet=True) as run:
            callback = holdfast.transformers.Callback(run)
            found = run.box(losses=[])
            for fold in run.range(3):
                torch.manual_seed(fold)
                trainer = Trainer(
                    tiny_model(),
                    arguments(max_steps=4, seed=fold),
                    train_dataset=Texts(),
                    eval_dataset=Fixed(4),
                    callbacks=[leaving, callback],
                )
                trainer.train()
                found.losses.append(trainer.evaluate()["eval_loss"])
        return found.losses, leaving.left

    losses, left = folds(fresh_address())
    assert len(set(losses)) == 3
    assert folds(left[place])[0] == losses


def made(run: holdfast.Run, *, kind: type[Trainer] = Trainer, **settings: Any) -> Trainer:
    callbacks: list[TrainerCallback] = [holdfast.transformers.Callback(run)]
    return kind(tiny_model(), arguments(**settings), train_dataset=Texts(), callbacks=callbacks)


def test_wrong_use(tmp_path: Path) -> None:
    with holdfast.Run(fresh_address(), quiet=True) as run:
        trainer = made(run)
        trainer.save_model(str(tmp_path))
        trainer.state.save_to_json(str(tmp_path / "trainer_state.json"))
        with pytest.raises(UsageError, match="two places to go on from"):
            trainer.train(resume_from_checkpoint=str(tmp_path))
        with pytest.raises(UsageError, match="auto_find_batch_size"):
            made(run, auto_find_batch_size=True).train()
        with pytest.raises(UsageError, match="ignore_data_skip"):
            made(run, ignore_data_skip=True).train()
        trainer = Trainer(tiny_model(), arguments(), train_dataset=Texts())
        trainer.add_callback(holdfast.transformers.Callback(run))
        with pytest.raises(UsageError, match="added to a Trainer that was made before"):
            trainer.train()
        made(run, max_steps=1).train()
        with pytest.raises(UsageError, match="had a training named 'trainer'"):
            made(run, max_steps=1).train()


def test_a_trainer_of_an_unknown_make_is_refused() -> None:
    class Other(Trainer):
        def get_batch_samples(self, iterator: Any, number: int) -> Any: ...  # type: ignore[override]

    with (
        holdfast.Run(fresh_address(), quiet=True) as run,
        pytest.raises(UsageError, match=r"Trainer\.get_batch_samples is unlike"),
    ):
        made(run, kind=Other)


def test_an_epoch_cannot_go_on_in_other_steps() -> None:
    address = fresh_address()
    with pytest.raises(SystemExit):
        train(address, Signalled())
    with pytest.raises(LoopError, match=r"inside of an epoch \(4 steps taken\)"):
        train(address, gradient_accumulation_steps=2)
    with pytest.raises(LoopError, match="steps in an epoch was 5, is 9"):
        train(address, per_device_train_batch_size=2)
    assert copied(address)
