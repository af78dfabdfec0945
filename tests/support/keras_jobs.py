"""Small trainings with Keras that can be killed at each place that Keras tells of.

On PyTorch, where `KERAS_BACKEND` says nothing else.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false, reportReturnType=false

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

_before = os.environ.get("KERAS_BACKEND")
os.environ["KERAS_BACKEND"] = _before or "torch"
import keras  # noqa: E402

if _before is None:
    del os.environ["KERAS_BACKEND"]  # programs that other tests start choose their own

import holdfast  # noqa: E402
import holdfast.keras  # noqa: E402
from tests.support.jobs import copied, fresh_address  # noqa: E402

RNG = np.random.default_rng(0)
X = RNG.normal(size=(22, 3)).astype("float32")
Y = X.prod(axis=1, keepdims=True) + 0.1

Places = Callable[[str], None]
Job = Callable[[str, Places], Any]


class At(keras.callbacks.Callback):
    """Calls `place` with the name of each place that Keras tells of. Its attributes change."""

    def __init__(self, place: Places) -> None:
        super().__init__()
        self._place = place
        self.batches = 0
        self.lowest = float("inf")
        self.seen: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._place(f"epoch {epoch} begins")

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._place(f"batch {batch} begins")

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.batches += 1
        self.lowest = min(self.lowest, float(logs["loss"]))
        self._place(f"batch {batch} ends")

    def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._place(f"validation {batch} begins")

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seen.append(logs["loss"])
        self._place(f"epoch {epoch} ends")


def nowhere(place: str) -> None:
    pass


def new_process() -> None:
    """Seeds and global generators of a process that has just started."""
    keras.src.backend.common.global_state.set_global_attribute("global_seed_generator", None)
    # Not keras.utils.set_random_seed: it imports TensorFlow, for five seconds.
    random.seed(7)
    np.random.seed(7)
    if keras.backend.backend() == "torch":
        import torch

        torch.manual_seed(7)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.random.set_seed(7)


def plain(value: Any) -> Any:
    """Something to compare, bit for bit."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    return value


def of(variables: Any) -> list[np.ndarray[Any, Any]]:
    # Copies: a view of an array of JAX may outlive what it looks at.
    return [np.array(keras.ops.convert_to_numpy(variable.value)) for variable in variables]


def killed(job: Job, *, wanted: Callable[[int], bool], again: bool = True) -> Any:
    """Run `job(address, place)`, and again from what it would have left behind at each place
    whose number is `wanted`; all must end with what the first returned, which is returned here.

    again: also behind its end.
    """
    address = fresh_address()
    left: list[tuple[str, str]] = []

    def place(name: str) -> None:
        left.append((name, copied(address) if wanted(len(left)) else ""))

    new_process()
    whole = plain(job(address, place))
    ended = [("behind its end", address)] * again
    found = [(name, there) for name, there in left if there]
    assert found
    for name, there in [*ended, *found]:
        new_process()
        assert plain(job(there, nowhere)) == whole, f"killed where {name}"
    return whole


def every(number: int, of: int) -> Callable[[int], bool]:
    """Which places are wanted: every `of`-th, from the `number`-th."""
    return lambda place: place % of == number


def network(*more: Any) -> keras.Model:
    return keras.Sequential(
        [
            keras.layers.Dense(4, "tanh"),
            keras.layers.Dropout(0.3),
            keras.layers.BatchNormalization(),
            *more,
            keras.layers.Dense(1),
        ]
    )


def compiled(optimizer: Any = "adam", **options: Any) -> keras.Model:
    model = network()
    model.compile(optimizer, "mse", metrics=["mae"], **options)
    return model


def fit(
    model: keras.Model,
    address: str,
    place: Places,
    *data: Any,
    callbacks: Any = (),
    options: Any = None,
    **fitted: Any,
) -> Any:
    """Weights, optimizer, history and callbacks after a training of three epochs."""
    data = data or (X, Y)
    fitted = {"epochs": 3, "verbose": 0, **fitted}
    if len(data) == 2:
        fitted.setdefault("batch_size", 8)
    at = At(place)
    # What is only to end need not save each step.
    options = {"every": None if place is nowhere else 1, "quiet": True, **(options or {})}
    with holdfast.Run(address, **options) as run:
        ours = holdfast.keras.Callback(run)
        history = model.fit(*data, callbacks=[ours, *callbacks, at], **fitted)
    return {
        "weights": of(model.weights),
        "optimizer": of(model.optimizer.variables),
        "history": history.history,
        "epochs": history.epoch,
        "step": run.step,
        "own": [at.batches, at.lowest, at.seen],
    }


class Shuffled(keras.utils.PyDataset):
    """Shuffles its own indices, as many do, and draws from a generator of its own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.order = np.arange(5)
        self.rng = np.random.default_rng(3)

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        first = 4 * self.order[index]
        return X[first : first + 4], Y[first : first + 4]

    def on_epoch_end(self) -> None:
        self.rng.shuffle(self.order)


def generated() -> Iterator[Any]:
    rng = np.random.default_rng(5)
    while True:
        which = rng.integers(0, len(X), 4)
        yield X[which], Y[which]


def loader(**options: Any) -> Any:
    import torch

    data = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    return torch.utils.data.DataLoader(data, batch_size=6, **options)


def pipeline() -> Any:
    """Seeded by what `new_process` has seeded."""
    import tensorflow as tf

    data = tf.data.Dataset.from_tensor_slices((X, Y))
    return data.shuffle(22, seed=3).map(lambda a, b: (a * 1.0, b)).batch(6).prefetch(2)
