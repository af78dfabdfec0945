"""Means: rounded once, to the nearest number of the format."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from holdfast.core.averaging import Format, Mean, check_weights, narrowed, widened

# (bits, bits of the mantissa, format)
HALVES: dict[Format, tuple[int, int]] = {"f2": (5, 10), "bf16": (8, 7)}
TORCH: dict[Format, torch.dtype] = {
    "f8": torch.float64,
    "f4": torch.float32,
    "f2": torch.float16,
    "bf16": torch.bfloat16,
}


def mean(format: Format, arrays: list[bytes], weights: list[float] | None = None) -> bytes:
    found = Mean(format)
    for data, weight in zip(arrays, weights or [1.0] * len(arrays), strict=True):
        found.add(memoryview(data), weight)
    into = bytearray(len(arrays[0]))
    found.write(memoryview(into))
    return bytes(into)


def nearest(value: float, format: Format) -> int:
    """The bits of the nearest number of the format, ties to even: by exact arithmetic."""
    exponent_bits, mantissa = HALVES[format]
    sign = 1 << (exponent_bits + mantissa) if math.copysign(1, value) < 0 else 0
    bias = (1 << (exponent_bits - 1)) - 1
    infinity = ((1 << exponent_bits) - 1) << mantissa
    if math.isinf(value):
        return sign | infinity
    exact = abs(Fraction(value))
    lowest = 1 - bias - mantissa  # exponent of the last bit of the smallest numbers
    power = lowest
    if exact:
        exponent = math.frexp(float(exact))[1] - 1
        power = max(lowest, exponent - mantissa)
    whole, rest = divmod(exact, Fraction(2) ** power)
    units = int(whole)
    half = rest / Fraction(2) ** power
    if half > Fraction(1, 2) or (half == Fraction(1, 2) and units % 2):
        units += 1
    # `units` counts from 0 through all numbers of that exponent on.
    bits = units if power == lowest else ((power - lowest) << mantissa) + units
    return sign | min(bits, infinity)


def stored(value: float, format: Format) -> int:
    into = bytearray(2)
    narrowed(np.array([value]), format, memoryview(into))
    return int.from_bytes(into, "little")


@pytest.mark.parametrize("format", HALVES)
@given(value=st.floats(allow_nan=False) | st.floats(-70000, 70000) | st.floats(-1e-6, 1e-6))
@example(value=1.00390625 + 2**-40)  # by way of 32 bits it would be a tie
@example(value=1.00390625 - 2**-40)
@example(value=1.00048828125 + 2**-40)
@example(value=65520.0)
@example(value=3.3961775292304957e38)
@example(value=2.0**-134)
@example(value=-0.0)
def test_rounded_once_to_the_nearest(format: Format, value: float) -> None:
    assert stored(value, format) == nearest(value, format)


def test_every_bfloat16_its_neighbours_and_the_ties_between_them() -> None:
    numbers = (np.arange(0x7F80, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
    ties = (numbers[:-1] + numbers[1:]) / 2
    index = np.arange(len(ties))
    cases = [
        (numbers, np.arange(len(numbers))),
        (ties, index + index % 2),
        (np.nextafter(ties, 0), index),
        (np.nextafter(ties, np.inf), index + 1),
    ]
    for values, bits in cases:
        for sign in (0, 0x8000):
            into = bytearray(2 * len(values))
            narrowed(-values if sign else values, "bf16", memoryview(into))
            assert np.array_equal(np.frombuffer(into, "<u2"), bits | sign)


@pytest.mark.parametrize("format", TORCH)
def test_what_torch_computes(format: Format) -> None:
    """Its own conversion to 16 bits goes by way of 32 bits; on these numbers that is the same."""
    generator = torch.Generator().manual_seed(3)
    tensors = [
        torch.randn(1000, dtype=torch.float64, generator=generator).to(TORCH[format])
        for _ in range(5)
    ]
    total = tensors[0].double()
    for tensor in tensors[1:]:
        total = total + tensor.double()
    wanted = (total / 5).to(TORCH[format])
    assert mean(format, [data(tensor) for tensor in tensors]) == data(wanted)
    weights = [1.0, 2.0, 0.5, 0.0, 3.0]
    total = tensors[0].double()
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total = total + weight * tensor.double()
    wanted = (total / 6.5).to(TORCH[format])
    assert mean(format, [data(tensor) for tensor in tensors], weights) == data(wanted)


def data(tensor: torch.Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("format", TORCH)
def test_special_values(format: Format) -> None:
    values = torch.tensor([0.0, -0.0, 1.0, math.inf, -math.inf, math.nan], dtype=TORCH[format])
    one = data(values)
    same = widened(memoryview(mean(format, [one, one, one])), format)
    assert np.array_equal(same, values.double().numpy(), equal_nan=True)
    assert np.signbit(same[1])
    mixed = widened(memoryview(mean(format, [one, data(-values)])), format)
    assert np.isnan(mixed[3:]).all()
    assert not mixed[:3].any()


@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=2, max_size=6))
def test_a_mean_of_floats_is_the_nearest_float(values: list[float]) -> None:
    """The sum of 64-bit floats is off by far less than half a unit, but for cancellation."""
    found = mean("f4", [np.array([value], "<f4").tobytes() for value in values])
    exact = sum(map(Fraction, values)) / len(values)
    bound = len(values) * 2.0**-53 * sum(map(abs, values)) + abs(float(exact)) * 2.0**-24 + 2**-149
    assert abs(np.frombuffer(found, "<f4")[0] - float(exact)) <= bound


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([1.0], "1 weights for 2"),
        ([1.0, -1.0], "from 0 on"),
        ([0.0, 0.0], "not all 0"),
        ([1.0, math.nan], "from 0 on"),
        ([1.0, math.inf], "from 0 on"),
    ],
)
def test_weights_that_are_none(weights: list[float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_weights(weights, 2)


def test_weights() -> None:
    assert check_weights(None, 2) == [1.0, 1.0]
    given: list[Any] = [1, 0.5]
    assert check_weights(given, 2) == [1.0, 0.5]
