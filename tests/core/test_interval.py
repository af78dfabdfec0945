"""`every="auto"`: the interval between two saves."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.interval import (
    FIRST_S,
    LONGEST_S,
    SHORTEST_S,
    AutoInterval,
    Failures,
    choose,
    middle,
    optimum_s,
    parse_mtbf,
    parse_overhead,
)
from holdfast.errors import BadPolicy

costs = st.floats(0, 1e6)
rates = st.floats(1, 1e9)
anything = st.floats(allow_nan=True, allow_infinity=True)
budgets = st.floats(1e-5, 0.5)


def lost(interval_s: float, cost_s: float, mtbf_s: float) -> float:
    """Expected seconds per second of training, exactly, for failures of a Poisson process."""
    return mtbf_s * math.expm1((interval_s + cost_s) / mtbf_s) / interval_s


@given(st.floats(0.01, 1000), st.floats(10, 1e7))
def test_the_optimum_is_one(cost_s: float, mtbf_s: float) -> None:
    """Against the exact loss, of which the formula is an approximation."""
    if cost_s > mtbf_s:
        return
    found = optimum_s(cost_s, mtbf_s)
    least = min(lost(found * factor / 32, cost_s, mtbf_s) for factor in range(8, 129))
    assert lost(found, cost_s, mtbf_s) <= 1.002 * least  # Daly: at most 0.2 % more


@given(costs, costs, rates, rates)
def test_dearer_saves_are_rarer_and_failures_make_them_more_frequent(
    cost_s: float, other_cost_s: float, mtbf_s: float, other_mtbf_s: float
) -> None:
    cost_s, dearer_s = sorted((cost_s, other_cost_s))
    mtbf_s, safer_s = sorted((mtbf_s, other_mtbf_s))
    slack = 1 - 1e-12  # of the arithmetic
    assert optimum_s(cost_s, mtbf_s) * slack <= optimum_s(dearer_s, mtbf_s)
    assert optimum_s(cost_s, mtbf_s) * slack <= optimum_s(cost_s, safer_s)
    chosen = choose(cost_s, 1.0, mtbf_s, 0.01).seconds * slack
    assert chosen <= choose(dearer_s, 1.0, mtbf_s, 0.01).seconds
    assert chosen <= choose(cost_s, 1.0, safer_s, 0.01).seconds


@given(costs, costs, rates, budgets)
def test_bounds(cost_s: float, takes_s: float, mtbf_s: float, budget: float) -> None:
    choice = choose(cost_s, takes_s, mtbf_s, budget)
    assert cost_s <= budget * (cost_s + choice.seconds) * (1 + 1e-9)
    assert choice.seconds >= max(SHORTEST_S, takes_s)
    if choice.bound not in ("budget", "save"):
        assert choice.seconds <= LONGEST_S
    assert (choice.bound == "") == (choice.seconds == choice.optimum_s)


@given(anything, anything, anything, anything)
def test_whatever_is_given_the_interval_is_a_time(
    cost_s: float, takes_s: float, mtbf_s: float, budget: float
) -> None:
    assert SHORTEST_S <= choose(cost_s, takes_s, mtbf_s, budget).seconds < math.inf
    auto = AutoInterval(None)
    auto.learn(Failures(-1, mtbf_s), [(cost_s, takes_s)])
    auto.spent(takes_s, cost_s, budget)
    assert SHORTEST_S <= auto.seconds < math.inf


def test_failures_are_learned_from_a_prior_of_one_a_day() -> None:
    assert Failures().mtbf_s == 86400
    quiet = [Failures(0, days * 86400.0).mtbf_s for days in range(5)]
    assert quiet == sorted(quiet)
    # What was seen counts for more and more.
    assert Failures(100, 100 * 3600.0).mtbf_s == pytest.approx(3600, rel=0.15)
    assert Failures(1000, 1000 * 3600.0).mtbf_s == pytest.approx(3600, rel=0.02)


def test_the_first_save_comes_soon_and_tells_what_one_costs() -> None:
    auto = AutoInterval(6 * 3600)
    assert auto.seconds == FIRST_S
    line = auto.spent(0.2, 2.0, 30.0)
    assert line == (
        "saving every 1 min 33 s (a save costs 200 ms, one failure in 6 h as given; budget 1 %)"
    )
    assert auto.seconds == pytest.approx(92.8, abs=0.1)


def test_a_first_save_that_costs_more_than_the_others_is_forgotten_at_the_second() -> None:
    auto = AutoInterval(6 * 3600)
    auto.spent(20.0, 20.0, 30.0)
    assert auto.seconds == pytest.approx(20 * 99)
    assert auto.spent(0.2, 2.0, 2000.0) == ""
    assert auto.seconds == pytest.approx(92.8, abs=0.1)
    # A line is said when it has stayed so.
    lines = [auto.spent(0.2, 2.0, 2000.0) for _ in range(10)]
    assert [number for number, line in enumerate(lines) if line] == [3]
    assert "saving every 1 min 33 s" in lines[3]


def test_small_changes_are_not_followed_and_one_odd_save_is_none() -> None:
    auto = AutoInterval(6 * 3600)
    auto.spent(0.2, 2.0, 30.0)
    before = auto.seconds
    for cost_s in (0.21, 0.19, 5.0, 0.2, 0.22, 0.2, 4.0, 0.18):
        assert auto.spent(cost_s, 2.0, 100.0) == ""
        assert auto.seconds == before


def test_a_cost_that_has_changed_is_followed_and_said_once() -> None:
    auto = AutoInterval(6 * 3600)
    for _ in range(10):
        auto.spent(0.2, 2.0, 30.0)
    lines = [auto.spent(1.0, 2.0, 100.0) for _ in range(10)]
    assert [bool(line) for line in lines].count(True) == 1
    assert auto.seconds == choose(1.0, 2.0, 6 * 3600, 0.01).seconds
    assert "a save costs 1.00 s" in "".join(lines)


@given(st.lists(st.floats(0.0, 1e4), min_size=1, max_size=30), rates, budgets)
def test_the_budget_is_kept_whatever_the_costs_are(
    found: list[float], mtbf_s: float, budget: float
) -> None:
    auto = AutoInterval(mtbf_s, budget)
    for number, cost_s in enumerate(found, 1):
        auto.spent(cost_s, cost_s, 0.0)
        usual_s = middle(found[max(0, number - 7) : number])
        assert usual_s <= budget * (usual_s + auto.seconds) * (1 + 1e-9)
        assert auto.seconds >= max(SHORTEST_S, usual_s)


def test_the_line_says_what_decided() -> None:
    def says(cost_s: float, takes_s: float, mtbf_s: float | None) -> str:
        return AutoInterval(mtbf_s).learn(Failures(), [(cost_s, takes_s)])

    assert "4 min 57 s, as the budget of 1 % allows" in says(3.0, 9.0, 3600)
    assert "least is lost with every 2 min 25 s, at 2 %" in says(3.0, 9.0, 3600)
    assert "15 min, as a save takes 10 min" in says(0.1, 600, 3600)
    assert "10 s, the shortest interval" in says(1e-6, 0.1, 3600)
    assert "1 h, the longest interval" in says(20, 20, 1e7)
    assert "one failure in 24 h until seen otherwise" in says(0.2, 2.0, None)
    seen = AutoInterval().learn(Failures(24, 86400), [(0.2, 2.0)])
    assert "one failure in 1 h 28 min as seen" in seen


def test_quiet_time_of_this_process_counts() -> None:
    auto, other = AutoInterval(), AutoInterval()
    auto.spent(1.0, 1.0, 60.0)
    other.spent(1.0, 1.0, 10 * 86400)
    assert auto.seconds < other.seconds


@pytest.mark.parametrize("value", ["often", "6", True, 0, -3.0, math.nan, math.inf, "0s"])
def test_what_is_no_time_between_failures(value: float | str) -> None:
    with pytest.raises(BadPolicy):
        parse_mtbf(value)


@pytest.mark.parametrize("value", ["much", "0%", "60%", 0, 1, True, math.nan, -0.1, "0.01"])
def test_what_is_no_overhead(value: float | str) -> None:
    with pytest.raises(BadPolicy):
        parse_overhead(value)
