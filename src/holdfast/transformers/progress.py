"""What a checkpoint holds of a training beside the model, the optimizer and the scheduler."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from transformers.trainer_callback import ExportableState, TrainerState

from holdfast.core.group import Ranks
from holdfast.run.trainings import check_kind, numbered
from holdfast.transformers.plan import Place, ranks_of

# Of TrainerState: what the program says now, what the machine is, what is saved otherwise.
_NOT_SAVED = {
    *("max_steps", "num_train_epochs", "train_batch_size"),
    *("logging_steps", "eval_steps", "save_steps"),
    *("is_local_process_zero", "is_world_process_zero", "is_hyper_param_search"),
    "stateful_callbacks",
}
_ACCUMULATED = ("_metrics", "_total_train_tokens")
"""Attributes in which trainers of TRL gather what they log next."""


class Files:
    """Small files for `from_pretrained`: saved, and never put back."""

    __slots__ = ("_files",)

    def __init__(self, files: dict[str, str | bytes]) -> None:
        self._files = files

    def state_dict(self) -> dict[str, str | bytes]:
        return self._files

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Progress:
    """Counters, logs, sums of losses, other callbacks, and the place in the data."""

    # With a `__dict__` each save would search the Trainer for random generators.
    __slots__ = (
        *("_callbacks", "_trainer"),
        *("beyond", "data", "loss", "place", "ranks", "restored", "steps_per_epoch"),
    )

    def __init__(self, trainer: Any, own: Any, ranks: Ranks) -> None:
        self.ranks = ranks
        self.place = Place()
        self.beyond = 0
        """See `plan.Plan`."""
        self.steps_per_epoch = 0
        self.loss: torch.Tensor | None = None
        """The sum of the losses since they were logged last."""
        self.data: dict[str, Any] = {}
        """Where the loader is in front of the next step, and the random states there."""
        self.restored: dict[str, Any] = {}
        self._trainer = trainer
        self._callbacks = [one for one in trainer.callback_handler.callbacks if one is not own]

    def state_dict(self) -> dict[str, Any]:
        trainer = self._trainer
        assert self.loss is not None
        return {
            "kind": "transformers",
            "place": list(self.place),
            "beyond": self.beyond,
            "ranks": list(self.ranks),
            "steps_per_epoch": self.steps_per_epoch,
            "accumulation": trainer.args.gradient_accumulation_steps,
            "state": dict(_saved_fields(trainer.state)),
            "loss": self.loss,
            "total_loss": trainer._total_loss_scalar,
            "last_logged": trainer._globalstep_last_logged,
            "flos": trainer.current_flos,
            "callbacks": {
                name: _state_of(callback) for name, callback in numbered(self._stateful())
            },
            "accumulated": {
                name: getattr(trainer, name) for name in _ACCUMULATED if hasattr(trainer, name)
            },
            "data": self.data,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_kind(state, "Transformers")
        self.restored = dict(state)

    @property
    def of_another(self) -> bool:
        """Whether what was restored is that of another rank, since this one is new."""
        return bool(self.restored) and ranks_of(self.restored).rank != self.ranks.rank

    def put_back(self) -> None:
        """Make the Trainer and the other callbacks what they were when they were saved."""
        saved, trainer = self.restored, self._trainer
        state = trainer.state
        for name, value in saved["state"].items():
            if hasattr(state, name):
                setattr(state, name, _copied(value))
        # What the program says now counts, also for what the checkpoint's steps were.
        state.compute_steps(trainer.args, state.max_steps)
        assert self.loss is not None
        with torch.no_grad():
            self.loss.copy_(saved["loss"])
        trainer._total_loss_scalar = saved["total_loss"]
        trainer._globalstep_last_logged = saved["last_logged"]
        # They are added up over all ranks.
        trainer.current_flos = 0 if self.of_another else saved["flos"]
        if hasattr(trainer, "_initial_global_step"):
            trainer._initial_global_step = 0  # the mean loss is that of the whole training
        for name, value in saved["accumulated"].items():
            _fill(trainer, name, value)
        for name, callback in numbered(self._stateful()):
            if name in saved["callbacks"]:
                _put_back(callback, saved["callbacks"][name])

    def _stateful(self) -> Iterator[Any]:
        for callback in self._callbacks:
            if isinstance(callback, ExportableState) or hasattr(callback, "load_state_dict"):
                yield callback


def _saved_fields(state: TrainerState) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(state):
        if field.name not in _NOT_SAVED:
            yield field.name, getattr(state, field.name)


def _state_of(callback: Any) -> Any:
    if hasattr(callback, "load_state_dict"):
        return callback.state_dict()
    return callback.state()["attributes"]


def _put_back(callback: Any, state: Any) -> None:
    if hasattr(callback, "load_state_dict"):
        callback.load_state_dict(state)
        return
    for name, value in state.items():
        setattr(callback, name, value)


def _fill(trainer: Any, name: str, value: Any) -> None:
    """In place: the keys' defaults are the trainer's."""
    live = getattr(trainer, name, None)
    if isinstance(live, dict):
        for key, inner in value.items():
            if isinstance(live.get(key), dict):
                live[key].clear()
                live[key].update(_copied(inner))
            else:
                live[key] = _copied(inner)
    else:
        setattr(trainer, name, value)


def _copied(value: Any) -> Any:
    """Containers that the program may change; what was restored stays as it is."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value
