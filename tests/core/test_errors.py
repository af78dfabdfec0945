"""Errors go from process to process."""

from __future__ import annotations

import copy
import pickle

import pytest

from holdfast import errors

SOME = [
    errors.HoldfastError("a", hint="b"),
    errors.UnsupportedValue("model/x", "socket", hint="leave it"),
    errors.DamagedObject("packs/a", "it is short", leaf="model/x"),
    errors.ObjectNotFound("log/1", "runs/a"),
    errors.TornRead(["a", "b"]),
    errors.BaseLost(["a"]),
    errors.StructureMismatch("c", missing=["d"]),
    errors.UntrackedParameters(["e"]),
]


@pytest.mark.parametrize("error", SOME, ids=lambda error: type(error).__name__)
def test_an_error_is_the_same_in_another_process(error: errors.HoldfastError) -> None:
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is type(error)
        assert (str(again), again.args, again.__dict__) == (str(error), error.args, error.__dict__)


def test_every_kind_of_error_is_among_them() -> None:
    """Those that are made in a way of their own."""
    own = {
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.HoldfastError)
        if "__init__" in vars(kind)
    }
    assert own == {type(error) for error in SOME}
