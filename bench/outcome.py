"""The figures of one case, and what was aimed at."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path

import msgspec

CEILING = "machine: "
"""How the names of rows start that are no contenders, but what the machine can do."""


class Measure(msgspec.Struct, frozen=True):
    """A column. Less is better, but for rates."""

    key: str
    title: str
    unit: str = "s"
    """Behind each figure: "s", "MB", "%", …"""
    reference: bool = True
    """Whether each figure is also shown as a multiple of Holdfast's."""
    plotted: bool = True


class Goal(msgspec.Struct, frozen=True):
    """What was aimed at. `found` is None where it could not be measured."""

    text: str
    target: float
    found: float | None
    at_least: bool = True
    unit: str = "x"

    @property
    def met(self) -> bool:
        if self.found is None:
            return False
        return self.found >= self.target if self.at_least else self.found <= self.target


class Outcome(msgspec.Struct, kw_only=True):
    """What one case found: rows by contender, columns by measure, a figure per round."""

    case: str
    title: str
    state: str
    measures: list[Measure]
    figures: dict[str, dict[str, list[float]]] = {}
    goals: list[Goal] = []
    notes: list[str] = []
    command: str = ""
    date: str = ""
    machine: str = ""
    taken_s: float = 0.0

    def add(self, row: str, **figures: float) -> None:
        """Add one round's figures of a row."""
        for key, value in figures.items():
            self.figures.setdefault(row, {}).setdefault(key, []).append(value)

    def median(self, row: str, key: str) -> float | None:
        found = self.figures.get(row, {}).get(key)
        return statistics.median(found) if found else None

    def rounds(self) -> int:
        """Rounds of the cells with the most of them."""
        cells = (len(values) for row in self.figures.values() for values in row.values())
        return max(cells, default=0)

    def contenders(self) -> list[str]:
        return [row for row in self.figures if not row.startswith(CEILING)]

    def ratio(self, above: str, below: str, key: str) -> float | None:
        """The median of one row divided by that of another."""
        top, bottom = self.median(above, key), self.median(below, key)
        return None if top is None or bottom is None or bottom <= 0 else top / bottom

    def share(self, part: str, whole: str, key: str) -> float | None:
        """As `ratio`, in percent."""
        ratio = self.ratio(part, whole, key)
        return None if ratio is None else 100 * ratio

    def best_other(self, key: str, others: Iterable[str] | None = None) -> str | None:
        """The contender with the least median, Holdfast left out."""
        rows = [r for r in others or self.contenders() if r != "Holdfast"]
        found = {row: value for row in rows if (value := self.median(row, key)) is not None}
        return min(found, key=found.__getitem__) if found else None

    def aim(
        self,
        text: str,
        target: float,
        found: float | None,
        *,
        at_least: bool = True,
        unit: str = "x",
    ) -> None:
        self.goals.append(Goal(text, target, found, at_least, unit))


def load(path: Path) -> dict[str, Outcome]:
    """Outcomes by case, as `store` wrote them."""
    if not path.exists():
        return {}
    return msgspec.json.decode(path.read_bytes(), type=dict[str, Outcome])


def store(path: Path, outcomes: dict[str, Outcome]) -> None:
    """Write outcomes; figures are rounded to what they mean."""
    for outcome in outcomes.values():
        for row in outcome.figures.values():
            for key, values in row.items():
                row[key] = [float(f"{value:.4g}") for value in values]
    text = msgspec.json.format(msgspec.json.encode(outcomes), indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text + b"\n")
