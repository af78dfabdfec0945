"""Names of torch dtypes in a checkpoint, and what their bytes are stored as."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from holdfast.core.plan import NAMED

# Those that safetensors cannot name are stored as U8 with the item size as last dimension.
_UNNAMED = (
    "complex32",
    "complex128",
    "float4_e2m1fn_x2",
    *("bits1x8", "bits2x4", "bits4x2", "bits8", "bits16"),
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)),
)

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in (*NAMED, *_UNNAMED) if hasattr(torch, name)
}
"""Every dtype that can be stored, by name. Quantized ones cannot."""

STORED: dict[torch.dtype, str] = {
    DTYPES[name]: stored for name, stored in NAMED.items() if name in DTYPES
}
"""The dtypes that safetensors can name."""

NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

# Bits are moved as numbers of the same size: some dtypes (int4, float4) have no copy
# kernel, and integers keep the payload of every NaN.
_CARRIERS = {
    1: torch.uint8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
    16: torch.complex128,
}


def name_of(dtype: torch.dtype | torch.layout | torch.memory_format) -> str:
    """
    >>> name_of(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def words(dtype: torch.dtype, shape: Sequence[int]) -> str:
    """How reports show a tensor.

    >>> words(torch.bfloat16, (4096, 1024))
    'bfloat16[4096, 1024]'
    """
    return f"{name_of(dtype)}[{', '.join(map(str, shape))}]"


def describe(tensor: torch.Tensor) -> str:
    """`words` of a live tensor, with what is unusual about it."""
    text = words(tensor.dtype, tensor.shape)
    if tensor.layout is not torch.strided:
        text = f"{name_of(tensor.layout)} {text}"
    return f"{text} on the meta device" if tensor.is_meta else text


def carrier(itemsize: int) -> torch.dtype:
    """A dtype of `itemsize` bytes whose copies keep every bit."""
    return _CARRIERS[itemsize]
