"""The card's timeline: bars and lines over time, as plain SVG between texts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape

from holdfast.core.units import format_seconds, format_size

_MOST = 120
"""Points that are drawn: more are closer than a pixel or two on a narrow page."""
_METRICS = 4
_HEIGHT = 100
_WIDTH = 1000


@dataclass(frozen=True)
class Point:
    """One save, or several that lie beside each other."""

    time_s: float
    attempt: int
    nbytes: int
    new_bytes: int
    seconds: float | None
    metrics: Mapping[str, float]


def merged(points: Sequence[Point], most: int) -> list[Point]:
    """At most `most` of them: neighbours become one, with their largest sizes and durations and
    their last metrics.

    >>> point = Point(1.0, 0, 10, 5, None, {})
    >>> len(merged([point] * 1000, 120)) <= 120
    True
    """
    size = math.ceil(len(points) / most)
    if size <= 1:
        return list(points)
    return [_one(points[i : i + size]) for i in range(0, len(points), size)]


def _one(points: Sequence[Point]) -> Point:
    last = points[-1]
    seconds = [point.seconds for point in points if point.seconds is not None]
    return Point(
        last.time_s,
        last.attempt,
        max(point.nbytes for point in points),
        max(point.new_bytes for point in points),
        max(seconds, default=None),
        last.metrics,
    )


def timeline(points: Sequence[Point]) -> str:
    """What the saves wrote and took, and their metrics; "" for fewer than two."""
    points = merged(sorted(points, key=lambda point: point.time_s), _MOST)
    if len(points) < 2:
        return ""
    begin, end = points[0].time_s, points[-1].time_s
    # A margin, so that the first and the last bar are whole.
    at = [10 + (_WIDTH - 20) * (p.time_s - begin) / ((end - begin) or 1.0) for p in points]
    changes = _attempts(points, at)
    # What is new may be more than the state: packs have heads, and are aligned.
    largest = max(max(point.nbytes, point.new_bytes) for point in points)
    longest = max((point.seconds or 0.0 for point in points), default=0.0)
    tracks = [
        _track(
            "size, and what was new of it",
            f"up to {format_size(largest)}",
            _bars("old", at, [p.nbytes for p in points], largest)
            + _bars("new", at, [p.new_bytes for p in points], largest)
            + changes,
        )
    ]
    if longest:
        bars = _bars("new", at, [p.seconds or 0.0 for p in points], longest)
        tracks.append(_track("took", f"up to {format_seconds(longest)}", bars + changes))
    tracks += [_metric(name, points, at, changes) for name in _metrics(points)]
    return (
        "<section><h2>Timeline</h2>"
        + "".join(tracks)
        + f'<p class="ends"><span>{clock(begin)}</span><span>{clock(end)} UTC</span></p>'
        + "</section>"
    )


def _metrics(points: Sequence[Point]) -> list[str]:
    """The names that most points have, in the order of the first that has them."""
    counts = Counter(name for point in points for name in point.metrics)
    return [name for name, count in counts.most_common(_METRICS) if count > 1]


def _metric(name: str, points: Sequence[Point], at: Sequence[float], changes: str) -> str:
    line = [(x, p.metrics[name]) for x, p in zip(at, points, strict=True) if name in p.metrics]
    finite = [(x, value) for x, value in line if math.isfinite(value)]
    values = [value for _, value in finite] or [0.0]
    low, high = min(values), max(values)
    up = _height(low, high)
    path = "L".join(f"{x:.0f} {up(value):.0f}" for x, value in finite)
    drawn = f'<path class="metric" d="M{path}"/>' if path else ""
    text = f"{low:.4g} to {high:.4g}, last {line[-1][1]:.4g}"
    return _track(escape(name[:60]), text, drawn + changes)


def _height(low: float, high: float) -> Callable[[float], float]:
    # Halves: the difference of two large numbers may be no finite one.
    span = high / 2 - low / 2
    return lambda value: _HEIGHT - 8 - (84 * ((value / 2 - low / 2) / span) if span else 42)


def _bars(kind: str, at: Sequence[float], values: Sequence[float], largest: float) -> str:
    path = "".join(
        f"M{x:.0f} {_HEIGHT}V{_HEIGHT - 92 * value / largest:.0f}"
        for x, value in zip(at, values, strict=True)
        if value
    )
    return f'<path class="{kind}" d="{path}"/>' if path else ""


def _attempts(points: Sequence[Point], at: Sequence[float]) -> str:
    """A line where another attempt begins."""
    path = "".join(
        f"M{(at[i - 1] + at[i]) / 2:.0f} 0V{_HEIGHT}"
        for i in range(1, len(points))
        if points[i].attempt != points[i - 1].attempt
    )
    return f'<path class="attempt" d="{path}"/>' if path else ""


def _track(title: str, text: str, drawn: str) -> str:
    return (
        f'<div class="track"><p><span>{title}</span><span>{text}</span></p>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" aria-hidden="true">'
        f"{drawn}</svg></div>"
    )


def clock(time_s: float) -> str:
    """In UTC."""
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M:%S")
