"""Means of numbers in the formats that tensors are stored in. Pure.

Sums are 64-bit floats, whatever the format: a number of 32 bits or fewer is exact there. The
sum of n numbers x is off by at most n * 2**-53 * sum(|x|), and the mean is rounded once, to
the nearest number of the format (ties to even), `bfloat16` too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, cast

import numpy as np

Format: TypeAlias = Literal["f8", "f4", "f2", "bf16"]
"""Of a stored number, little-endian. A complex one is two of them."""

ITEMSIZE: dict[Format, int] = {"f8": 8, "f4": 4, "f2": 2, "bf16": 2}
_NUMPY: dict[Format, str] = {"f8": "<f8", "f4": "<f4", "f2": "<f2"}

Doubles: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"


class Mean:
    """The mean of arrays of one length, which are added one after another."""

    def __init__(self, format: Format) -> None:
        self._format: Format = format
        self._sum: Doubles | None = None
        self._total = 0.0

    def add(self, data: memoryview, weight: float) -> None:
        """One more array, as its stored bytes."""
        values = widened(data, self._format)
        with np.errstate(over="ignore", invalid="ignore"):
            if weight != 1.0:
                values *= weight
            if self._sum is None:
                self._sum = values  # no term of a sum with 0.0: -0.0 stays what it is
            else:
                self._sum += values
        self._total += weight

    def write(self, into: memoryview) -> None:
        """Their mean, as stored bytes. At least one was added."""
        assert self._sum is not None
        narrowed(self._sum / self._total, self._format, into)


def widened(data: memoryview, format: Format) -> Doubles:
    """Stored numbers as 64-bit floats, in memory of its own.

    >>> widened(memoryview(bytes([0xC0, 0x3F])), "bf16")
    array([1.5])
    """
    if format == "bf16":
        upper = np.frombuffer(data, "<u2").astype(np.uint32) << np.uint32(16)
        return cast(Doubles, upper.view(np.float32).astype(np.float64))
    return cast(Doubles, np.frombuffer(data, _NUMPY[format]).astype(np.float64))


def narrowed(values: Doubles, format: Format, into: memoryview) -> None:
    """Round to the nearest numbers of the format, ties to even, and store them."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):  # infinity is the nearest
        if format == "bf16":
            np.frombuffer(into, "<u2")[:] = _bfloat16(values)
        else:
            np.frombuffer(into, _NUMPY[format])[:] = values


def _bfloat16(values: Doubles) -> np.ndarray[Any, np.dtype[np.uint16]]:
    # By way of 32 bits, and yet rounded once: there each number that is not exact is made odd
    # in its last bit (its neighbour towards zero, if that is even), which keeps it off every tie.
    single = values.astype(np.float32)
    bits = single.view(np.uint32).copy()
    back = single.astype(np.float64)
    bits -= (np.abs(back) > np.abs(values)).astype(np.uint32)
    bits |= (back != values).astype(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    nan = np.isnan(values)
    rounded[nan] = (bits[nan] >> np.uint32(16)) | np.uint32(0x40)
    return rounded.astype(np.uint16)


def check_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """One for each of `count` arrays. Raises ValueError saying what is wrong."""
    if weights is None:
        return [1.0] * count
    given = [float(weight) for weight in weights]
    if len(given) != count:
        raise ValueError(f"{len(given)} weights for {count} checkpoints")
    if not all(np.isfinite(weight) and weight >= 0 for weight in given) or not any(given):
        raise ValueError(f"weights must be numbers from 0 on, and not all 0: {given}")
    return given
