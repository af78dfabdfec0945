"""Simulated interruptions: `every="auto"` is about as good as the best fixed interval."""

from __future__ import annotations

import dataclasses
import itertools
from statistics import mean, pstdev

import pytest

from bench.cases.interruptions import SCENARIOS
from bench.interruptions import DAY_S, HOUR_S, World, expected, simulate
from holdfast.core.interval import optimum_s

FIXED = ("20s", "80s", "3min", "5min", "10min", "20min", "1h")


def small(key: str, days: float) -> World:
    return dataclasses.replace(SCENARIOS[key][1], days=days, step_s=20.0)


@pytest.mark.parametrize("key", SCENARIOS)
def test_auto_reaches_98_percent_of_the_best_fixed_interval(key: str) -> None:
    """Of the one that is the best for just these interruptions; with nothing given."""
    world = small(key, 8.0 if key != "rare" else 16.0)
    best = max(simulate(world, every, seed=3).goodput for every in FIXED)
    found = simulate(world, "auto", seed=3)
    assert found.goodput >= 0.98 * best
    assert found.lines[0].startswith("saving every ")


def test_auto_reaches_98_percent_of_the_analytic_optimum() -> None:
    world = small("spot", 15.0)
    best = expected(world, optimum_s(world.cost_s, world.mtbf_s))
    for mtbf_s in (None, world.mtbf_s):
        assert simulate(world, "auto", mtbf_s=mtbf_s).goodput >= 0.98 * best


def test_the_simulation_agrees_with_the_model() -> None:
    """And so can tell one interval from another: they differ by much more than it errs."""
    world = World(2 * HOUR_S, days=60.0, step_s=20.0)
    goodputs: list[float] = []
    for every, seconds in (("1min", 60.0), ("10min", 600.0), ("1h", 3600.0)):
        # An interval ends with a step: on average half a step late.
        model = expected(world, seconds + world.step_s / 2)
        goodputs.append(simulate(world, every, seed=1).goodput)
        assert goodputs[-1] == pytest.approx(model, rel=0.02)
    assert goodputs[0] > 1.02 * goodputs[1] > 1.2 * goodputs[2]


def test_the_same_seed_is_the_same_run() -> None:
    world = small("bursts", 2.0)
    assert simulate(world, "auto", seed=5) == simulate(world, "auto", seed=5)
    assert simulate(world, "auto", seed=5) != simulate(world, "auto", seed=6)


@pytest.mark.parametrize("arrivals", ["exponential", "weibull", "bursts"])
def test_interruptions_come_as_often_as_asked(arrivals: str) -> None:
    world = World(HOUR_S, arrivals)  # type: ignore[arg-type]
    times = list(itertools.takewhile(lambda s: s < 400 * DAY_S, world.interruptions(1)))
    assert times == sorted(times)
    assert 400 * 24 / len(times) == pytest.approx(1.0, rel=0.08)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    variation = pstdev(gaps) / mean(gaps)
    assert (variation > 1.2) == (arrivals != "exponential")
