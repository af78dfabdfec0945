"""What values of JAX hold, and samples of them.

For the search for state that nobody saves (`holdfast.run.unsaved`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from holdfast.core.classes import is_namedtuple
from holdfast.jax.arrays import is_key
from holdfast.jax.dtypes import words
from holdfast.jax.nnx import content, is_module, library
from holdfast.jax.trees import parts_of

Memory = tuple[str, int, int]
"""(device, first address, the one after the last)."""

_BLOCKS = 16


def parts(value: Any) -> list[Any] | None:
    """What is saved together with `value`; None if it is neither an array, a node nor a
    module."""
    if isinstance(value, jax.Array):
        return []
    if not _is_node(value):
        return None
    found = parts_of(value)
    return None if found is None else list(found.children.values())


def state(value: Any) -> dict[str, Any] | None:
    """The arrays in a node or module, by name. Empty for what `find_untracked` names."""
    if is_module(value):
        return {} if _is_optimizer(value) else _flat(content(value))
    return _flat(value) if _is_node(value) else None


def _flat(value: Any) -> dict[str, Any]:
    found, _ = jax.tree_util.tree_flatten_with_path(value)
    arrays = [(path, leaf) for path, leaf in found if isinstance(leaf, jax.Array)]
    return {jax.tree_util.keystr(path).lstrip("."): leaf for path, leaf in arrays}


def memory(value: Any) -> Memory | None:
    """None if `value` is no array. Others may lie in the same memory, but no change of them
    shows in this one: each has a place of its own here."""
    if not isinstance(value, jax.Array) or isinstance(value, Tracer):
        return None
    return "jax", id(value), id(value) + 1


def sample(value: Any, nbytes: int) -> tuple[str, bytes] | None:
    """Dtype and shape in words, and up to `nbytes` of the elements. None for numbers (one
    element), and for what has no memory any more. Of a large array on a device nothing is
    read: another object stands for another content."""
    if memory(value) is None or value.is_deleted() or not value.is_fully_addressable:
        return None
    if is_key(value):
        return f"random key {list(value.shape)}", np.asarray(jax.random.key_data(value)).tobytes()
    if value.size <= 1:
        return None
    text = words(value.dtype, value.shape)
    on_host = {device.platform for device in value.devices()} == {"cpu"}
    if value.nbytes > nbytes and not (on_host and len(value.devices()) == 1):
        return text, str(id(value)).encode()
    items = np.asarray(value).reshape(-1)
    if items.nbytes > nbytes:
        count = nbytes // _BLOCKS // items.itemsize
        last = items.size - count
        starts = [last * index // (_BLOCKS - 1) for index in range(_BLOCKS)]
        return text, b"".join(items[start : start + count].tobytes() for start in starts)
    return text, items.tobytes()


def find_untracked(scope: Mapping[str, Any], tracked: Mapping[str, Any]) -> list[str]:
    """Names in `scope` of optimizers of nnx that are not in `tracked`, and of modules where
    an optimizer is but no module."""
    if not any(is_module(value) for value in tracked.values()):
        return []
    known = {id(value) for value in tracked.values()}
    only_optimizers = not any(
        is_module(value) and not _is_optimizer(value) for value in tracked.values()
    )
    found: list[str] = []
    for name, value in scope.items():
        if id(value) in known or not is_module(value):
            continue
        if _is_optimizer(value) or (only_optimizers and isinstance(value, library().Module)):
            known.add(id(value))
            found.append(name)
    return found


def _is_node(value: Any) -> bool:
    kind = type(value)
    plain = isinstance(value, type | dict | list) or kind.__module__ in ("builtins", "numpy")
    if plain or isinstance(value, jax.Array) or is_namedtuple(kind):
        return False
    try:
        return parts_of(value) is not None
    except Exception:  # noqa: BLE001 -- of the program's own class, which this must not disturb
        return False


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, library().Optimizer)
