"""The callback that makes `model.fit` resumable."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import repeat
from types import FrameType
from typing import Any

import keras
from keras import callbacks as kc

from holdfast.errors import UsageError
from holdfast.keras.order import Validation, data_of
from holdfast.keras.others import Others, drop_rows, keep_rows
from holdfast.keras.passes import Data
from holdfast.keras.state import State
from holdfast.run.callsite import variables_of
from holdfast.run.loop import IndexFeed, Loop
from holdfast.run.position import Label
from holdfast.run.rehearsal import Beside
from holdfast.run.run import Run
from holdfast.run.trainings import check_name_is_new, check_run, tell_rehearsal


class Callback(kc.Callback):
    """Makes a training by `model.fit` resumable, at each batch.

        model.fit(x, y, epochs=20, callbacks=[holdfast.keras.Callback(run)])

    A step of the run is a batch (where `steps_per_execution` is more than 1, as many), an epoch
    an epoch; the run logs what `fit` logs at the end of an epoch. A stop request raises
    SystemExit at the next batch, out of `fit`. Fitted again after its end, `fit` trains nothing,
    and returns the whole history.

    Its place among other callbacks does not matter: it is called last. Those with `state_dict`
    and `load_state_dict` are saved, Keras' own, and of all others the plain attributes that
    have changed. Make it before the first loop of the run; inside such a loop (over folds, say)
    one may serve one training after the other. Two trainings in a row need two, with a name
    each: `Callback(run, name="head")`.

    Raises UsageError from `fit` for what cannot be resumed, and StateError where the checkpoint
    is of another model.
    """

    # Keras then need not wait for each batch before it begins the next: nothing is looked at
    # before the state is wanted.
    async_safe = True

    def __init__(self, run: Run, *, name: str = "model") -> None:
        super().__init__()
        check_run(run)
        self._run = run
        self._name = name
        self._state = State()
        run.track(**{name: self._state})
        self._training = False
        self._kept_rows = False
        self._items: Loop | None = None
        self._guard: Iterator[None] | None = None

    # -- Keras' calls ----------------------------------------------------------------

    def set_model(self, model: Any) -> None:
        super().set_model(model)
        container = _container(self, sys._getframe(1))
        if container is not None:
            _move_last(self, container)
            if not self._training:
                self._kept_rows = self._run.resumed is not None
                if self._kept_rows:
                    keep_rows(container.callbacks)

    def on_train_begin(self, logs: Any = None) -> None:
        container = _container(self, sys._getframe(1))
        fit = _fit(sys._getframe(1))
        known = fit is not None and hasattr(fit["epoch_iterator"], "_enumerate_iterator")
        if container is None or fit is None or not known:
            raise UsageError(
                f"holdfast.keras.Callback does not know what calls it in Keras {keras.__version__}",
                hint="Give it to model.fit: callbacks=[holdfast.keras.Callback(run)].",
            )
        self._check(container, fit)
        _move_last(self, container)
        self._training = True
        model: Any = self.model
        self._iterator: Any = fit["epoch_iterator"]
        _build(model, self._iterator)
        self._data: Data = data_of(self._iterator, self._settle)
        self._others = Others(container.callbacks[:-1])
        tell_rehearsal(self._run, lambda: Beside(container.callbacks, [model]))
        self._total = int(fit["epochs"])
        self._epochs = self._run.epochs(self._total, name=self._name)
        state = self._state
        number = next(self._epochs, None)
        state.begin(model, container, self._data, self._others)
        if number == 0 and not state.restored.get("items"):
            state.restored = {}  # of the training before, in a loop of the run
        state.put_back()
        self._go_on = state.items
        if state.ended and number is not None:
            self._epochs.end()
            number = None
        model._initial_epoch = self._total if number is None else number
        self._number = number
        if self._kept_rows:
            drop_rows(container.callbacks, model._initial_epoch)
        if number is None:
            return
        self._prepare(state)
        self._batches, self._iterator._enumerate_iterator = (
            self._iterator._enumerate_iterator,
            self._enumerate,
        )
        if self._data.known:
            self._run._session.console.loud(
                f"{self._run.address}: saves are made at the ends of epochs only, for the order "
                f"of the data cannot be known again: {self._data.known}"
            )

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        model: Any = self.model
        model._initial_epoch = None  # it was looked at

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        model: Any = self.model
        if logs:
            self._run.log(**logs)
        if model.stop_training and epoch + 1 < self._total:
            self._state.ended = True
            self._epochs.end()
        self._state.items, self._state.taken = 0, self._iterator._steps_seen
        self._data.ended(whole=not self._iterator.steps_per_epoch)
        if not self._iterator.steps_per_epoch:
            self._state.taken = 0
        self._complete()

    def on_train_end(self, logs: Any = None) -> None:
        model: Any = self.model
        model._initial_epoch = None
        self._training = False
        self._state.restored = {}
        self._data.stop()

    def on_test_begin(self, logs: Any = None) -> None:
        if not self._training:
            self._guard = None
            return
        self._guard = iter(self._run.guard(repeat(None)))
        model: Any = self.model
        iterator = getattr(model, "_eval_epoch_iterator", None)
        if self._state.validation is not None or iterator is None:
            return
        found = Validation(iterator, self._state.validation_state(), self._data)
        self._state.validation = found
        if found.goes_on:
            self._run._session.console.loud(
                f"{self._run.address}: the validation data is a generator, which begins anew in "
                "each process: what is measured after a resume may differ"
            )

    def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self._guard is not None:
            next(self._guard)  # a stop request may not be able to wait for the end of it

    # -- inside ----------------------------------------------------------------------

    def _check(self, container: Any, fit: dict[str, Any]) -> None:
        check_name_is_new(self._run, self._name)
        if int(fit.get("initial_epoch") or 0):
            raise UsageError(
                "initial_epoch is for Holdfast to say: it goes on where the run was stopped",
                hint="Leave it out; epochs is the total.",
            )
        others = [one for one in container.callbacks if one is not self]
        if any(isinstance(one, Callback) for one in others):
            raise UsageError("fit has two Holdfast callbacks", hint="Give it one.")
        if any(isinstance(one, kc.BackupAndRestore) for one in others):
            raise UsageError(
                "BackupAndRestore would put its own state over that of the run",
                hint="Leave it out: holdfast.keras.Callback does what it does.",
            )
        if _processes(self.model) > 1:
            raise UsageError(
                "several processes or replicas that train together cannot be resumed yet"
            )

    def _prepare(self, state: State) -> None:
        """Bring the data to where the checkpoint has it."""
        saved = state.restored.get("data")
        if saved is None or self._data.known:
            return
        inside = state.items > 0
        if saved["kind"] != self._data.kind:
            if inside:
                raise UsageError(
                    f"the data of fit was of the kind {saved['kind']!r}, and is of the kind "
                    f"{self._data.kind!r} inside the epoch that the run stopped in",
                    hint="Give fit the data that it had.",
                )
            return
        random = self._run._session.random
        now = random.capture()  # what is drawn once more must not be drawn from it
        if self._iterator.steps_per_epoch and saved["begun"]:
            self._data.go_on(saved, state.taken)
            self._iterator._current_iterator = iter(self._iterator._get_iterator())
            self._iterator._steps_seen = state.taken
        elif inside:
            self._data.go_on(saved, state.taken)
        else:
            self._data.rest(saved, state.taken)
        random.apply(now)

    def _enumerate(self) -> Iterator[Any]:
        """What `fit` goes through in an epoch, with the run's boundaries in front of each."""
        executed = self._iterator.steps_per_execution
        if self._data.known:
            yield from self._batches()
            return
        skip, self._go_on = self._go_on, 0
        self._open()
        number = 0
        try:
            for batch in self._batches():  # two or three values, by the version
                number += 1
                if number <= skip:
                    if self._iterator.steps_per_epoch:
                        self._iterator._steps_seen -= executed
                    continue
                if not self._data.peek(executed):
                    break
                self._state.items = number - 1
                self._state.taken = self._iterator._steps_seen - executed
                self._advance()
                yield batch
        except SystemExit:
            self._data.stop()
            raise

    def _open(self) -> None:
        batches = self._iterator.num_batches
        executed = self._iterator.steps_per_execution
        numbers = None if batches is None else range(-(-batches // executed))
        label = Label("range", self._name)
        self._items = self._run._loop(label, IndexFeed(numbers), True, sys._getframe())

    def _advance(self) -> None:
        """Complete the batch before, and begin the next."""
        assert self._items is not None
        next(self._items)

    def _complete(self) -> None:
        """The epoch, and the last batch of it. Whatever had to be done with it is done."""
        if self._items is not None:
            self._items.end()
            next(self._items, None)
            self._items = None
        self._number = next(self._epochs, None)

    def _settle(self, feed: Any) -> None:
        feed.random = self._run._session.random


def _container(callback: Any, frame: FrameType | None) -> Any:
    """The list of callbacks that calls this one: it is not told."""
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, kc.CallbackList) and any(one is callback for one in found.callbacks):
            return found
        frame = frame.f_back
    return None


def _move_last(callback: Any, container: Any) -> None:
    # Another list: it is in the middle of going through this one.
    container.callbacks = [*(one for one in container.callbacks if one is not callback), callback]


def _fit(frame: FrameType | None) -> dict[str, Any] | None:
    """The variables of `fit`."""
    while frame is not None:
        if frame.f_code.co_name == "fit" and "epoch_iterator" in frame.f_code.co_varnames:
            return variables_of(frame)
        frame = frame.f_back
    return None


def _build(model: Any, iterator: Any) -> None:
    """On TensorFlow `fit` builds models and optimizers at the first batch: too late."""
    if keras.backend.backend() != "tensorflow":
        return
    import tensorflow as tf

    def symbolic(spec: Any) -> Any:
        if not isinstance(spec, tf.TensorSpec):
            return None
        shape = [None] if spec.shape.rank is None else spec.shape.as_list()
        return keras.KerasTensor(shape, spec.dtype.name)

    spec = iterator._distributed_dataset.element_spec
    with model.distribute_strategy.scope():
        model._symbolic_build(data_batch=keras.tree.map_structure(symbolic, spec))


def _processes(model: Any) -> int:
    """How many train together."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        return model.distribute_strategy.num_replicas_in_sync
    if backend == "jax":
        import jax

        return jax.process_count()
    import torch

    return torch.distributed.get_world_size() if _distributed(torch) else 1


def _distributed(torch: Any) -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
