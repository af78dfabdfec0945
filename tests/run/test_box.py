from __future__ import annotations

import copy

import pytest

from holdfast.errors import UsageError
from holdfast.run.box import Box, redeclare, values_of


def test_attributes_and_defaults() -> None:
    box = Box()
    state = box(best=float("inf"), history=[])
    assert state is box
    state.best = 0.5
    assert box.best == 0.5
    assert "history" in box
    assert repr(box) == "Box(best=0.5, history=[])"
    box(best=9.0, patience=3)
    assert (box.best, box.patience) == (0.5, 3)
    del box.patience
    assert dir(box) == ["best", "history"]


def test_a_name_that_was_not_declared() -> None:
    with pytest.raises(AttributeError, match=r"run.box\(best=default\)"):
        _ = Box().best
    with pytest.raises(AttributeError):
        del Box().best


def test_private_names_are_refused() -> None:
    with pytest.raises(UsageError, match="_values"):
        Box()._values = 3
    with pytest.raises(UsageError):
        Box()(_x=1)
    assert not hasattr(Box(), "__deepcopy__")


def test_defaults_come_back_after_a_restore_without_them() -> None:
    box = Box()(best=1, patience=0)
    values_of(box).clear()
    values_of(box)["best"] = 0.25
    redeclare(box)
    assert (box.best, box.patience) == (0.25, 0)


def test_a_default_is_not_shared_with_the_values_of_another_box() -> None:
    first, second = Box()(history=[]), Box()(history=[])
    first.history.append(1)
    assert second.history == []
    assert copy.copy(values_of(first)) == {"history": [1]}
