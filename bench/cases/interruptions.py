"""Months of interruptions: `every="auto"` beside fixed intervals. In virtual time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from bench import plots
from bench.cases.common import Options
from bench.interruptions import HOUR_S, World, expected, simulate
from bench.outcome import Measure, Outcome
from bench.report import OURS
from holdfast.core.interval import optimum_s
from holdfast.core.units import format_interval, parse_duration

GIVEN = f"{OURS}, mtbf given"
FORMULA = "the formula's, all known"
BEST = "best fixed, in hindsight"
_FIXED = ("10s", "20s", "40s", "80s", "2min", "3min", "5min", "10min", "20min", "40min", "1h", "2h")
_GOAL = 98.0  # percent of the best that any fixed interval has reached over the same interruptions

SCENARIOS = {
    "spot": ("every 2 h", World(2 * HOUR_S)),
    "rare": ("once a day", World(24 * HOUR_S)),
    "weibull": ("every 2 h, Weibull", World(2 * HOUR_S, "weibull")),
    "bursts": ("every 2 h, in bursts", World(2 * HOUR_S, "bursts")),
    "dear": (
        "every hour, dear saves",
        World(HOUR_S, stall_s=2.0, slower_s=1.0, takes_s=60.0, restart_s=300.0),
    ),
    "blocking": (
        "every 6 h, saves block",
        World(6 * HOUR_S, stall_s=20.0, slower_s=0.0, takes_s=20.0),
    ),
    "changes": ("every 2 h, 10 x dearer half-way", World(2 * HOUR_S, dearer=10.0)),
}


def interruptions(options: Options) -> Outcome:
    """Goodput of each way to save, over `options.rounds` different months."""
    days = 0.25 if options.quick else 30.0
    outcome = Outcome(
        case="interruptions",
        title="Months of interruptions",
        state=f"simulated, {days:g} days a round: the share of the time that was training",
        measures=[
            Measure(key, title, "%", reference=False) for key, (title, _) in SCENARIOS.items()
        ],
    )
    shares: dict[str, list[float]] = {}
    for key, (_, usual) in SCENARIOS.items():
        world = dataclasses.replace(usual, days=days)
        best_s = optimum_s(world.cost_s, world.mtbf_s)
        for seed in range(options.rounds):
            auto = simulate(world, "auto", seed=seed)
            outcome.add(OURS, **{key: 100 * auto.goodput, f"{key}_s": auto.interval_s})
            given = simulate(world, "auto", mtbf_s=world.mtbf_s, seed=seed)
            outcome.add(GIVEN, **{key: 100 * given.goodput, f"{key}_s": given.interval_s})
            found = [simulate(world, f"{best_s:.1f}s", seed=seed).goodput]
            outcome.add(FORMULA, **{key: 100 * found[0]})
            for every in _FIXED:
                found.append(simulate(world, every, seed=seed).goodput)
                outcome.add(f"every={every}", **{key: 100 * found[-1]})
            outcome.add(BEST, **{key: 100 * max(found)})
            shares.setdefault(key, []).append(100 * auto.goodput / max(found))
    for key, (title, _) in SCENARIOS.items():
        outcome.aim(
            f"{title}: share of the best fixed interval's goodput, in the worst round",
            _GOAL,
            min(shares[key]),
            unit="%",
        )
    outcome.notes = [_note(outcome)]
    return outcome


def _note(outcome: Outcome) -> str:
    """What was chosen."""
    chosen: list[str] = []
    for key, (title, world) in SCENARIOS.items():
        best_s = optimum_s(world.cost_s, world.mtbf_s)
        auto_s = outcome.median(OURS, f"{key}_s") or 0.0
        chosen.append(f"{title}: {format_interval(auto_s)} ({format_interval(best_s)})")
    return (
        "What `auto` saved at in the end, and in brackets the formula's interval for what a save "
        f"costs in the first half: {'; '.join(chosen)}. The budget was 1 %. Every way to save "
        "meets the same interruptions, and none of them is announced."
    )


def draw(outcome: Outcome, path: Path) -> None:
    """Goodput over the fixed interval, a panel per scenario; across it what `auto` reached."""
    pyplot: Any = plots.pyplot()
    figure, axes = pyplot.subplots(4, 2, figsize=(7.4, 9.2), layout="constrained")
    flat = list(axes.flat)
    for axis, (key, (title, usual)) in zip(flat, SCENARIOS.items(), strict=False):
        _panel(axis, outcome, key, usual)
        axis.set_title(title, loc="left", fontsize=9)
    last = flat[-1]
    last.axis("off")
    handles, labels = flat[0].get_legend_handles_labels()
    last.legend(handles, labels, loc="center left", frameon=False)
    figure.supylabel("share of the time that was training, %", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)


def _panel(axis: Any, outcome: Outcome, key: str, usual: World) -> None:
    xs = [parse_duration(every) for every in _FIXED]
    rounds = [outcome.figures[f"every={every}"][key] for every in _FIXED]
    medians = [outcome.median(f"every={every}", key) or 0.0 for every in _FIXED]
    axis.fill_between(
        xs,
        [min(found) for found in rounds],
        [max(found) for found in rounds],
        color=plots.OTHER,
        alpha=0.25,
        linewidth=0,
    )
    axis.plot(xs, medians, color=plots.OTHER, marker="o", markersize=3, label="fixed intervals")
    if usual.arrivals == "exponential" and usual.dearer == 1:
        axis.plot(
            xs,
            [100 * expected(usual, x) for x in xs],
            color="#333",
            linewidth=0.8,
            linestyle=":",
            label="Daly's model",
        )
    goodput = outcome.median(OURS, key) or 0.0
    axis.axhline(goodput, color=plots.OURS_COLOR, linewidth=0.8, linestyle="--")
    axis.plot(
        [outcome.median(OURS, f"{key}_s") or 0.0],
        [goodput],
        color=plots.OURS_COLOR,
        marker="D",
        markersize=6,
        linestyle="",
        label='every="auto", nothing given',
    )
    axis.set_xscale("log")
    ticks = ("10s", "1min", "5min", "20min", "2h")
    axis.set_xticks([parse_duration(tick) for tick in ticks], ticks, fontsize=8)
    axis.minorticks_off()
    top = max(max(found) for found in rounds)
    axis.set_ylim(max(0.0, top - 14), top + 1)
    axis.spines[["top", "right"]].set_visible(False)
