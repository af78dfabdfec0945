"""What a checkpoint holds of a training beside its model and optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from holdfast.lightning.logged import (
    logged_state,
    metrics_state,
    put_back_logged,
    put_back_metrics,
)
from holdfast.lightning.loggers import loggers_state, put_back_rows, put_back_versions
from holdfast.lightning.package import is_a
from holdfast.run.randomness import libraries
from holdfast.run.search import find_generators
from holdfast.run.trainings import check_kind


class State:
    """A training's state, for `run.track`.

    What it is given is put back by `put_back_*`, once the trainer has come so far; from
    `live` on at once.
    """

    # With a `__dict__` each save would search Lightning's objects for random generators.
    __slots__ = (
        *("finished", "in_tail", "live", "restored", "total"),
        *("_others", "_trainer"),
    )

    def __init__(self) -> None:
        self.restored: dict[str, Any] = {}
        self.finished = False
        self.in_tail = False
        """Lightning has counted an epoch that its own code, which runs again, will count."""
        self.live = False
        self.total: int | None = None
        """The most epochs that the run was told of."""
        self._trainer: Any = None
        self._others: Callable[[], Iterable[Any]] = tuple

    @property
    def waits(self) -> bool:
        """Whether no training has begun that this is of: nothing shows what is restored."""
        return self._trainer is None

    def begin(self, trainer: Any, others: Callable[[], Iterable[Any]]) -> None:
        """A training by `trainer`; `others`: its callbacks but for Holdfast's."""
        self._trainer, self._others = trainer, others
        self.finished = self.in_tail = self.live = False

    # -- for the run -------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        trainer = self._trainer
        if trainer is None:
            return self.restored
        module, datamodule, fit = trainer.lightning_module, trainer.datamodule, trainer.fit_loop
        progress = _progress(fit)
        if self.in_tail:
            for counts in progress["epoch_progress"].values():
                counts["processed"] -= 1
        return {
            "kind": "lightning",
            "rank": trainer.global_rank,
            "finished": self.finished,
            "in_tail": self.in_tail,
            "total": self.total,
            "should_stop": bool(trainer.should_stop),
            "progress": progress,
            "batches_that_stepped": fit.epoch_loop._batches_that_stepped,
            "reloads": [getattr(loop, name) for loop, name in _reloads(fit)],
            "callbacks": {one.state_key: one.state_dict() for one in self._others()},
            "hooks": self._from_hooks(),
            "datamodule": {} if datamodule is None else datamodule.state_dict(),
            "precision": trainer.precision_plugin.state_dict(),
            "logged": logged_state(trainer),
            "metrics": metrics_state(module),
            "loggers": loggers_state(trainer.loggers, first=trainer.is_global_zero),
            "generators": [
                {"library": library.name, "state": library.read(one)}
                for library, one in _generators(fit.epoch_loop.val_loop)
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_kind(state, "Lightning")
        self.restored = dict(state)
        if self.live:
            self._set_validation_up()
            self.put_back()
            self.put_back_place()

    # -- putting back ------------------------------------------------------------------

    def put_back_versions(self) -> None:
        """As the first of all."""
        trainer = self._trainer
        put_back_versions(trainer.loggers, self.restored["loggers"], first=trainer.is_global_zero)

    def put_back(self) -> None:
        """What Lightning itself restores before it sets up optimizers."""
        saved, trainer = self.restored, self._trainer
        module = trainer.lightning_module
        if trainer.datamodule is not None and saved["datamodule"]:
            trainer.datamodule.load_state_dict(saved["datamodule"])
        callbacks = saved["callbacks"]
        asked = [one for one in self._others() if _overridden(one.on_load_checkpoint)]
        asked_itself = _overridden(module.on_load_checkpoint)
        checkpoint: dict[str, Any] = {}
        if asked or asked_itself:
            checkpoint = {**self._for_hooks(), "callbacks": callbacks, **saved["hooks"]}
        if asked_itself:
            module.on_load_checkpoint(checkpoint)
        for one in self._others():
            if one in asked:
                one.on_load_checkpoint(trainer, module, checkpoint)
            if callbacks.get(one.state_key):
                one.load_state_dict(callbacks[one.state_key])
        if saved["precision"]:
            trainer.precision_plugin.load_state_dict(saved["precision"])

    def put_back_progress(self) -> None:
        """The counts. Until the place is reached not those that would end the training there."""
        saved, fit = self.restored["progress"], self._trainer.fit_loop
        if self.restored["in_tail"]:
            saved = {"epoch_progress": saved["epoch_progress"]}
        _put_back_progress(fit, saved)
        if self.restored["finished"]:
            self._trainer.should_stop = self._is_over()

    def _is_over(self) -> bool:
        """Whether the training was to end, and is given no more if it has."""
        saved, total = self.restored, self.total
        given = saved["total"]
        more = total is not None and given is not None and total > given
        return saved["should_stop"] and not (saved["finished"] and more)

    def show_epoch_of_data(self) -> None:
        """Until `put_back_progress`: the trainer's epoch is that in which it asked for the loaders
        that the checkpoint is about, which may depend on it."""
        epoch = self.restored["reloads"][0]
        if epoch >= 0:  # else minus infinity
            self._trainer.fit_loop.epoch_progress.current.completed = int(epoch)

    def put_back_place(self) -> None:
        """What else makes the place in the loop what it was."""
        saved, trainer = self.restored, self._trainer
        module, fit = trainer.lightning_module, trainer.fit_loop
        _put_back_progress(fit, saved["progress"])
        fit.epoch_loop._batches_that_stepped = saved["batches_that_stepped"]
        trainer.should_stop = self._is_over()
        for (loop, name), value in zip(_reloads(fit), saved["reloads"], strict=True):
            setattr(loop, name, value)
        # A rank that was not there has what rank 0 had, of which nothing must count twice.
        own = saved.get("rank", 0) == trainer.global_rank
        put_back_logged(trainer, saved["logged"], own=own)
        put_back_metrics(module, saved["metrics"] if own else {})
        if trainer.is_global_zero:
            put_back_rows(trainer.loggers, saved["loggers"])
        found = list(_generators(fit.epoch_loop.val_loop))
        if [library.name for library, _ in found] == [
            one["library"] for one in saved["generators"]
        ]:
            for (library, one), entry in zip(found, saved["generators"], strict=True):
                library.write(one, entry["state"])

    def _set_validation_up(self) -> None:
        """If its loaders hold generators, for these to be put back."""
        trainer = self._trainer
        if self.restored["generators"] and trainer.val_dataloaders is None:
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
            trainer.training = True

    # -- hooks that add to Lightning's checkpoints -----------------------------------------

    def _for_hooks(self) -> dict[str, Any]:
        trainer = self._trainer
        return {
            "epoch": trainer.current_epoch,
            "global_step": trainer.global_step,
            "state_dict": trainer.strategy.lightning_module_state_dict(),
        }

    def _from_hooks(self) -> dict[str, Any]:
        """What `on_save_checkpoint` of the module and of callbacks add, or exchange."""
        trainer = self._trainer
        module = trainer.lightning_module
        callbacks = [one for one in self._others() if _overridden(one.on_save_checkpoint)]
        if not callbacks and not _overridden(module.on_save_checkpoint):
            return {}
        before = self._for_hooks()
        checkpoint = dict(before)
        for one in callbacks:
            one.on_save_checkpoint(trainer, module, checkpoint)
        module.on_save_checkpoint(checkpoint)
        return {
            name: value
            for name, value in checkpoint.items()
            if name not in before or value is not before[name]
        }


def _overridden(hook: Any) -> bool:
    """Whether it is more than the empty one of Lightning's base class."""
    return not hook.__module__.endswith((".callbacks.callback", ".core.hooks"))


# -- progress ----------------------------------------------------------------------------


def _progress(loop: Any) -> dict[str, Any]:
    """The counts of a loop and of those in it. (Their `load_state_dict` also tells them to
    restart, by rules of their own.)"""
    return {name: _counts(part) for name, part in _parts(loop)}


def _counts(part: Any) -> dict[str, Any]:
    return _progress(part) if is_a(part, "_Loop") else part.state_dict()


def _put_back_progress(loop: Any, saved: Mapping[str, Any]) -> None:
    for name, part in _parts(loop):
        if name not in saved:
            continue
        if is_a(part, "_Loop"):
            _put_back_progress(part, saved[name])
        else:
            part.load_state_dict(saved[name])


def _parts(loop: Any) -> Iterator[tuple[str, Any]]:
    for name, part in vars(loop).items():
        if is_a(part, "_Loop") or is_a(part, "_BaseProgress"):
            yield name, part


def _reloads(fit: Any) -> list[tuple[Any, str]]:
    return [
        (fit, "_last_train_dl_reload_epoch"),
        (fit.epoch_loop.val_loop, "_last_val_dl_reload_epoch"),
    ]


def _generators(validation: Any) -> Iterator[tuple[Any, Any]]:
    """Those that the validation's loaders hold: from validation to validation they go on."""
    combined = validation._combined_loader
    for loader in () if combined is None else combined.flattened:
        yield from find_generators(
            loader, libraries(), closed=lambda name, value: name == "_iterator"
        )
