"""Keras' variables as arrays by path, and back."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import keras
import numpy as np

from holdfast.errors import StateError

_NUMBER = re.compile(r"_\d+(?=/|$|_)")
# Types that NumPy has only through another package, as the integers that they are made of.
_BITS = {1: np.uint8, 2: np.uint16}


def arrays_of(variables: Iterable[Any]) -> dict[str, Any]:
    """The values by path. They may share memory with the variables.

    Numbers that NumPy does not know by itself (bfloat16) are {"dtype": name, "bits": integers}.
    """
    found: dict[str, Any] = {}
    for path, variable in _by_path(variables):
        array = _host(variable.value)
        if array.dtype.kind == "V" or array.dtype.isbuiltin != 1:
            bits = array.view(_BITS[array.dtype.itemsize])
            found[path] = {"dtype": str(array.dtype), "bits": bits}
        else:
            found[path] = array
    return found


def assign(variables: Iterable[Any], saved: Mapping[str, Any], *, what: str) -> None:
    """Give the variables the values that `arrays_of` made of variables like them.

    They are found by path. Where only the numbers differ that Keras gives to unnamed layers
    ("dense_3" where the program has built others before), they are found by their order.

    Raises StateError that names all that differs, before anything is changed.
    """
    live = _by_path(variables)
    values = {path: _array(value) for path, value in saved.items()}
    if {path for path, _ in live} != set(values) and [plain(path) for path, _ in live] == [
        plain(path) for path in values
    ]:
        values = {path: value for (path, _), value in zip(live, values.values(), strict=True)}
    paths = dict(live)
    wrong = [f"{path}: not in the checkpoint" for path in paths if path not in values]
    wrong += [f"{path}: only in the checkpoint" for path in values if path not in paths]
    wrong += [
        f"{path}: saved as {_words(values[path])}, the program has {_words(variable)}"
        for path, variable in live
        if path in values and _words(values[path]) != _words(variable)
    ]
    if wrong:
        raise StateError(
            f"{what} cannot be restored, for it is built otherwise:\n  " + "\n  ".join(wrong[:20]),
            hint="Build and compile the model as it was, or start the run at another address.",
        )
    for path, variable in live:
        variable.assign(_owned(values[path]))


def _owned(value: Any) -> Any:
    """The array in memory of the backend's own.

    JAX would go on with NumPy's. `fit` lets it write over what it trains, which executables out
    of JAX's compilation cache do even then, with memory that is freed meanwhile (0.5.3).
    """
    if keras.backend.backend() != "jax":
        return value
    import jax.numpy as jnp

    return jnp.array(value, copy=True)


def plain(path: str) -> str:
    """A path without the numbers that Keras counts unnamed layers with."""
    return _NUMBER.sub("", path)


def _by_path(variables: Iterable[Any]) -> list[tuple[str, Any]]:
    counts: Counter[str] = Counter()
    found: list[tuple[str, Any]] = []
    for variable in variables:
        path = variable.path
        number = counts[path]
        counts[path] += 1
        found.append((f"{path}#{number}" if number else path, variable))
    return found


def _host(value: Any) -> np.ndarray[Any, Any]:
    """Its memory where that can be had, which is the caller's until training goes on: Keras would
    copy it, from TensorFlow twice."""
    backend = keras.backend.backend()
    try:
        if backend == "torch" and value.device.type == "cpu":
            return value.detach().numpy()
        if backend == "tensorflow":
            return np.asarray(memoryview(value.read_value()))
    except (AttributeError, TypeError, ValueError):  # bfloat16, for one
        pass
    return np.asarray(keras.ops.convert_to_numpy(value))


def _array(value: Any) -> Any:
    if isinstance(value, Mapping):
        return np.asarray(value["bits"]).view(_dtype(value["dtype"]))
    return np.asarray(value)


def _dtype(name: str) -> np.dtype[Any]:
    import ml_dtypes  # Keras needs it

    return np.dtype(getattr(ml_dtypes, name))


def _words(value: Any) -> str:
    """An array or a variable: "float32[3, 4]"."""
    dtype = keras.backend.standardize_dtype(value.dtype)
    return f"{dtype}[{', '.join(str(size) for size in value.shape)}]"
