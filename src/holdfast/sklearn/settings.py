"""What estimators were built with: losses, rates, depths.

A restore overwrites these with what the checkpoint holds. `read` before it, in two processes,
tells whether the program was edited in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator

from holdfast.sklearn.estimators import MACHINE

_SCALARS = (bool, int, float, complex, str, type(None))
_MAX_DEPTH = 6


def read(tracked: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters by name (`clf.alpha`, `pipeline.clf__alpha`), of those estimators that are not
    fitted yet: loops change those of fitted ones (`n_estimators`).

    >>> from sklearn.naive_bayes import MultinomialNB
    >>> found = read({"clf": MultinomialNB(alpha=0.5)})
    >>> found["clf.alpha"], found["clf.fit_prior"]
    (0.5, True)
    """
    return {
        f"{path}.{name}": value
        for path, estimator in _estimators(tracked, "", 0)
        for name, value in _settings(estimator).items()
    }


def write(tracked: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Set the parameters with these names."""
    for path, estimator in _estimators(tracked, "", 0):
        own = {
            name: settings[f"{path}.{name}"]
            for name in estimator.get_params()
            if f"{path}.{name}" in settings
        }
        if own:
            estimator.set_params(**own)


def _estimators(value: Any, path: str, depth: int) -> Iterator[tuple[str, BaseEstimator]]:
    if isinstance(value, BaseEstimator):
        yield path, value
    elif isinstance(value, Mapping | list | tuple) and depth < _MAX_DEPTH:
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from _estimators(item, f"{path}/{key}" if path else str(key), depth + 1)


def _settings(estimator: BaseEstimator) -> dict[str, Any]:
    parameters = estimator.get_params(deep=True)
    parts = [value for value in parameters.values() if isinstance(value, BaseEstimator)]
    if any(_is_fitted(one) for one in (estimator, *parts)):
        return {}
    found = {
        name: value.item() if isinstance(value, np.generic) else value
        for name, value in parameters.items()
        if name.rpartition("__")[2] not in MACHINE
    }
    return {name: value for name, value in sorted(found.items()) if _is_setting(value)}


def _is_setting(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(isinstance(item, _SCALARS) for item in value)
    return isinstance(value, _SCALARS)


def _is_fitted(estimator: BaseEstimator) -> bool:
    return any(name.endswith("_") and not name.startswith("_") for name in vars(estimator))
