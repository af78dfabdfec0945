"""Figures as SVG: one picture per case, one panel per measure."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from bench.outcome import CEILING, Outcome
from bench.report import OURS, quantity

OURS_COLOR, OTHER, _MACHINE = "#0b7a75", "#9aa5b1", "#e0c36b"


def can_plot() -> bool:
    """Whether Matplotlib is installed; it is in the `bench` extra only."""
    return importlib.util.find_spec("matplotlib") is not None


def pyplot() -> Any:
    """Matplotlib's, set up so that the same figures give the same bytes."""
    # By name: a type checker must not need what only plots use.
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "holdfast", "svg.fonttype": "none", "font.size": 9})
    return importlib.import_module("matplotlib.pyplot")


def draw(outcome: Outcome, path: Path) -> None:
    """Draw medians as bars, the range of the rounds as whiskers. Same figures, same bytes."""
    plot = pyplot()
    measures = [m for m in outcome.measures if m.plotted and _rows(outcome, m.key)]
    heights = [len(_rows(outcome, m.key)) for m in measures]
    figure, axes = plot.subplots(
        len(measures),
        1,
        squeeze=False,
        figsize=(7, 0.3 * sum(heights) + 0.55 * len(measures)),
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
    )
    for measure, axis in zip(measures, axes[:, 0], strict=True):
        rows = _rows(outcome, measure.key)
        for place, row in enumerate(rows):
            values = outcome.figures[row][measure.key]
            median = outcome.median(row, measure.key) or 0.0
            color = _MACHINE if row.startswith(CEILING) else OURS_COLOR if row == OURS else OTHER
            axis.barh(place, median, color=color, height=0.7)
            axis.plot([min(values), max(values)], [place, place], color="#333", linewidth=0.8)
            text = f" {quantity(median, measure.unit)}"
            axis.text(max(median, *values), place, text, va="center", fontsize=8)
        axis.set_yticks(range(len(rows)), rows)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_title(measure.title, loc="left", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    plot.close(figure)


def _rows(outcome: Outcome, key: str) -> list[str]:
    found = [row for row in outcome.figures if key in outcome.figures[row]]
    return sorted(found, key=lambda row: row.startswith(CEILING))
