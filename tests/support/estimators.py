"""What estimators of scikit-learn hold, as a text: equal where all bits are. Knows nothing of
Holdfast."""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import numpy as np


def digest(*values: Any) -> str:
    """Of everything in `values`: types, bits, random states, trees, and what is one object."""
    found = hashlib.blake2b(digest_size=16)
    _add(values, found, {})
    return found.hexdigest()


def _add(value: Any, found: Any, seen: dict[int, Any]) -> None:
    found.update(f"|{type(value).__module__}.{type(value).__qualname__}:".encode())
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        found.update(repr(value).encode())
        return
    if id(value) in seen:
        found.update(f"again {list(seen).index(id(value))}".encode())
        return
    if not isinstance(value, tuple | np.generic):
        seen[id(value)] = value
    if isinstance(value, np.ndarray | np.generic):
        _add_array(np.asarray(value), found, seen)
    elif isinstance(value, np.random.RandomState):
        if value is np.random.mtrand._rand:  # type: ignore[attr-defined]
            found.update(b"the global one")
        _add(value.get_state(legacy=False), found, seen)
    elif isinstance(value, np.random.Generator):
        _add(value.bit_generator.state, found, seen)
    elif isinstance(value, dict):
        for key in sorted(value, key=repr):
            _add(key, found, seen)
            _add(value[key], found, seen)
    elif isinstance(value, list | tuple):
        found.update(str(len(value)).encode())
        for item in value:
            _add(item, found, seen)
    elif isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        found.update(f"{value.__module__}.{value.__qualname__}".encode())
    elif type(value) is functools.partial:
        _add([value.func, value.args, value.keywords], found, seen)
    elif hasattr(value, "__dict__"):
        _add(vars(value), found, seen)
    elif type(value).__name__ in ("slice", "dtype", "ufunc"):
        found.update(repr(value).encode())
    else:
        _, arguments, *state = value.__reduce__()
        _add([list(arguments), *state], found, seen)


def _add_array(array: np.ndarray[Any, Any], found: Any, seen: dict[int, Any]) -> None:
    if array.dtype.kind == "O":
        found.update(repr(array.shape).encode())
        _add(array.reshape(-1).tolist(), found, seen)
    elif array.dtype.names:  # not what lies between the fields
        for name in array.dtype.names:
            _add_array(array[name], found, seen)
    else:
        found.update(f"{array.dtype.str}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
