"""An estimator of a checkpoint, where no program builds one."""

from __future__ import annotations

from typing import Any

from sklearn.base import BaseEstimator

from holdfast.errors import StateError
from holdfast.manager import open as open_checkpoint


def load_estimator(ref: str, name: str = "clf") -> Any:
    """The estimator called `name` in a checkpoint, ready to predict: `load_estimator(
    "runs/spam@best")`, or `load_estimator("runs/spam", "models/3")` for one inside of a dict.

    It is made without running its `__init__`. Classes that are not scikit-learn's own must
    have been imported. Raises StateError if there is no estimator of that name.

    >>> import holdfast
    >>> from sklearn.preprocessing import StandardScaler
    >>> with holdfast.CheckpointManager("memory://scaler") as manager:
    ...     saved = manager.save(1, {"scaler": StandardScaler().fit([[1.0], [3.0]])}).result()
    >>> float(load_estimator("memory://scaler", "scaler").transform([[4.0]])[0, 0])
    2.0
    """
    view: Any = open_checkpoint(ref)
    *above, last = name.split("/")
    try:
        for part in above:
            view = view[part]
        found = view.whole(last)
    except (KeyError, AttributeError):
        found = None
    if not isinstance(found, BaseEstimator):
        raise StateError(
            f"{ref} has no estimator called {name!r}",
            hint="holdfast show prints what it has. Import the module of your own class first.",
        )
    return found
