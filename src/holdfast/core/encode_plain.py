"""Values that hold no others, to nodes: what the encoder calls by type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from holdfast.core import values
from holdfast.core.arrays import ArraySource
from holdfast.core.types import Node
from holdfast.errors import UnsupportedValue


def _itself(encoder: object, value: Node, path: str) -> Node:
    return value


def _int(encoder: object, value: int, path: str) -> Node:
    if value.bit_length() > values.MAX_INT_BITS:
        raise UnsupportedValue(path, f"int of {value.bit_length()} bits", hint="Save it as bytes.")
    return values.encode_int(value)


def _float(encoder: object, value: float, path: str) -> Node:
    return values.encode_float(value)


def _complex(encoder: object, value: complex, path: str) -> Node:
    return values.encode_complex(value)


def _path(encoder: object, value: Any, path: str) -> Node:
    return values.encode_path(value)


def _ellipsis(encoder: object, value: object, path: str) -> Node:
    return {"!": "ellipsis"}


def _range(encoder: object, value: range, path: str) -> Node:
    bounds = (value.start, value.stop, value.step)
    return {"!": "range", "v": [values.encode_int(number) for number in bounds]}


def _time(encoder: object, value: Any, path: str) -> Node:
    return values.encode_time(value, path)


def numbers_source(items: list[Any]) -> ArraySource | None:
    """A leaf of the list's numbers; None unless all are float, or all 64-bit int."""
    kinds = set(map(type, items))
    try:
        if kinds == {float}:
            return ArraySource(np.array(items, np.float64))
        if kinds == {int}:
            return ArraySource(np.array(items, np.int64))
    except OverflowError:
        pass
    return None


PLAIN: dict[type, Callable[[object, Any, str], Node]] = {
    type(None): _itself,
    bool: _itself,
    int: _int,
    float: _float,
    complex: _complex,
    range: _range,
    type(Ellipsis): _ellipsis,
    **dict.fromkeys(values.PATH_TYPES, _path),
    **dict.fromkeys(values.TIME_TYPES, _time),
}
"""Exact type -> (encoder, value, path) -> node."""
