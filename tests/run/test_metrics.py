from __future__ import annotations

import numpy as np
import pytest

from holdfast.errors import UsageError
from holdfast.run.metrics import MetricBook


class Lazy:
    """A tensor on a device: counts how often somebody waits for it."""

    waits = 0

    def __init__(self, value: float) -> None:
        self.value = value

    def numel(self) -> int:
        return 1

    def detach(self) -> Lazy:
        return self

    def clone(self) -> Lazy:
        return Lazy(self.value)

    def __float__(self) -> float:
        Lazy.waits += 1
        return self.value


def test_logging_waits_for_no_device() -> None:
    book, before = MetricBook(), Lazy.waits
    for step in range(5):
        book.log({"loss": Lazy(float(step))}, step)
        book.settle(is_step=True)
    assert Lazy.waits == before
    assert book.known() == {"loss": 4.0}
    assert Lazy.waits == before + 1


def test_a_tensor_that_changes_later_was_copied() -> None:
    book, loss = MetricBook(), Lazy(1.0)
    book.log({"loss": loss}, 0)
    loss.value = 2.0
    array = np.array(3.0)
    book.log({"array": array}, 0)
    array[()] = 4.0
    book.settle(is_step=True)
    assert book.known() == {"loss": 1.0, "array": 3.0}


def test_metrics_belong_to_the_last_completed_step() -> None:
    book = MetricBook()
    book.log({"loss": 1.0}, 0)
    book.settle(is_step=True)
    book.log({"val_loss": 0.5}, 1)  # after the inner loop
    book.settle(is_step=False)
    assert book.known() == {"loss": 1.0, "val_loss": 0.5}
    book.log({"loss": 0.9}, 1)
    book.settle(is_step=True)
    assert book.known() == {"loss": 0.9}  # an old val_loss is not this step's
    assert book.latest() == {"loss": 0.9, "val_loss": 0.5}


def test_settle_returns_what_is_new() -> None:
    book = MetricBook()
    book.log({"a": 1}, 0)
    assert book.settle(is_step=False) == {"a": 1.0}
    assert book.settle(is_step=False) == {}


def test_the_saved_form() -> None:
    book = MetricBook()
    book.log({"loss": 1.5}, 7)
    book.settle(is_step=True)
    other = MetricBook()
    other.restore(book.to_tree(), book.known())
    assert other.known() == {"loss": 1.5}
    assert other.to_tree() == {"loss": [7, 1.5]}


@pytest.mark.parametrize("value", [np.zeros(3), np.zeros((2, 2))])
def test_more_than_one_number_is_refused(value: np.ndarray) -> None:
    with pytest.raises(UsageError, match="shape"):
        MetricBook().log({"loss": value}, 0)


@pytest.mark.parametrize("value", ["high", None, [1.0], object()])
def test_what_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(UsageError, match="not a number"):
        MetricBook().log({"loss": value}, 0)


def test_numbers_of_all_kinds() -> None:
    book = MetricBook()
    book.log({"a": True, "b": np.float32(0.5), "c": np.ones(1), "d": float("nan")}, 0)
    book.settle(is_step=True)
    known = book.known()
    assert (known["a"], known["b"], known["c"]) == (1.0, 0.5, 1.0)
    assert known["d"] != known["d"]
