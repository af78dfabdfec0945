"""Names of JAX dtypes in a checkpoint, and what their bytes are stored as."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from holdfast.core.plan import NAMED

DType: TypeAlias = "np.dtype[Any]"

# Those that safetensors cannot name are stored as U8 with the item size as last dimension: a byte
# for each number of less than eight bits, as on the host.
_UNNAMED = (
    *("complex128", "int2", "uint2", "int4", "uint4", "float4_e2m1fn"),
    *("float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz"),
)


def _dtype(name: str) -> DType | None:
    kind = getattr(ml_dtypes, name, None)
    if kind is None and hasattr(np, name):
        kind = name
    return None if kind is None else np.dtype(kind)


DTYPES: dict[str, DType] = {
    name: dtype for name in (*NAMED, *_UNNAMED) if (dtype := _dtype(name)) is not None
}
"""Every dtype that can be stored, by name."""

NAMES: dict[DType, str] = {dtype: name for name, dtype in DTYPES.items()}

STORED: dict[str, str] = {name: NAMED.get(name, "U8") for name in DTYPES}
"""The safetensors dtype of a leaf, by the dtype's name."""

WIDE = frozenset({"int64", "uint64", "float64", "complex128"})
"""What JAX makes narrower unless it is told not to."""


def has_own_dimension(name: str) -> bool:
    """Whether the bytes of an item are a dimension of the leaf."""
    return name not in NAMED


def bits(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A view of the items as numbers that NumPy knows, or as the leaf has them: every bit is
    kept, as those of a NaN."""
    name = NAMES[array.dtype]
    if has_own_dimension(name):
        return array[..., None].view(np.uint8)
    if array.dtype.kind == "V" or STORED[name].startswith("F8"):
        return array.view(f"u{array.dtype.itemsize}")
    return array


def words(dtype: object, shape: Sequence[int]) -> str:
    """How reports show an array.

    >>> words("bfloat16", (4096, 1024))
    'bfloat16[4096, 1024]'
    """
    return f"{dtype}[{', '.join(map(str, shape))}]"
