"""Figures as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from bench.outcome import CEILING, Goal, Measure, Outcome

BEGIN = "<!-- figures: written by make bench, not by hand -->"
END = "<!-- end of figures -->"

OURS = "Holdfast"
_WIDEST = 8
"""Measures side by side, beyond which nobody can read the table."""


def table(outcome: Outcome) -> Iterator[str]:
    """The lines of one outcome: medians, each also as a multiple of Holdfast's. A line for each
    contender, or for each measure where these are many."""
    measures = outcome.measures
    rows = [*outcome.contenders(), *(row for row in outcome.figures if row.startswith(CEILING))]
    names = [f"*{row}*" if row.startswith(CEILING) else row for row in rows]
    lines = [
        ["", *(measure.title for measure in measures)],
        *(
            [name, *(_cell(outcome, row, measure) for measure in measures)]
            for name, row in zip(names, rows, strict=True)
        ),
    ]
    if len(measures) > _WIDEST:
        lines = [list(line) for line in zip(*lines, strict=True)]
    for number, line in enumerate(lines):
        yield "|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|"
        if number == 0:
            yield "|" + "---|" * len(line)


def goals(outcome: Outcome) -> Iterator[str]:
    """One line per goal: what was found, what was aimed at, by how much it was missed."""
    for goal in outcome.goals:
        yield f"- {_verdict(goal)}"


def section(outcome: Outcome, picture: str | None) -> str:
    """The part of the page that is about one case."""
    rounds = outcome.rounds()
    median = f"median of {rounds} rounds" if rounds > 1 else "one round"
    lines = [
        f"### {outcome.title}",
        "",
        f"{outcome.state[:1].upper()}{outcome.state[1:]}; {median}. {outcome.date}, "
        f"{outcome.machine}; `{outcome.command}`, {outcome.taken_s / 60:.1f} min.",
        "",
        *table(outcome),
        "",
    ]
    if picture is not None:
        lines += [f"![{outcome.title}]({picture})", ""]
    if outcome.goals:
        lines += [*goals(outcome), ""]
    for note in outcome.notes:
        lines += [note, ""]
    return "\n".join(lines)


def page(text: str, sections: Iterable[str]) -> str:
    """`text` with the figures between its two marks replaced."""
    before, found, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise ValueError(f"the page lacks the line {BEGIN} or {END}")
    return f"{before}{BEGIN}\n\n" + "\n".join(sections) + f"\n{END}{after}"


def write_page(path: Path, outcomes: Iterable[Outcome], pictures: dict[str, str]) -> None:
    """Put outcomes into the page at `path`. `pictures`: by case, relative to the page."""
    sections = [section(outcome, pictures.get(outcome.case)) for outcome in outcomes]
    path.write_text(page(path.read_text(), sections))


def _cell(outcome: Outcome, row: str, measure: Measure) -> str:
    value = outcome.median(row, measure.key)
    if value is None:
        return ""
    text = quantity(value, measure.unit)
    ours = outcome.median(OURS, measure.key)
    if not measure.reference or row == OURS or ours is None or ours <= 0:
        return text
    return f"{text} ({_factor(value / ours)})"


def _verdict(goal: Goal) -> str:
    bound = "at least" if goal.at_least else "at most"
    target = _amount(goal.target, goal.unit)
    if goal.found is None:
        return f"{goal.text}: not measured (aim: {bound} {target})"
    found = _amount(goal.found, goal.unit)
    by = _amount(abs(goal.found - goal.target), goal.unit)
    verdict = "met" if goal.met else f"**missed** by {by}"
    return f"{goal.text}: {found}, {verdict} (aim: {bound} {target})"


def quantity(value: float, unit: str) -> str:
    """A value with its unit, in about three digits.

    >>> quantity(0.01234, "s"), quantity(1024.4, "MB"), quantity(12.0, "%")
    ('12.3 ms', '1,024 MB', '12.0 %')
    """
    if unit == "s" and abs(value) < 0.1:
        value, unit = 1e3 * value, "ms"
    digits = 0 if abs(value) >= 100 or unit == "" else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f} {unit}".rstrip()


def _amount(value: float, unit: str) -> str:
    return _factor(value) if unit == "x" else quantity(value, unit)


def _factor(value: float) -> str:
    return f"{value:.1f}x" if value >= 10 else f"{value:.2f}x"
