"""`fit` under a run's rules: what is saved, what is logged, how it ends, what is refused."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false, reportReturnType=false

from __future__ import annotations

import csv
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

import holdfast
from holdfast.errors import HoldfastError, SaveFailed, StateError, UsageError
from holdfast.stores.faulty import Died, Effect, Fault, FaultPlan, FaultyStore
from holdfast.stores.memory import MemoryStore
from tests.support.jobs import Killed, fresh_address, steps_of
from tests.support.keras_jobs import (
    Places,
    X,
    Y,
    compiled,
    fit,
    keras,
    network,
    new_process,
    nowhere,
    plain,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


# -- what is saved and logged --------------------------------------------------------


def test_every_rule() -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 1
        return now[0]

    def saved(every: Any, keep: str, **options: Any) -> list[int]:
        address = fresh_address()
        new_process()
        options = {"every": every, "keep": keep, **options}
        fit(compiled(), address, nowhere, epochs=4, options=options)
        return steps_of(address)

    assert saved("epoch", "last=9") == [3, 6, 9, 12]
    assert saved(2, "last=2") == [10, 12]
    assert saved(1, "last=1 every=5") == [1, 5, 10, 12]
    by_time = saved("5s", "last=99", clock=clock)
    assert 2 < len(by_time) < 12
    assert by_time[-1] == 12


def test_the_best_and_its_weights() -> None:
    address = fresh_address()
    weights: list[Any] = []
    new_process()
    model = compiled(keras.optimizers.SGD(0.1, momentum=0.99))
    keep = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: weights.append((logs["loss"], model.get_weights()))
    )
    options = {"every": None, "keep": "last=1 best=1:loss"}
    fit(model, address, nowhere, callbacks=[keep], epochs=4, options=options)
    best = min(weights, key=lambda one: one[0])
    assert best is not weights[-1]

    other = network()  # its layers have other numbers now
    other.build((None, 3))
    assert other.weights[0].path != model.weights[0].path
    holdfast.keras.load_weights(other, f"{address}@best:loss")
    assert plain(other.get_weights()) == plain(best[1])
    with pytest.raises(StateError, match=r"saved as float32\[3, 4\]"):
        wrong = keras.Sequential([keras.layers.Dense(5, "tanh"), *network().layers[1:]])
        wrong.build((None, 3))
        holdfast.keras.load_weights(wrong, f"{address}@best:loss")
    with pytest.raises(StateError, match="no model named 'net'") as caught:
        holdfast.keras.load_weights(other, address, "net")
    assert "It has: model." in caught.value.hint


def test_what_fit_logs_at_the_end_of_an_epoch_and_a_callback_in_a_batch() -> None:
    address = fresh_address()
    new_process()
    with holdfast.Run(address, every=1, keep="last=9", quiet=True) as run:
        ours = holdfast.keras.Callback(run)
        each = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: run.log(batch_loss=logs["loss"])
        )
        more = {"epochs": 2, "batch_size": 8, "verbose": 0, "validation_data": (X, Y)}
        history = compiled().fit(X, Y, callbacks=[ours, each], **more).history
        infos = {info.step: info.metrics for info in run.manager.checkpoints()}
    assert set(infos[2]) == {"batch_loss"}
    assert infos[2]["batch_loss"] != infos[3]["batch_loss"]
    assert {"loss", "mae", "val_loss", "val_mae"} < set(infos[3])
    assert [infos[3]["val_loss"], infos[6]["val_loss"]] == history["val_loss"]


# -- how it ends ---------------------------------------------------------------------


def job(address: str, place: Places, **more: Any) -> Any:
    return fit(compiled(), address, place, validation_data=(X, Y), **more)


def stopped(address: str, where: str, **more: Any) -> int:
    """The number of steps that are saved after a signal that comes `where`."""
    told: list[str] = []

    def stop(name: str) -> None:
        if name == where and name not in told:
            signal.raise_signal(signal.SIGTERM)
        told.append(name)

    new_process()
    with pytest.raises(SystemExit) as ended:
        job(address, stop, **more)
    assert ended.value.code == 75
    return steps_of(address)[-1]


@pytest.mark.parametrize(
    ("where", "step"), [("batch 1 begins", 2), ("batch 2 begins", 3), ("validation 1 begins", 3)]
)
def test_a_signal_ends_fit_and_the_same_command_goes_on(where: str, step: int) -> None:
    new_process()
    whole = plain(job(fresh_address(), nowhere))
    address = fresh_address()
    assert stopped(address, where, options={"every": None}) == step
    new_process()
    assert plain(job(address, nowhere)) == whole


def test_a_validation_that_is_too_long_for_a_last_save_is_left() -> None:
    """Nothing in it is saved: what was saved in the epoch is gone on with."""
    new_process()
    whole = plain(job(fresh_address(), nowhere))
    address = fresh_address()
    assert stopped(address, "validation 1 begins", options={"grace": 0.001}) == 2
    new_process()
    assert plain(job(address, nowhere)) == whole


# The threads of a process that is gone.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_process_that_dies_while_it_saves() -> None:
    """keras#20463: BackupAndRestore cannot load what was half written."""
    new_process()
    whole = plain(fit(compiled(), fresh_address(), nowhere))
    for prefix in ("packs/", "manifests/", "log/"):
        died = Fault(Effect.DIE_BEFORE, prefix=prefix, operation="put_new", nth=3)
        inner, left = (MemoryStore.named(fresh_address()[9:]) for _ in range(2))
        store = FaultyStore(inner, FaultPlan((died,)))
        new_process()
        with pytest.raises((Died, HoldfastError)):
            fit(compiled(), "runs/x", lambda name: None, options={"store": store})
        new_process()
        left._objects.update(inner._objects)  # the same one is still open in this process
        options = {"store": left}
        assert plain(fit(compiled(), "runs/x", nowhere, options=options)) == whole


def test_a_save_that_fails_is_heard_of() -> None:
    """keras#23609."""
    faults = tuple(Fault(Effect.FAIL, prefix="packs/", nth=nth) for nth in range(1, 60))
    store = FaultyStore(MemoryStore(), FaultPlan(faults))
    new_process()
    with pytest.raises(SaveFailed):
        fit(compiled(), "runs/x", lambda name: None, options={"store": store})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # CSVLogger's file
def test_files_of_other_callbacks_go_on(tmp_path: Path) -> None:
    """Rows of the log are not lost or doubled; the best file is not overwritten (keras#17012)."""

    def train(address: str, place: Places, log: str) -> Any:
        model = compiled(keras.optimizers.SGD(0.1, momentum=0.99))
        best = keras.callbacks.ModelCheckpoint(
            f"{log}.weights.h5", "loss", save_best_only=True, save_weights_only=True
        )
        fit(model, address, place, callbacks=[keras.callbacks.CSVLogger(log), best], epochs=4)
        return best.best, Path(log).read_text()

    whole, half = str(tmp_path / "whole.csv"), str(tmp_path / "half.csv")
    new_process()
    expected = train(fresh_address(), nowhere, whole)
    losses = [float(row["loss"]) for row in csv.DictReader(expected[1].splitlines())]
    assert min(losses) < losses[-1]  # an epoch behind the best one is what runs again
    address = fresh_address()

    def die(name: str) -> None:
        if name == "epoch 2 ends":
            raise Killed

    new_process()
    with pytest.raises(Killed):
        train(address, die, half)
    assert len(Path(half).read_text().splitlines()) == 4  # with the epoch that runs again
    new_process()
    assert train(address, nowhere, half) == expected
    models = [network(), network()]
    for model, file in zip(models, (whole, half), strict=True):
        model.build((None, 3))
        model.load_weights(f"{file}.weights.h5")
    assert plain(models[0].get_weights()) == plain(models[1].get_weights())


# -- what is refused -----------------------------------------------------------------


def test_wrong_use(tmp_path: Path) -> None:
    def using(run: holdfast.Run, *more: Any, **options: Any) -> None:
        ours = holdfast.keras.Callback(run)
        options = {"verbose": 0, "batch_size": 8, **options}
        compiled().fit(X, Y, callbacks=[ours, *more], **options)

    def fresh() -> holdfast.Run:
        return holdfast.Run(fresh_address(), quiet=True)

    with fresh() as run:
        ours = holdfast.keras.Callback(run)
        model = compiled()
        model.fit(X, Y, verbose=0, callbacks=[ours])
        with pytest.raises(UsageError, match="before this one"):
            model.fit(X, Y, verbose=0, callbacks=[ours])
        with pytest.raises(UsageError, match="before this one"):
            using(run)
    with pytest.raises(UsageError, match="initial_epoch"), fresh() as run:
        using(run, initial_epoch=1, epochs=3)
    with pytest.raises(UsageError, match="BackupAndRestore"), fresh() as run:
        using(run, keras.callbacks.BackupAndRestore(str(tmp_path / "backup")))
    with pytest.raises(UsageError, match="two"), fresh() as run:
        using(run, holdfast.keras.Callback(run, name="other"))


def test_a_version_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras, "__version__", "3.6.0")
    monkeypatch.delitem(sys.modules, "holdfast.keras")
    with pytest.raises(HoldfastError, match=r"3\.7 or newer; this is Keras 3\.6\.0"):
        __import__("holdfast.keras")
