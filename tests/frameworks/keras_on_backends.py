"""What `test_keras_backends.py` runs on TensorFlow and on JAX, in a process of each."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false, reportReturnType=false

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from tests.support.exhaustive import EXHAUSTIVE
from tests.support.jobs import Killed, fresh_address
from tests.support.keras_jobs import (
    Places,
    Shuffled,
    X,
    Y,
    compiled,
    fit,
    generated,
    keras,
    killed,
    loader,
    new_process,
    nowhere,
    of,
    pipeline,
    plain,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TENSORFLOW = keras.backend.backend() == "tensorflow"


def test_the_backend_is_the_one_that_was_asked_for() -> None:
    assert keras.backend.backend() == os.environ["KERAS_BACKEND"]


def test_killed_at_places() -> None:
    """Dropout, running means, patience, a plateau, the best weights, averages swapped in,
    validation; several steps in one call, the last of an epoch a shorter one."""

    def job(address: str, place: Places) -> Any:
        stopping = keras.callbacks.EarlyStopping(patience=9, restore_best_weights=True)
        plateau = keras.callbacks.ReduceLROnPlateau(factor=0.5, patience=1, min_delta=9)
        swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
        model = compiled(
            keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.5), steps_per_execution=2
        )
        more = {"validation_data": (X, Y), "batch_size": 5, "shuffle": "batch"}
        ended = fit(model, address, place, callbacks=[stopping, plateau, swap], **more)
        return [
            ended,
            [stopping.wait, stopping.best, stopping.best_epoch, stopping.best_weights],
            [plateau.wait, plateau.best, plateau.cooldown_counter, swap._ema_weights_in_model],
            float(keras.random.normal(())),
        ]

    # In a call, in a validation, and behind the first call of the next epoch.
    whole = killed(job, wanted=lambda number: number in (3, 8, 14))
    assert whole[0]["step"] == 9
    rates = whole[0]["history"]["learning_rate"]
    assert rates[2] < rates[0]


DATA: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "arrays, passes and epochs apart": (lambda: (X, Y), {"steps_per_epoch": 2, "batch_size": 6}),
    "dataset with workers": (lambda: (Shuffled(workers=2),), {"shuffle": True}),
    "generator": (lambda: (generated(),), {"steps_per_epoch": 3, "shuffle": False}),
    "loader": (lambda: (loader(shuffle=True),), {"shuffle": False}),
    "pipeline": (lambda: (pipeline(),), {"shuffle": False}),
}


# Each kind on one of the two; on PyTorch `test_keras_data.py` tries all but the last.
HERE = list(DATA) if EXHAUSTIVE else list(DATA)[0 if TENSORFLOW else 1 :: 2]


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize("name", HERE)
def test_data(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In the second epoch."""
    make, options = DATA[name]

    def job(address: str, place: Places) -> Any:
        return fit(compiled(), address, place, *make(), **options)

    killed(job, wanted=lambda number: number == 12, again=False)
    assert "ends of epochs only" not in capsys.readouterr().err


def test_half_precision_and_a_scaled_loss() -> None:
    def job(address: str, place: Places) -> Any:
        layers = keras.layers
        model = keras.Sequential(
            [layers.Dense(4, dtype="bfloat16"), layers.Dense(1, dtype="mixed_float16")]
        )
        model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()), "mse")
        fit(model, address, place, epochs=2)
        return [str(weight.dtype) for weight in model.weights], [
            array.astype("float32") for array in of([*model.weights, *model.optimizer.variables])
        ]

    ended = killed(job, wanted=lambda number: number == 4, again=False)
    assert set(ended[0]) == {"bfloat16", "float32"}


def test_batches_that_nobody_waits_for() -> None:
    """No callback looks at them, and the run saves rarely."""
    new_process()
    x = np.tile(X, (9, 1))
    y = np.tile(Y, (9, 1))

    def job(address: str, **options: Any) -> Any:
        model = compiled()
        with holdfast.Run(address, every=30, quiet=True) as run:
            ours = holdfast.keras.Callback(run)
            stop = keras.callbacks.LambdaCallback(**options)
            fitted = {"batch_size": 4, "epochs": 2, "verbose": 0, "callbacks": [stop, ours]}
            history = model.fit(x, y, **fitted)
        return plain([of(model.weights), history.history, run.step])

    whole = job(fresh_address())

    def die(epoch: int, logs: Any) -> None:
        raise Killed

    address = fresh_address()
    new_process()
    with pytest.raises(Killed):
        job(address, on_epoch_end=die)
    new_process()
    assert job(address) == whole


if TENSORFLOW:  # it writes by TensorFlow

    def test_the_steps_of_tensorboard_go_on(tmp_path: Path) -> None:
        import tensorflow as tf

        def steps(folder: Path) -> list[int]:
            found: set[int] = set()
            for file in sorted((folder / "train").glob("events.*")):
                for record in tf.data.TFRecordDataset(str(file)):
                    event = tf.compat.v1.Event.FromString(record.numpy())
                    found |= {event.step for one in event.summary.value if one.tag == "batch_loss"}
            return sorted(found)

        def job(address: str, place: Places, folder: Path) -> Any:
            board = keras.callbacks.TensorBoard(str(folder), update_freq="batch", write_graph=False)
            return fit(compiled(), address, place, callbacks=[board]), board._global_train_batch

        new_process()
        whole = plain(job(fresh_address(), nowhere, tmp_path / "whole"))
        told: list[str] = []

        def die(name: str) -> None:
            told.append(name)
            if told.count("batch 1 ends") == 2:
                raise Killed

        address = fresh_address()
        new_process()
        with pytest.raises(Killed):
            job(address, die, tmp_path / "half")
        new_process()
        assert plain(job(address, nowhere, tmp_path / "rest")) == whole
        assert steps(tmp_path / "whole") == list(range(1, 10))
        assert steps(tmp_path / "rest") == list(range(5, 10))
