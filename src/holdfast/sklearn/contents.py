"""What estimators hold, for the search for state that nobody saves (`holdfast.run.unsaved`)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator

Memory = tuple[str, int, int]


def parts(value: Any) -> list[Any] | None:
    return None  # its attributes, as of any object


def state(value: Any) -> dict[str, Any] | None:
    """The attributes of an estimator, and the list of them, which fitting changes; None for
    anything else."""
    if not isinstance(value, BaseEstimator):
        return None
    return {"attributes": _list_of(tuple(vars(value))), **vars(value)}


@lru_cache(maxsize=1024)
def _list_of(names: tuple[str, ...]) -> Any:
    # One array for equal lists: whoever looks knows values by their identity.
    return np.array([*names, ""])


def memory(value: Any) -> Memory | None:
    return None


def sample(value: Any, nbytes: int) -> tuple[str, bytes] | None:
    return None
