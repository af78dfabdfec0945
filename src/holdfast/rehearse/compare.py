"""What differs between a run that was left alone and one that was killed.

Pure functions of what the processes wrote down (`holdfast.run.rehearsal`) and of
comparisons of checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from holdfast.manager.comparison import Comparison
from holdfast.manager.comparison import Difference as Unequal
from holdfast.run.rehearsal import Completed, Dying, Entered, Line, Started

Kind = Literal["start", "variable", "random", "data", "metric", "state", "place"]


@dataclass(frozen=True)
class Difference:
    """One thing that is not what it was in the run that was left alone."""

    kind: Kind
    name: str
    step: int
    """Completed steps where it was first seen."""
    resumed: int | None
    """The step from which the process had gone on; None for a checkpoint's content."""
    what: str = ""
    """Kind of a variable's value: "number", "StepLR", "random generator of numpy"."""
    alone: str = ""
    killed: str = ""
    is_global: bool = False
    """Of a variable: whether it is one of a module, and not of a function."""
    by_framework: bool = False
    """Of a variable: whether it was looked at while a framework went through the loop."""
    rank: int = 0
    """Whose it is, of several that train together."""

    @property
    def key(self) -> tuple[str, str]:
        return self.kind, self.name


def compare(
    alone: Iterable[Line], killed: Iterable[Line], *, tolerance: float = 0.0
) -> list[Difference]:
    """The first appearance of each difference, by step; variables only where a process
    has just gone on, since what follows from them differs later, too.

    Steps that only one of the two has are a difference of their own ("place").
    """
    reference: dict[tuple[type, str, str, int], Any] = {
        (type(line), line.run, line.loop, line.step): line
        for line in alone
        if not isinstance(line, Started | Dying)
    }
    found: dict[tuple[str, str], Difference] = {}
    resumed: int | None = None
    fresh = False
    for line in killed:
        if isinstance(line, Dying):
            continue
        if isinstance(line, Started):
            resumed, fresh = line.resumed, True
            if resumed is None:
                _note(found, Difference("start", line.run, 0, None))
            continue
        other = reference.get((type(line), line.run, line.loop, line.step))
        if other is None:
            _note(found, Difference("place", line.loop, line.step, resumed))
            continue
        if isinstance(line, Completed):
            _compare_metrics(found, other, line, resumed, tolerance)
            continue
        if fresh:
            fresh = False
            _compare_variables(found, other, line, resumed)
        for name, state in line.random.items():
            if other.random.get(name, state) != state:
                _note(found, Difference("random", name, line.step, resumed))
        if other.item != line.item:
            _note(found, Difference("data", line.loop, line.step, resumed))
    return sorted(found.values(), key=lambda difference: difference.step)


def _note(found: dict[tuple[str, str], Difference], difference: Difference) -> None:
    known = found.get(difference.key)
    if known is None or difference.step < known.step:
        found[difference.key] = difference


def _compare_variables(
    found: dict[tuple[str, str], Difference],
    alone: Entered,
    killed: Entered,
    resumed: int | None,
) -> None:
    before = {path: (kind, text) for path, kind, text in alone.variables}
    for path, kind, text in killed.variables:
        # What is not there is set again before it is used, or Python says so.
        old_kind, old_text = before.get(path, (kind, text))
        if (old_kind, old_text) != (kind, text):
            difference = Difference(
                "variable",
                path,
                killed.step,
                resumed,
                what=kind,
                alone=old_text,
                killed=text,
                is_global=killed.is_global,
                by_framework=killed.by_framework,
            )
            _note(found, difference)


def _compare_metrics(
    found: dict[tuple[str, str], Difference],
    alone: Completed,
    killed: Completed,
    resumed: int | None,
    tolerance: float,
) -> None:
    for name in alone.metrics.keys() | killed.metrics.keys():
        before, now = alone.metrics.get(name, "(none)"), killed.metrics.get(name, "(none)")
        if before == now or _is_close(before, now, tolerance):
            continue
        _note(
            found,
            Difference("metric", name, killed.step, resumed, alone=before, killed=now),
        )


def _is_close(a: str, b: str, tolerance: float) -> bool:
    if not tolerance or "(none)" in (a, b):
        return False
    return abs(float(a) - float(b)) <= tolerance


def variable_of(path: str) -> str:
    """The variable that a path begins at.

    >>> variable_of("sampler.rng"), variable_of("history[2].loss"), variable_of("best")
    ('sampler', 'history', 'best')
    """
    ends = [end for mark in ".[" if (end := path.find(mark)) > 0]
    return path[: min(ends)] if ends else path


# -- checkpoints ---------------------------------------------------------------------


def differing(comparison: Comparison, tolerance: float = 0.0) -> list[str]:
    """Paths of what differs between two checkpoints: state, and the random states. For a
    tolerance the comparison must have the values."""
    return [
        one.path if one.section == "state" else f"random state of {one.path}"
        for one in comparison.differences
        if one.section in ("state", "random states") and not _is_near(one, tolerance)
    ]


def _is_near(one: Unequal, tolerance: float) -> bool:
    if not tolerance:
        return False
    if one.apart is not None:
        largest = one.apart.largest
        return one.apart.nan_in_one == 0 and largest is not None and largest <= tolerance
    if one.kind == "value" and one.a is not None and one.b is not None:
        numbers = one.a.node, one.b.node
        return all(isinstance(number, float) for number in numbers) and _is_close(
            str(numbers[0]), str(numbers[1]), tolerance
        )
    return False
