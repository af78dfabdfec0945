"""Each kind of data that `fit` takes goes on where it was, on PyTorch."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportReturnType=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from holdfast.errors import HoldfastError
from tests.support.jobs import Killed, fresh_address
from tests.support.keras_jobs import (
    Places,
    Shuffled,
    X,
    Y,
    compiled,
    every,
    fit,
    generated,
    keras,
    killed,
    loader,
    new_process,
    nowhere,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


class Endless(keras.utils.PyDataset):
    @property
    def num_batches(self) -> None:
        return None

    def __getitem__(self, index: int) -> Any:
        first = index % 18
        return X[first : first + 4], Y[first : first + 4]


DATA: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "arrays in order": (lambda: (X, Y), {"shuffle": False}),
    "arrays, batches shuffled": (lambda: (X, Y), {"shuffle": "batch"}),
    "arrays, passes and epochs apart": (lambda: (X, Y), {"steps_per_epoch": 2, "batch_size": 6}),
    "arrays with weights": (lambda: (X, Y), {"sample_weight": Y[:, 0] ** 2}),
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

    # In mid-epoch, at its end, and behind it.
    killed(job, wanted=lambda number: number in (4, 14), again=False)


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

    assert killed(job, wanted=every(2, 9))["step"] == 3
    assert "ends of epochs only" in capsys.readouterr().err


VALIDATION: dict[str, Callable[[], dict[str, Any]]] = {
    "loader": lambda: {"validation_data": loader(shuffle=True)},
    "dataset": lambda: {"validation_data": Shuffled(), "validation_steps": 2},
    "some epochs": lambda: {"validation_data": (X, Y), "validation_freq": 2},
}


@pytest.mark.parametrize("name", VALIDATION)
def test_validation_data(name: str) -> None:
    """What a validation draws is drawn from the states of that place."""

    def job(address: str, place: Places) -> Any:
        return fit(compiled(), address, place, **VALIDATION[name]())

    assert (
        "val_loss" in killed(job, wanted=lambda number: number in (6, 18), again=False)["history"]
    )


def test_one_dataset_to_train_and_to_validate_with() -> None:
    def job(address: str, place: Places) -> Any:
        data = Shuffled()
        return fit(compiled(), address, place, data, validation_data=data, validation_steps=2)

    killed(job, wanted=lambda number: number in (4, 20), again=False)


def test_a_generator_as_validation_data_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    new_process()
    more = {"validation_data": generated(), "validation_steps": 2}
    fit(compiled(), fresh_address(), nowhere, epochs=2, **more)
    assert capsys.readouterr().err.count("validation data is a generator") == 1


def test_no_batch_is_made_twice_or_missed() -> None:
    """Each batch of an epoch once, before the process dies or after."""
    made: list[int] = []

    class Told(keras.utils.PyDataset):
        def __len__(self) -> int:
            return 5

        def __getitem__(self, index: int) -> Any:
            made.append(index)
            return X[4 * index : 4 * index + 4], Y[4 * index : 4 * index + 4]

    def die(name: str) -> None:
        if name == "batch 3 begins":
            raise Killed

    address = fresh_address()
    new_process()
    with pytest.raises(Killed):
        fit(compiled(), address, die, Told(), shuffle=True)
    before = made[1:-1]  # the first is made to look at; the last is that which it dies in
    made.clear()
    new_process()
    fit(compiled(), address, nowhere, Told(), shuffle=True)
    after = made[1:]
    assert len(before) == 3
    assert sorted(before + after[:2]) == [0, 1, 2, 3, 4]
    assert sorted(after[2:7]) == sorted(after[7:]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("change", ["model", "batches", "optimizer", "kind"])
def test_what_was_changed_is_refused(change: str) -> None:
    address = fresh_address()
    new_process()

    def die(name: str) -> None:
        if name == "batch 1 ends":
            raise Killed

    with pytest.raises(Killed):
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
