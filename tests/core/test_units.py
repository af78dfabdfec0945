"""Durations and sizes are read exactly and shown briefly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.units import (
    exact_duration,
    exact_size,
    format_ago,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("10min", 600),
        ("2h", 7200),
        ("1d", 86400),
        ("1w", 604800),
        ("1.5h", 5400),
        ("1h30min", 5400),
        ("2days", 172800),
        ("10MIN", 600),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", "5", "s", "10m", "1 h", "-1h", "0s", "1e3s", "nans", "9999999d", "h1", "1h,", "0.0001s"],
)
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1B", 1),
        ("200GB", 200_000_000_000),
        ("1.5TB", 1_500_000_000_000),
        ("1KiB", 1024),
        ("512MiB", 512 * 1024**2),
        ("8pb", 8 * 10**15),
        # A float would lose the last bytes of this one.
        ("9007.199254740993PB", 9007199254740993000),
    ],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "200", "200G", "GB", "-1GB", "0GB", "1 GB", "1e3GB", "10EB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_size(text)


@given(st.integers(1, 2**62))
def test_exact_sizes_read_back(nbytes: int) -> None:
    assert parse_size(exact_size(nbytes)) == nbytes


@given(st.integers(1, 10**9).map(float) | st.floats(0.001, 3e9))
def test_exact_durations_read_back(seconds: float) -> None:
    assert parse_duration(exact_duration(seconds)) == seconds


@given(st.integers(0, 2**63))
def test_shown_sizes_are_short_and_close(nbytes: int) -> None:
    text = format_size(nbytes)
    number, unit = text.split()
    assert len(text) <= 8
    factor = 1000 ** ["B", "KB", "MB", "GB", "TB", "PB", "EB"].index(unit)
    assert abs(float(number) * factor - nbytes) <= 0.006 * nbytes


@given(st.floats(0, 1e12))
def test_shown_durations_are_close(seconds: float) -> None:
    number, unit = format_duration(seconds).split()
    factor = {"s": 1, "min": 60, "h": 3600, "day": 86400, "days": 86400}[unit]
    # Half of the unit's last digit, and what is left to the next larger unit.
    assert abs(float(number.replace(",", "")) * factor - seconds) <= 0.51 * factor


def test_ago() -> None:
    assert format_ago(0) == "now"
    assert format_ago(-30) == "now"
    assert format_ago(45) == "45 s ago"
    assert format_ago(-7200) == "in 2 h"
    assert format_ago(float("nan")) == "? ago"
