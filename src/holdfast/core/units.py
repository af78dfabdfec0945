"""Durations and sizes: as people write them, and as we show them.

What is written is read exactly (`2h`, `200GB`); what is shown for reading is rounded
(`3 min`, `1.2 GB`). Decimal units everywhere, so that `size=200GB` and the sizes in
tables are the same gigabytes; `GiB` is understood too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

_SECONDS = {
    "s": 1,
    "sec": 1,
    "min": 60,
    "h": 3600,
    "hour": 3600,
    "hours": 3600,
    "d": 86400,
    "day": 86400,
    "days": 86400,
    "w": 604800,
    "week": 604800,
    "weeks": 604800,
}
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)([a-z]+)")
DURATION_UNITS = "s, min, h, d, w"
# repr() of a smaller number may be 1e-07, which `parse_duration` does not read.
_SHORTEST_S = 0.001
# A century: longer is a typing error, and keeps every sum of times finite.
_LONGEST_S = 100 * 366 * 86400

_BYTES = {"b": 1} | {
    f"{prefix}{middle}b": base ** (power + 1)
    for power, prefix in enumerate("kmgtp")
    for middle, base in (("", 1000), ("i", 1024))
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([a-z]+)")
SIZE_UNITS = "KB, MB, GB, TB (powers of 1000), KiB, MiB, GiB, TiB (powers of 1024)"


def parse_duration(text: str) -> float:
    """Seconds in `text`: "90s", "10min", "1.5h", "1h30min", "2d", "1w".

    Raises ValueError, whose message says what is wrong, if it is no positive
    duration. "m" is refused: it is a minute to some and a month to others.

    >>> parse_duration("1h30min")
    5400.0
    """
    lower = text.lower()
    parts = _DURATION_PART.findall(lower)
    if not parts or "".join(number + unit for number, unit in parts) != lower:
        raise ValueError(f"{text!r} is not a duration (a number and one of {DURATION_UNITS})")
    seconds = 0.0
    for number, unit in parts:
        if unit == "m":
            raise ValueError(f"{text!r}: write 'min' for minutes")
        if unit not in _SECONDS:
            raise ValueError(f"{text!r}: unknown unit {unit!r} (known: {DURATION_UNITS})")
        seconds += float(number) * _SECONDS[unit]
    if not _SHORTEST_S <= seconds <= _LONGEST_S:
        raise ValueError(f"{text!r} is not between a millisecond and 100 years")
    return seconds


def exact_duration(seconds: float) -> str:
    """The shortest word that `parse_duration` reads back as exactly `seconds`.

    >>> exact_duration(5400.0), exact_duration(0.5)
    ('90min', '0.5s')
    """
    for unit, factor in (("w", 604800), ("d", 86400), ("h", 3600), ("min", 60)):
        if seconds % factor == 0:
            return f"{int(seconds) // factor}{unit}"
    if seconds == int(seconds):
        return f"{int(seconds)}s"
    return f"{seconds!r}s"


def parse_size(text: str) -> int:
    """Bytes in `text`: "200GB", "1.5TB", "512MiB".

    Raises ValueError, whose message says what is wrong.

    >>> parse_size("1.5KB"), parse_size("1KiB")
    (1500, 1024)
    """
    match = _SIZE.fullmatch(text.lower())
    if match is None:
        raise ValueError(f"{text!r} is not a size (a number and one of {SIZE_UNITS})")
    number, unit = match.groups()
    if unit not in _BYTES:
        raise ValueError(f"{text!r}: unknown unit {unit!r} (known: {SIZE_UNITS})")
    whole, _, fraction = number.partition(".")
    # Integers only: a float would lose bytes of large sizes.
    scaled = int(whole + fraction) * _BYTES[unit]
    nbytes = scaled // 10 ** len(fraction)
    if not 0 < nbytes < 2**63:
        raise ValueError(f"{text!r} is not between 1 byte and 8 EiB")
    return nbytes


def parse_rate(text: str) -> int:
    """Bytes per second in `text`: "100MB/s"; "100MB" means the same. Raises ValueError.

    >>> parse_rate("1.5KB/s")
    1500
    """
    return parse_size(text.lower().removesuffix("/s"))


def exact_size(nbytes: int) -> str:
    """The shortest word that `parse_size` reads back as exactly `nbytes`.

    >>> exact_size(200 * 1000**3), exact_size(1024), exact_size(7)
    ('200GB', '1KiB', '7B')
    """
    for power in range(5, 0, -1):
        letter = "KMGTP"[power - 1]
        for base, suffix in ((1000, "B"), (1024, "iB")):
            if nbytes % base**power == 0:
                return f"{nbytes // base**power}{letter}{suffix}"
    return f"{nbytes}B"


def format_size(nbytes: int) -> str:
    """About `nbytes`, in at most 8 columns, for reading.

    >>> [format_size(n) for n in (0, 999, 1000, 1_234_567, 999_999_999)]
    ['0 B', '999 B', '1.00 KB', '1.23 MB', '1.00 GB']
    """
    if nbytes < 1000:
        return f"{nbytes} B"
    value = float(nbytes)
    for unit in ("KB", "MB", "GB", "TB", "PB", "EB"):
        value /= 1000
        # Decide on what is printed: 999.9 KB would print as 1000 KB.
        for limit, digits in ((9.995, 2), (99.95, 1), (999.5, 0)):
            if value < limit:
                return f"{value:.{digits}f} {unit}"
    return f"{value:.0f} EB"


def format_duration(seconds: float) -> str:
    """About `seconds`, in its largest unit, for reading.

    >>> [format_duration(s) for s in (0.2, 59.6, 185, 7200, 200_000)]
    ['0 s', '1 min', '3 min', '2 h', '2 days']
    """
    if not math.isfinite(seconds):
        return "?"
    seconds = max(seconds, 0.0)
    for limit, factor, unit in ((59.5, 1, "s"), (3570, 60, "min"), (129600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / factor:.0f} {unit}"
    days = round(seconds / 86400)
    return "1 day" if days == 1 else f"{days:,} days"


def format_interval(seconds: float) -> str:
    """About `seconds`, in its two largest units, for reading.

    >>> [format_interval(s) for s in (9.6, 250, 3600, 3700, 90_000, 1e7)]
    ['10 s', '4 min 10 s', '1 h', '1 h 2 min', '25 h', '116 days']
    """
    whole = round(seconds)
    if not 60 <= whole < 86400:
        return format_duration(seconds)
    if whole < 3600:
        first, second = f"{whole // 60} min", (whole % 60, "s")
    else:
        minutes = round(seconds / 60)
        first, second = f"{minutes // 60} h", (minutes % 60, "min")
    return f"{first} {second[0]} {second[1]}" if second[0] else first


def format_seconds(seconds: float) -> str:
    """About `seconds`, to three digits below a minute, in at most 7 columns, for reading.

    >>> [format_seconds(s) for s in (0, 0.00123, 0.9994, 0.9996, 59.94, 59.96)]
    ['0 s', '1.23 ms', '999 ms', '1.00 s', '59.9 s', '1 min']
    """
    if not 0 < seconds < 59.95:
        return format_duration(seconds)
    value, unit = (seconds * 1000, "ms") if seconds < 0.9995 else (seconds, "s")
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {unit}"


def format_ago(seconds: float) -> str:
    """How long ago, for reading; clocks of two machines may differ a little.

    >>> format_ago(0.4), format_ago(185), format_ago(-3600)
    ('now', '3 min ago', 'in 1 h')
    """
    if abs(seconds) < 1:
        return "now"
    # Another machine's clock may be ahead by this much without meaning anything.
    if -60 < seconds < 0:
        return "now"
    return f"in {format_duration(-seconds)}" if seconds < 0 else f"{format_duration(seconds)} ago"


def format_list(items: Sequence[str], most: int = 3) -> str:
    """Lines to put below a heading: of many the first, and how many more there are.

    >>> print("damaged:" + format_list(["a", "b", "c"], most=2))
    damaged:
      a
      b
      and 1 more
    """
    rest = [f"and {len(items) - most} more"] if len(items) > most else []
    return "".join(f"\n  {line}" for line in [*items[:most], *rest])
