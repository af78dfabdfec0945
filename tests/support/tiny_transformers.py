"""A Trainer that trains a tiny model in a few steps, and copies of its run at each of them."""

from __future__ import annotations

import gc
import random
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import holdfast
import holdfast.transformers
from tests.support.jobs import copied

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)  # more of them only wait for one another
gc.freeze()  # each training collects garbage: not among all modules

# The name of it changed in transformers 5.
BY_LENGTH: dict[str, Any] = (
    {"train_sampling_strategy": "group_by_length"}
    if hasattr(TrainingArguments, "train_sampling_strategy")
    else {"group_by_length": True}
)

WORDS = 50
LENGTH = 8


class Texts(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows of random words; each time that one is read a word of it is drawn anew."""

    def __init__(self, rows: int = 18) -> None:
        self.rows = rows
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index >= self.rows:
            raise IndexError(index)  # a sampler by length goes through them
        self.read.append(index)
        words = torch.randint(WORDS, (LENGTH,), generator=torch.Generator().manual_seed(index))
        words[0] = torch.randint(WORDS, ())
        words[1] = np.random.randint(WORDS)
        words[2] = random.randrange(WORDS)
        return {"input_ids": words, "labels": words}


class Stream(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
    """As many of them, and nobody knows how many."""

    def __init__(self, rows: int = 18) -> None:
        self.texts = Texts(rows)

    def __iter__(self) -> Any:
        for index in torch.randperm(len(self.texts)).tolist():
            yield self.texts[index]


class Fixed(Texts):
    """The same words each time: for evaluations."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index >= self.rows:
            raise IndexError(index)
        words = torch.randint(WORDS, (LENGTH,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": words, "labels": words}


def tiny_model() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=WORDS,
            n_positions=2 * LENGTH,
            n_embd=16,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def arguments(**options: Any) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": tempfile.gettempdir(),
            "num_train_epochs": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 2,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            **options,
        }
    )


class Leaving(TrainerCallback):
    """Copies the run at each place: what a process that is killed there leaves behind."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.left: list[str] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.left.append(self.copy())

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.left.append(self.copy())

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.left.append(self.copy())

    def copy(self) -> str:
        return copied(self.address)


class Counting(TrainerCallback):
    """A user's own, with a state."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.heard = ["begin"]

    def on_epoch_begin(self, args: Any, state: Any, *others: Any, **kwargs: Any) -> None:
        self.heard.append(f"epoch behind {state.global_step}")

    def on_step_end(self, args: Any, state: Any, *others: Any, **kwargs: Any) -> None:
        self.heard.append(f"{state.global_step} {state.epoch}")

    def on_log(self, args: Any, state: Any, *others: Any, logs: Any, **kwargs: Any) -> None:
        if "train_runtime" not in logs:
            self.heard.append(", ".join(sorted(logs)))

    def state_dict(self) -> dict[str, Any]:
        return {"heard": list(self.heard)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.heard = list(state["heard"])


Outcome = dict[str, Any]


def train(
    address: str | None,
    *others: TrainerCallback,
    data: Any = None,
    model: Callable[[], Any] = tiny_model,
    trainer: Callable[..., Trainer] = Trainer,
    run: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> Outcome:
    """All that a training ends with, except for times. `address` None: without Holdfast."""
    transformers.set_seed(5)
    made = model()
    counting = Counting()
    callbacks: list[TrainerCallback] = [counting, *others]
    opened = None
    if address is not None:
        opened = holdfast.Run(
            address, **{"every": 1, "keep": "last=3", "quiet": True, **(run or {})}
        )
        callbacks.insert(1, holdfast.transformers.Callback(opened))
    one = trainer(
        model=made,
        args=arguments(**settings),
        train_dataset=Texts() if data is None else data(),
        eval_dataset=Fixed(8),
        callbacks=callbacks,
        **(options or {}),
    )
    one.remove_callback(PrinterCallback)
    try:
        output = one.train()
    finally:
        if opened is not None:
            opened.close()
    return outcome(one, output) | {"heard": counting.heard}


def outcome(trainer: Any, output: Any) -> Outcome:
    state = trainer.state
    return {
        "weights": plain(dict(trainer.model.state_dict())),
        "moments": plain(trainer.optimizer.state_dict()),
        "scheduler": plain(trainer.lr_scheduler.state_dict()),
        "history": [
            {name: value for name, value in entry.items() if not _is_time(name)}
            for entry in state.log_history
        ],
        "state": (state.global_step, state.epoch, state.total_flos, state.num_input_tokens_seen),
        "best": (state.best_metric, state.best_global_step),
        "loss": output.training_loss,
        "random": (torch.rand(()).item(), np.random.rand(), random.random()),
    }


def _is_time(name: str) -> bool:
    return name.endswith(("_runtime", "_per_second"))


def plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):  # a DTensor: the whole one
        return getattr(value, "full_tensor", lambda: value)().tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
