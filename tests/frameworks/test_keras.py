"""Keras' `fit`: what was killed and started again ends as what was never stopped."""

# Keras' own annotations contradict its documentation (`verbose: str`).
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false, reportReturnType=false

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

_before = os.environ.get("KERAS_BACKEND")
os.environ["KERAS_BACKEND"] = "torch"
import keras  # noqa: E402

if _before is None:
    del os.environ["KERAS_BACKEND"]  # programs that other tests start choose their own
else:
    os.environ["KERAS_BACKEND"] = _before

import holdfast  # noqa: E402
import holdfast.keras  # noqa: E402
from holdfast.errors import HoldfastError, StateError, UsageError  # noqa: E402
from tests.support.jobs import copied, fresh_address, steps_of  # noqa: E402

# Keras' variables and NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROGRAM = Path(__file__).parent / "keras_program.py"
RNG = np.random.default_rng(0)
X = RNG.normal(size=(22, 3)).astype("float32")
Y = X.prod(axis=1, keepdims=True) + 0.1

Places = Callable[[str], None]


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
        self.lowest = min(self.lowest, logs["loss"])
        self._place(f"batch {batch} ends")

    def on_test_end(self, logs: Any = None) -> None:
        self._place("validated")

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seen.append(logs["loss"])
        self._place(f"epoch {epoch} ends")


Job = Callable[[str, Places], Any]


def nowhere(place: str) -> None:
    pass


def new_process() -> None:
    """Seeds and global generators of a process that has just started."""
    keras.src.backend.common.global_state.set_global_attribute("global_seed_generator", None)
    # Not keras.utils.set_random_seed: it imports TensorFlow, for five seconds.
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    return value


def of(variables: Any) -> list[np.ndarray[Any, Any]]:
    return [keras.ops.convert_to_numpy(variable.value) for variable in variables]


def killed(job: Job, *, wanted: Callable[[int], bool] = lambda number: True) -> Any:
    """Run `job(address, place)`, and again from what it would have left behind at each place;
    all must end with what the first returned, which is returned here."""
    address = fresh_address()
    left: list[tuple[str, str]] = []
    new_process()
    whole = plain(job(address, lambda name: left.append((name, copied(address)))))
    new_process()
    assert plain(job(address, nowhere)) == whole, "started again behind its end"
    for number, (name, there) in enumerate(left):
        if wanted(number):
            new_process()
            assert plain(job(there, nowhere)) == whole, f"killed at {number}: {name}"
    assert len(left) > 6
    return whole


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
    with holdfast.Run(address, every=1, quiet=True, **(options or {})) as run:
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

    whole = killed(job)
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

    killed(job, wanted=lambda number: number % 3 == 1)


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


class Endless(keras.utils.PyDataset):
    @property
    def num_batches(self) -> None:
        return None

    def __getitem__(self, index: int) -> Any:
        first = index % 18
        return X[first : first + 4], Y[first : first + 4]


def generated() -> Iterator[Any]:
    rng = np.random.default_rng(5)
    while True:
        which = rng.integers(0, len(X), 4)
        yield X[which], Y[which]


def loader(**options: Any) -> Any:
    data = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    return torch.utils.data.DataLoader(data, batch_size=6, **options)


DATA: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "arrays in order": (lambda: (X, Y), {"shuffle": False}),
    "arrays, batches shuffled": (lambda: (X, Y), {"shuffle": "batch"}),
    "arrays, passes and epochs apart": (lambda: (X, Y), {"steps_per_epoch": 2, "batch_size": 6}),
    "dataset": (lambda: (Shuffled(),), {}),
    "dataset, shuffled by fit": (lambda: (Shuffled(),), {"shuffle": True}),
    "dataset with workers": (lambda: (Shuffled(workers=2),), {"shuffle": True}),
    "dataset, passes and epochs apart": (lambda: (Shuffled(),), {"steps_per_epoch": 2}),
    "dataset without end": (lambda: (Endless(),), {"steps_per_epoch": 3, "shuffle": False}),
    "generator": (lambda: (generated(),), {"steps_per_epoch": 3, "shuffle": False}),
    "loader": (lambda: (loader(shuffle=True),), {"shuffle": False}),
    "loader, passes and epochs apart": (
        lambda: (loader(shuffle=True),),
        {"steps_per_epoch": 2, "shuffle": False},
    ),
}


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize("name", DATA)
def test_data(name: str) -> None:
    make, options = DATA[name]

    def job(address: str, place: Places) -> Any:
        return fit(compiled(), address, place, *make(), **options)

    killed(job, wanted=lambda number: number % 4 == 2)


class Unknown(keras.src.trainers.data_adapters.data_adapter.DataAdapter):
    """Batches in an order that nobody can know."""

    num_batches, batch_size = 3, 4
    has_partial_batch, partial_batch_size = False, None

    def get_torch_dataloader(self) -> Any:
        return [(torch.from_numpy(X[:4]), torch.from_numpy(Y[:4]))] * 3

    get_numpy_iterator = get_tf_dataset = get_jax_iterator = get_torch_dataloader


def test_data_of_unknown_order_is_saved_between_epochs(capsys: pytest.CaptureFixture[str]) -> None:
    def job(address: str, place: Places) -> Any:
        return fit(compiled(), address, place, Unknown(), shuffle=False)

    assert killed(job)["step"] == 3
    assert "ends of epochs only" in capsys.readouterr().err


def test_early_stopping_keeps_its_patience_and_is_the_end() -> None:
    """keras#14862. Started again, with more epochs too, nothing is trained."""
    asked: list[int] = [9]

    def job(address: str, place: Places) -> Any:
        stopping = keras.callbacks.EarlyStopping("loss", patience=2, min_delta=9)
        ended = fit(compiled(), address, place, callbacks=[stopping], epochs=asked[0])
        return ended, stopping.wait, stopping.stopped_epoch

    ended, wait, stopped = killed(job, wanted=lambda number: number % 5 == 1)
    assert (len(ended["epochs"]), wait, stopped) == (3, 2, 2)

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

    ended = killed(job, wanted=lambda number: number % 2 == 0)
    assert (ended["step"], ended["epochs"]) == (5, [0, 1])


def test_more_epochs() -> None:
    address = fresh_address()
    new_process()
    fit(compiled(), address, nowhere, epochs=2)
    new_process()
    more = plain(fit(compiled(), address, nowhere, epochs=4))
    new_process()
    assert more == plain(fit(compiled(), fresh_address(), nowhere, epochs=4))


def test_the_best_and_its_weights() -> None:
    address = fresh_address()
    weights: list[Any] = []
    new_process()
    model = compiled(keras.optimizers.SGD(0.3, momentum=0.99))
    keep = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: weights.append((logs["loss"], model.get_weights()))
    )
    with holdfast.Run(address, every=None, keep="last=1 best=1:loss", quiet=True) as run:
        ours = holdfast.keras.Callback(run)
        model.fit(X, Y, epochs=4, batch_size=8, verbose=0, callbacks=[ours, keep])
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


def test_every_rule() -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 1
        return now[0]

    def saved(every: Any, keep: str, **options: Any) -> list[int]:
        address = fresh_address()
        new_process()
        with holdfast.Run(address, every=every, keep=keep, quiet=True, **options) as run:
            ours = holdfast.keras.Callback(run)
            compiled().fit(X, Y, epochs=4, batch_size=8, verbose=0, callbacks=[ours])
        return steps_of(address)

    assert saved("epoch", "last=9") == [3, 6, 9, 12]
    assert saved(2, "last=2") == [10, 12]
    by_time = saved("5s", "last=99", clock=clock)
    assert 2 < len(by_time) < 12
    assert by_time[-1] == 12


def test_a_signal_ends_fit_and_the_same_command_goes_on() -> None:
    def job(address: str, place: Places) -> Any:
        return fit(compiled(), address, place)

    new_process()
    whole = plain(job(fresh_address(), nowhere))
    address = fresh_address()
    places = iter(range(99))

    def stop(name: str) -> None:
        if next(places) == 9:
            os.kill(os.getpid(), signal.SIGTERM)

    new_process()
    with pytest.raises(SystemExit) as ended:
        job(address, stop)
    assert ended.value.code == 75
    assert steps_of(address)[-1] < 9
    new_process()
    assert plain(job(address, nowhere)) == whole


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # CSVLogger's file
def test_files_of_other_callbacks_go_on(tmp_path: Any) -> None:
    """Rows of the log are not lost or doubled; the best file is not overwritten (keras#17012)."""

    def job(address: str, place: Places, log: str, threshold: Any = None) -> Any:
        model = compiled(keras.optimizers.SGD(0.3, momentum=0.99))
        best = keras.callbacks.ModelCheckpoint(
            f"{log}.weights.h5", "loss", save_best_only=True, save_weights_only=True
        )
        fit(model, address, place, callbacks=[keras.callbacks.CSVLogger(log), best], epochs=4)
        return best.best, Path(log).read_text()

    whole, half = str(tmp_path / "whole.csv"), str(tmp_path / "half.csv")
    new_process()
    expected = job(fresh_address(), nowhere, whole)
    address = fresh_address()
    places = iter(range(99))

    def die(name: str) -> None:
        if name == "epoch 2 ends" and next(places) == 0:
            raise KeyboardInterrupt

    new_process()
    with pytest.raises(KeyboardInterrupt):
        job(address, die, half)
    assert (
        len(Path(half).read_text().splitlines()) == 4
    )  # the row of the epoch that runs again is there
    new_process()
    assert job(address, nowhere, half) == expected
    models = [network(), network()]
    for model, file in zip(models, (whole, half), strict=True):
        model.build((None, 3))
        model.load_weights(f"{file}.weights.h5")
    assert plain(models[0].get_weights()) == plain(models[1].get_weights())


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

    killed(job, wanted=lambda number: number % 4 == 0)


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

    assert len(killed(job, wanted=lambda number: number % 5 == 0)) == 3


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
            return {"loss": loss}

    def job(address: str, place: Places) -> Any:
        model = Two()
        model(X[:1])
        model.compile("adam")
        model.optimizer.build(model.one.trainable_weights)
        model.built_by.build(model.other.trainable_weights)
        ended = fit(model, address, place, epochs=2)
        return ended, of(model.built_by.variables)

    killed(job, wanted=lambda number: number % 3 == 0)


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

    assert killed(job, wanted=lambda number: number % 5 == 0)[0][0] == "bfloat16"


def test_a_save_that_fails_is_heard_of() -> None:
    """keras#23609."""
    from holdfast.errors import SaveFailed
    from holdfast.stores.faulty import Effect, Fault, FaultPlan, FaultyStore
    from holdfast.stores.memory import MemoryStore

    faults = tuple(Fault(Effect.FAIL, prefix="packs/", nth=nth) for nth in range(1, 60))
    store = FaultyStore(MemoryStore(), FaultPlan(faults))
    new_process()
    with pytest.raises(SaveFailed):
        fit(compiled(), "runs/x", nowhere, options={"store": store})


def test_wrong_use(tmp_path: Any) -> None:
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
    with pytest.raises(UsageError, match="initial_epoch"), fresh() as run:
        using(run, initial_epoch=1, epochs=3)
    with pytest.raises(UsageError, match="BackupAndRestore"), fresh() as run:
        using(run, keras.callbacks.BackupAndRestore(str(tmp_path / "backup")))
    with pytest.raises(UsageError, match="two"), fresh() as run:
        using(run, holdfast.keras.Callback(run, name="other"))


@pytest.mark.parametrize("change", ["model", "batches", "optimizer", "kind"])
def test_what_was_changed_is_refused(change: str) -> None:
    address = fresh_address()
    new_process()

    def die(name: str) -> None:
        if name == "batch 1 ends":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(compiled(), address, die)
    new_process()
    model = compiled("sgd" if change == "optimizer" else "adam")
    if change == "model":
        model = keras.Sequential([keras.layers.Dense(9), keras.layers.Dense(1)])
        model.compile("adam", "mse")
    data: Any = (loader(),) if change == "kind" else (X, Y)
    options = {"shuffle": False} if change == "kind" else {}
    if change == "batches":
        options = {"batch_size": 7}
    with pytest.raises(HoldfastError) as refused:
        fit(model, address, nowhere, *data, **options)
    assert refused.value.hint


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "data", "places"),
    [
        ("torch", "arrays", (5,)),
        ("jax", "arrays", (2, 4)),
        ("jax", "dataset", (7,)),
        ("tensorflow", "arrays", (2, 4)),
        ("tensorflow", "dataset", (7,)),
        ("tensorflow", "pipeline", (6,)),
    ],
)
def test_processes_that_are_killed(
    backend: str, data: str, places: tuple[int, ...], tmp_path: Any
) -> None:
    def program(address: str, *more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(PROGRAM), str(tmp_path / address), data, *more],
            env={**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"},
            capture_output=True,
            text=True,
        )

    def end(done: subprocess.CompletedProcess[str]) -> str:
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]

    whole = end(program("whole"))
    for place in places:
        assert program(f"run{place}", str(place)).returncode == -signal.SIGKILL
        done = program(f"run{place}")
        assert f"at step {place - 1}" in done.stderr or f"at step {place}" in done.stderr
        assert "ends of epochs only" not in done.stderr
        assert end(done) == whole, place
