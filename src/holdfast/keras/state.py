"""What a checkpoint holds of a training with Keras."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras

from holdfast.errors import StateError
from holdfast.keras.order import Validation
from holdfast.keras.others import Others
from holdfast.keras.passes import Data
from holdfast.keras.variables import arrays_of, assign
from holdfast.manager import open as open_checkpoint

_GLOBAL = "global_seed_generator"  # the name that Keras keeps it under
_latest: weakref.WeakKeyDictionary[Any, State] = weakref.WeakKeyDictionary()


def load_weights(model: keras.Model, ref: str, name: str = "model") -> None:
    """Give a model the weights of a checkpoint: `load_weights(model, "runs/x@best")`.

    The model is built as that of the run was; it needs no optimizer. Names that Keras has
    numbered ("dense_3") may have other numbers.

    Raises StateError where it is built otherwise, or the checkpoint has no model `name`.
    """
    checkpoint = open_checkpoint(ref)
    state = checkpoint.get(name)
    if not isinstance(state, Mapping) or "ended" not in state:
        raise StateError(
            f"{ref} has no model named {name!r} that was trained with holdfast.keras.Callback",
            hint=f"It has: {', '.join(map(str, checkpoint))}. (A file of Keras that was imported "
            "is for Keras to load: model.load_weights(file).)",
        )
    if "variables" not in state:
        raise StateError(f"{ref} has no weights of {name!r}: another training has gone on with it")
    saved = {path: value for path, value in state["variables"].items() if not _is_seed(path)}
    assign(model.weights, saved, what="the model")


class State:
    """The tracked object of one training.

    restored: what was loaded last.
    ended: it was stopped early, for good.
    items: executions in the epoch in progress.
    taken: batches of the pass in progress.
    validation: its data, once there was one.
    """

    # Without a `__dict__`: the run would look for generators of random numbers in all that
    # hangs on the model, at each epoch.
    __slots__ = (
        "__weakref__",
        "_container",
        "_data",
        "_model",
        "_others",
        "ended",
        "items",
        "restored",
        "taken",
        "validation",
    )

    def __init__(self) -> None:
        self.restored: dict[str, Any] = {}
        self.ended = False
        self.items = self.taken = 0
        self.validation: Validation | None = None
        self._model: Any = None

    @property
    def waits(self) -> bool:
        """Whether no training has begun that this is of: nothing shows what is restored."""
        return self._model is None

    def begin(self, model: Any, container: Any, data: Data, others: Others) -> None:
        self._model, self._container, self._data = model, container, data
        self._others = others
        self.ended, self.items, self.taken, self.validation = False, 0, 0, None
        _latest[model] = self

    def state_dict(self) -> dict[str, Any]:
        model = self._model
        if model is None:
            return self.restored
        if _latest.get(model) is not self:
            return {"ended": True, "callbacks": self._others.state()}  # the other one has it
        for future in list(self._container._futures):
            future.result()  # they run callbacks
        if hasattr(model, "jax_state_sync"):
            model.jax_state_sync()
        return {
            "variables": arrays_of(_variables(model)),
            "optimizers": {
                name: arrays_of(optimizer.variables) for name, optimizer in optimizers_of(model)
            },
            "metrics": arrays_of(model.metrics_variables),
            "random": _random_state(),
            "callbacks": self._others.state(),
            "data": {
                **self._data.state(),
                "kind": self._data.kind,
                "taken": self.taken,
                "begun": self._data.iterator._current_iterator is not None,
            },
            "validation": self.validation_state(),
            "items": self.items,
            "ended": self.ended,
        }

    def validation_state(self) -> Any:
        if self.validation is None:
            return self.restored.get("validation")
        return self.validation.state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.restored = dict(state)
        if self._model is not None and _latest.get(self._model) is self:
            self.put_back()

    def put_back(self) -> None:
        """Give the model and all around it what was restored."""
        saved = self.restored
        if not saved:
            return
        self.ended = bool(saved["ended"])
        if "variables" in saved:
            model = self._model
            assign(_variables(model), saved["variables"], what="the model")
            for name, optimizer in optimizers_of(model):
                values = saved["optimizers"].get(name, {})
                if not optimizer.built and len(values) > len(optimizer.variables):
                    raise StateError(
                        f"the optimizer {name!r} is not built, and the checkpoint has its state",
                        hint="Before fit: model.optimizer.build(model.trainable_variables).",
                    )
                assign(optimizer.variables, values, what=f"the optimizer {name!r}")
            assign(model.metrics_variables, saved["metrics"], what="the metrics")
            _put_random_state(saved["random"])
            self.items, self.taken = int(saved["items"]), int(saved["data"]["taken"])
        self._others.put_back(saved["callbacks"])


def optimizers_of(model: Any) -> Iterator[tuple[str, Any]]:
    """That of `compile`, and those that a model of its own kind keeps in attributes."""
    seen = set[int]()
    named = [("optimizer", model.optimizer), *vars(model).items()]
    for name, value in named:
        if isinstance(value, keras.optimizers.Optimizer) and id(value) not in seen:
            seen.add(id(value))
            yield name, value


def _variables(model: Any) -> Iterable[Any]:
    metrics = {id(variable) for variable in model.metrics_variables}
    return [variable for variable in model.variables if id(variable) not in metrics]


def _is_seed(path: str) -> bool:
    return path.split("#")[0].endswith("seed_generator_state")


def _random_state() -> dict[str, Any]:
    """Of what is drawn from outside of layers; Python, NumPy and torch the run saves itself."""
    from keras.src.backend.common import global_state

    found: dict[str, Any] = {}
    generator = global_state.get_global_attribute(_GLOBAL)
    if generator is not None:
        found["keras"] = keras.ops.convert_to_numpy(generator.state.value)
    if keras.backend.backend() == "tensorflow":
        found["tensorflow"] = _tensorflow_state()
    return found


def _put_random_state(saved: dict[str, Any]) -> None:
    from keras.src.random.seed_generator import global_seed_generator

    if "keras" in saved:
        global_seed_generator().state.assign(saved["keras"])
    if "tensorflow" in saved and keras.backend.backend() == "tensorflow":
        _put_tensorflow_state(saved["tensorflow"])


def _tensorflow_state() -> dict[str, Any]:
    from tensorflow.python.eager import context
    from tensorflow.python.ops import stateful_random_ops

    found: dict[str, Any] = {}
    eager = getattr(context.context(), "_rng", None)  # seeds of operations that have none
    if eager is not None:
        found["eager"] = eager.getstate()
    if stateful_random_ops.global_generator is not None:
        found["generator"] = stateful_random_ops.global_generator.state.numpy()
    return found


def _put_tensorflow_state(saved: dict[str, Any]) -> None:
    import tensorflow as tf
    from tensorflow.python.eager import context

    eager = getattr(context.context(), "_rng", None)
    if "eager" in saved and eager is not None:
        version, words, gauss = saved["eager"]
        eager.setstate((version, tuple(words), gauss))
    if "generator" in saved:
        tf.random.get_global_generator().state.assign(saved["generator"])
