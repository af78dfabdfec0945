"""Keras' `fit`: what was killed and started again ends as what was never stopped.

On PyTorch; `test_keras_backends.py` has the others."""

# Keras' own annotations contradict its documentation (`verbose: str`).
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false, reportReturnType=false

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import holdfast
from tests.support.jobs import fresh_address
from tests.support.keras_jobs import (
    RNG,
    At,
    Places,
    X,
    Y,
    compiled,
    every,
    fit,
    keras,
    killed,
    network,
    new_process,
    nowhere,
    of,
    plain,
)

# Keras' variables and NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def test_killed_anywhere() -> None:
    """Dropout, running means, patience, a plateau, the best weights, validation."""

    def job(address: str, place: Places) -> Any:
        stopping = keras.callbacks.EarlyStopping(patience=9, restore_best_weights=True)
        plateau = keras.callbacks.ReduceLROnPlateau(factor=0.5, patience=1, min_delta=9)
        more = {"validation_split": 0.3, "batch_size": 6}
        ended = fit(compiled(), address, place, callbacks=[stopping, plateau], **more)
        return [
            ended,
            [stopping.wait, stopping.best, stopping.best_epoch, stopping.best_weights],
            [plateau.wait, plateau.best, plateau.cooldown_counter],
            float(keras.random.normal(())),
            [random.random(), np.random.rand(), float(torch.rand(()))],
        ]

    whole = killed(job, wanted=lambda number: number < 12)
    assert whole[0]["step"] == 9
    assert whole[0]["epochs"] == [0, 1, 2]
    assert whole[0]["own"][0] == 9
    rates = whole[0]["history"]["learning_rate"]
    assert rates[2] < rates[0]  # the plateau has done something


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "schedule and ema": lambda: keras.optimizers.Adam(
        keras.optimizers.schedules.ExponentialDecay(0.01, 2, 0.5), use_ema=True, ema_momentum=0.5
    ),
    "accumulation": lambda: keras.optimizers.SGD(
        0.05, momentum=0.9, nesterov=True, gradient_accumulation_steps=2
    ),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.AdamW(0.01, clipnorm=1.0, ema_overwrite_frequency=2, use_ema=True)
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str) -> None:
    def job(address: str, place: Places) -> Any:
        return fit(compiled(OPTIMIZERS[name]()), address, place, epochs=2)

    killed(job, wanted=every(1, 5), again=False)


def test_a_model_with_optimizers_of_its_own() -> None:
    class Two(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = keras.layers.Dense(2), keras.layers.Dense(1)
            self.built_by = keras.optimizers.Adam(0.1)

        def call(self, x: Any) -> Any:
            return self.other(self.one(x))

        def train_step(self, data: Any) -> Any:
            x, y = data
            loss = keras.ops.mean((self(x) - y) ** 2)
            self.zero_grad()
            loss.backward()
            for optimizer, layer in ((self.optimizer, self.one), (self.built_by, self.other)):
                weights = layer.trainable_weights
                with torch.no_grad():
                    optimizer.apply([weight.value.grad for weight in weights], weights)
            return {"loss": loss.detach()}

    def job(address: str, place: Places) -> Any:
        model = Two()
        model(X[:1])
        model.compile("adam")
        model.optimizer.build(model.one.trainable_weights)
        model.built_by.build(model.other.trainable_weights)
        ended = fit(model, address, place, epochs=2)
        return ended, of(model.built_by.variables)

    killed(job, wanted=every(0, 5), again=False)


def test_half_precision() -> None:
    def job(address: str, place: Places) -> Any:
        model = keras.Sequential(
            [keras.layers.Dense(4, dtype="bfloat16"), keras.layers.Dense(1, dtype="bfloat16")]
        )
        model.compile("adam", "mse")
        fit(model, address, place, epochs=2)
        return [str(weight.dtype) for weight in model.weights], [
            array.astype("float32") for array in of([*model.weights, *model.optimizer.variables])
        ]

    assert killed(job, wanted=every(4, 9), again=False)[0][0] == "bfloat16"


# -- other callbacks -----------------------------------------------------------------


class Noted(keras.callbacks.Callback):
    """Draws a learning rate from a generator of its own, which it saves itself."""

    def __init__(self) -> None:
        super().__init__()
        self.chance = np.random.default_rng(2)
        self.rates: list[float] = []
        self.held = object()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.rates.append(float(self.chance.uniform(0.01, 0.05)))
        self.model.optimizer.learning_rate = self.rates[-1]

    def state_dict(self) -> dict[str, Any]:
        return {"rates": list(self.rates), "chance": self.chance.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rates = list(state["rates"])
        self.chance.bit_generator.state = state["chance"]


def test_a_callback_with_a_state_of_its_own() -> None:
    def job(address: str, place: Places) -> Any:
        noted = Noted()
        return fit(compiled(), address, place, callbacks=[noted], epochs=2), noted.rates

    assert len(killed(job, wanted=every(4, 9), again=False)[1]) == 6


@pytest.mark.parametrize("on_epoch", [False, True])
def test_averages_swapped_in(on_epoch: bool, tmp_path: Path) -> None:
    """With `swap_on_epoch` the averages are in the model when the end of an epoch is saved."""

    def job(address: str, place: Places) -> Any:
        optimizer = keras.optimizers.Adam(0.05, use_ema=True, ema_momentum=0.5)
        swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=on_epoch)
        kept = keras.callbacks.ModelCheckpoint(
            str(tmp_path / "{epoch}.weights.h5"), save_weights_only=True
        )
        ended = fit(
            compiled(optimizer), address, place, callbacks=[swap, kept], validation_data=(X, Y)
        )
        files = [network() for _ in range(3)]
        for number, model in enumerate(files, 1):
            model.build((None, 3))
            model.load_weights(tmp_path / f"{number}.weights.h5")
        return ended, swap._ema_weights_in_model, [of(model.weights) for model in files]

    # Both sides of the ends of epochs, and one place inside.
    ended = killed(job, wanted=lambda number: number in (4, 12, 16))
    assert len(ended[0]["epochs"]) == 3


def test_files_by_the_number_of_batches(tmp_path: Path) -> None:
    """`save_freq` counts batches over epochs: a resume counts on."""

    def job(address: str, place: Places) -> Any:
        folder = tmp_path / address.rpartition("-")[2]
        folder.mkdir(exist_ok=True)
        kept = keras.callbacks.ModelCheckpoint(
            str(folder / "{epoch}-{batch}.weights.h5"), save_weights_only=True, save_freq=2
        )
        ended = fit(compiled(), address, place, callbacks=[kept])
        names = sorted(path.name for path in folder.iterdir())
        return ended, kept._batches_seen_since_last_saving, names[-1:]

    assert killed(job, wanted=every(12, 99), again=False)[2] == ["3-2.weights.h5"]


def test_early_stopping_keeps_its_patience_and_is_the_end() -> None:
    """keras#14862. The best weights come back; started again, nothing is trained."""
    asked: list[int] = [9]

    def job(address: str, place: Places) -> Any:
        stopping = keras.callbacks.EarlyStopping(
            "loss", patience=2, min_delta=9, restore_best_weights=True
        )
        ended = fit(compiled(), address, place, callbacks=[stopping], epochs=asked[0])
        return ended, stopping.wait, stopping.stopped_epoch, stopping.best_weights

    ended, wait, stopped, best = killed(job, wanted=every(3, 6))
    assert (len(ended["epochs"]), wait, stopped) == (3, 2, 2)
    assert ended["weights"][: len(best)] == best

    address = fresh_address()
    new_process()
    first = plain(job(address, nowhere))
    asked[0] = 20
    new_process()
    assert plain(job(address, nowhere)) == first


def test_stopped_in_mid_epoch() -> None:
    class Enough(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.count = 0

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.count += 1
            self.model.stop_training = self.count == 5

    def job(address: str, place: Places) -> Any:
        return fit(compiled(), address, place, callbacks=[Enough()], epochs=4)

    ended = killed(job, wanted=every(0, 4))
    assert (ended["step"], ended["epochs"]) == (5, [0, 1])


# -- several trainings ---------------------------------------------------------------


def test_more_epochs() -> None:
    address = fresh_address()
    new_process()
    fit(compiled(), address, nowhere, epochs=2)
    new_process()
    more = plain(fit(compiled(), address, nowhere, epochs=4))
    new_process()
    assert more == plain(fit(compiled(), fresh_address(), nowhere, epochs=4))


def test_two_trainings_in_a_row() -> None:
    def job(address: str, place: Places) -> Any:
        model = compiled()
        with holdfast.Run(address, every=1, quiet=True) as run:
            head = holdfast.keras.Callback(run, name="head")
            full = holdfast.keras.Callback(run, name="full")
            options = {"epochs": 2, "batch_size": 8, "verbose": 0}
            first = model.fit(X, Y, callbacks=[head, At(place)], **options)
            model.layers[0].trainable = False
            model.compile("sgd", "mse")
            second = model.fit(X, Y, callbacks=[full, At(place)], **options)
        return model.get_weights(), first.history, second.history

    killed(job, wanted=every(4, 11))


def test_folds_in_a_loop() -> None:
    def job(address: str, place: Places) -> Any:
        with holdfast.Run(address, every=1, quiet=True) as run:
            ours = holdfast.keras.Callback(run)
            scores = run.box(losses=[]).losses
            for fold in run.range(3):
                random.seed(fold)
                model = compiled()
                history = model.fit(
                    X, Y, epochs=2, batch_size=8, verbose=0, callbacks=[ours, At(place)]
                )
                scores.append(history.history["loss"])
            return list(scores)

    assert len(killed(job, wanted=every(8, 15))) == 3


def test_adapters_of_low_rank_add_little() -> None:
    """The frozen weights are stored once."""
    new_process()
    address = fresh_address()
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(512), keras.layers.Dense(1)])
    model.layers[0].enable_lora(1)
    model.compile("adam", "mse")
    x = RNG.normal(size=(8, 64)).astype("float32")
    with holdfast.Run(address, every=1, keep="last=3", quiet=True) as run:
        ours = holdfast.keras.Callback(run)
        model.fit(x, x[:, :1], epochs=3, batch_size=8, verbose=0, callbacks=[ours])
        infos = run.manager.checkpoints()
    assert infos[-1].new_bytes < 0.5 * infos[-1].nbytes
