"""A Trainer on several ranks, killed anywhere and started again, on as many ranks; its rules."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from transformers import EarlyStoppingCallback, GPT2Config, GPT2LMHeadModel, TrainerCallback

import holdfast
from tests.support.exhaustive import EXHAUSTIVE
from tests.support.jobs import steps_of
from tests.support.tiny_transformers import LENGTH, WORDS, Leaving, Stream, train
from tests.support.trainer_ranks import call, copied, values


class LeavingTogether(Leaving):
    """Copies the folder of the run."""

    def copy(self) -> str:
        return copied(self.address, f"{self.address}-{len(self.left)}")


class Steps(TrainerCallback):
    """Counts those of this process."""

    def __init__(self) -> None:
        self.count = 0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.count += 1


def killed(folder: str, every: int, settings: dict[str, Any]) -> list[Any]:
    """The outcome of a whole training, and of those that go on from some places of it, with the
    steps that they made."""
    leaving = LeavingTogether(f"{folder}/run")
    whole = train(leaving.address, leaving, **settings)
    found: list[Any] = [whole]
    for left in leaving.left[1::every]:
        steps = Steps()
        found.append((steps, train(left, steps, **settings)))
    return [found[0], *((steps.count, outcome) for steps, outcome in found[1:])]


def check_killed(tmp_path: Path, every: int, *, size: int = 2, **settings: Any) -> Any:
    ranks = values(call(killed, size, str(tmp_path), every, settings))
    for rank, (whole, *again) in enumerate(ranks):
        assert [made for made, _ in again] == sorted({made for made, _ in again}, reverse=True)
        for made, outcome in again:
            assert made < whole["state"][0]
            assert outcome == whole, f"rank {rank}, with {made} steps to make"
    first, second, *_ = (whole for whole, *_ in ranks)
    assert first["weights"] == second["weights"]
    return first


def test_killed(tmp_path: Path) -> None:
    whole = check_killed(tmp_path, 3, eval_strategy="epoch", gradient_accumulation_steps=2)
    assert whole["state"][:2] == (4, 2.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {
            "accelerator_config": {"use_seedable_sampler": False},
            "dataloader_num_workers": int(EXHAUSTIVE),  # seconds of CPU for each start
            "num_train_epochs": 1.5,
        },
        {
            "accelerator_config": {"dispatch_batches": False},
            "data": Stream,
            "max_steps": 7,
            "lr_scheduler_type": "cosine",
            "neftune_noise_alpha": 1.0,
        },
    ],
    ids=["one generator", "stream"],
)
def test_killed_anywhere(settings: dict[str, Any], tmp_path: Path) -> None:
    check_killed(tmp_path, 4, **settings)


@pytest.mark.slow
def test_gradients_of_three_are_summed_in_the_order_of_before(tmp_path: Path) -> None:
    check_killed(tmp_path, 2, size=3, ddp_find_unused_parameters=False, num_train_epochs=3)


# -- rules --------------------------------------------------------------------------------


class Signalled(TrainerCallback):
    """One rank is asked to stop, in a step or in an evaluation."""

    def __init__(self, rank: int, step: int, *, evaluating: bool = False) -> None:
        self.rank, self.step, self.evaluating = rank, step, evaluating

    def on_step_end(self, args: Any, state: Any, *others: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and not self.evaluating:
            self.ask()

    def on_prediction_step(self, args: Any, state: Any, *others: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and self.evaluating:
            self.evaluating = False
            self.ask()

    def ask(self) -> None:
        if dist.get_rank() == self.rank:
            signal.raise_signal(signal.SIGTERM)


def stopped(address: str, *others: TrainerCallback, **settings: Any) -> Any:
    try:
        train(address, *others, **settings)
    except SystemExit as exit:
        return exit.code
    return "it was not stopped"


def rules(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    evaluated: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "learning_rate": 0.1,
        "num_train_epochs": 3,
    }
    keep = {"every": None, "keep": "last=1 best=1:eval_loss:max"}
    found["best"] = train(f"{folder}/best", run=keep, **evaluated)
    now = iter(range(0, 10_000, 6 + dist.get_rank()))
    clock = {"every": "20s", "keep": None, "clock": lambda: float(next(now))}
    train(f"{folder}/time", run=clock, num_train_epochs=3)
    found["whole"] = train(f"{folder}/whole", run={"every": None}, eval_strategy="epoch")
    steps = Steps()
    found["finished"] = train(f"{folder}/whole", steps, eval_strategy="epoch"), steps.count
    late: dict[str, Any] = {"run": {"every": None}, "eval_strategy": "epoch"}
    found["status"] = [
        stopped(f"{folder}/step", Signalled(1, 1), **late),
        stopped(f"{folder}/evaluation", Signalled(0, 3, evaluating=True), **late),
    ]
    found["stopped at"] = steps_of(f"{folder}/step"), steps_of(f"{folder}/evaluation")
    found["went on"] = [train(f"{folder}/{one}", **late) for one in ("step", "evaluation")]
    return found


def test_rules(tmp_path: Path) -> None:
    ranks = values(call(rules, 2, str(tmp_path)))
    for found in ranks:
        history = found["best"]["history"]
        losses = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
        best = max(losses, key=lambda step: losses[step])
        assert best < 9
        assert steps_of(str(tmp_path / "best")) == [best, 9]
        assert holdfast.open(f"{tmp_path}/best@best").info.metrics["eval_loss"] == losses[best]
        assert found["finished"] == (found["whole"], 0)
        assert found["status"] == [75, 75]
        # Of the step the others hear one step later; of the evaluation at once.
        assert found["stopped at"] == ([2], [3])
        assert found["went on"] == [found["whole"], found["whole"]]
    assert 1 < len(steps_of(str(tmp_path / "time"))) < 9
    notes = [one.note for one in holdfast.CheckpointManager(tmp_path / "time").checkpoints()]
    assert set(notes) == {"every=20s", "final"}


def stopping_early(folder: str) -> Any:
    """Whole, finished again, and again where the Trainer's own folder is gone on one machine."""
    own = f"{folder}/own"

    def go() -> Any:
        return train(
            f"{folder}/run",
            EarlyStoppingCallback(early_stopping_patience=3),
            output_dir=own,
            num_train_epochs=9,
            learning_rate=0.05,
            eval_strategy="steps",
            save_strategy="steps",
            eval_steps=2,
            save_steps=2,
            save_total_limit=2,
            metric_for_best_model="eval_loss",
            greater_is_better=True,  # it never is for long
            load_best_model_at_end=True,
            run={"keep": "last=1 best=1:eval_loss:max"},
        )

    found = [go()]
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(own)
    dist.barrier()
    return [*found, go()]


@pytest.mark.slow
def test_early_stopping_and_the_best_model(tmp_path: Path) -> None:
    ranks = values(call(stopping_early, 2, str(tmp_path)))
    for whole, again in ranks:
        assert whole["state"][0] < 27, "it stopped early"
        assert whole["best"][1] < whole["state"][0], "and the last is not the best"
        assert again == whole
    assert ranks[0][0]["weights"] == ranks[1][0]["weights"]


def refusals(folder: str) -> dict[str, str]:
    found: dict[str, str] = {}
    wrong: dict[str, dict[str, Any]] = {
        "a run each": {"run": {"group": False}},
        "one reads for all": {"data": Stream, "max_steps": 3},
    }
    for name, settings in wrong.items():
        try:
            train(f"{folder}/{name}", **settings)
        except holdfast.errors.HoldfastError as error:
            found[name] = str(error)
    return found


def test_wrong_use(tmp_path: Path) -> None:
    for found in values(call(refusals, 2, str(tmp_path))):
        assert "2 processes train together, and 1 of them has this run" in found["a run each"]
        assert "dispatch_batches" in found["one reads for all"]


def killed_by_the_kernel(address: str, rank: int | None, **settings: Any) -> Any:
    """Rank `rank` is killed in its fifth step."""

    class Dying(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, *others: Any, **kwargs: Any) -> None:
            if state.global_step == 4 and dist.get_rank() == rank:
                os.kill(os.getpid(), signal.SIGKILL)

    return train(address, Dying(), gradient_accumulation_steps=2, num_train_epochs=4, **settings)


@pytest.mark.slow
def test_killed_by_the_kernel(tmp_path: Path) -> None:
    """And the other one with it, by torchrun: the same command goes on."""
    whole = values(call(killed_by_the_kernel, 2, str(tmp_path / "whole"), None))
    for rank in range(2):
        address = str(tmp_path / f"run{rank}")
        ended = call(killed_by_the_kernel, 2, address, rank)
        assert [one.status for one in ended] == 2 * [-signal.SIGKILL]
        assert 3 <= steps_of(address)[-1] <= 4
        assert values(call(killed_by_the_kernel, 2, address, None)) == whole


def adapted() -> Any:
    config = GPT2Config(
        vocab_size=WORDS,
        n_positions=2 * LENGTH,
        n_embd=128,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    lora = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    return get_peft_model(GPT2LMHeadModel(config), lora)


def adapter(folder: str) -> list[Any]:
    leaving = LeavingTogether(f"{folder}/run")
    whole = train(leaving.address, leaving, model=adapted, run={"keep": None})
    return [whole, train(leaving.left[4], model=adapted)]


@pytest.mark.slow
def test_only_the_adapter_is_written_again(tmp_path: Path) -> None:
    for whole, again in values(call(adapter, 2, str(tmp_path))):
        assert again == whole
    first, *others = holdfast.CheckpointManager(tmp_path / "run").checkpoints()
    assert first.new_bytes > 1_000_000
    assert max(one.new_bytes for one in others) < 2 * 65_536 + 32_768
