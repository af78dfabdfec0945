"""Whether a last save fits: rules that hold for all costs and times."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.run.deadline import (
    MARGIN_S,
    Cost,
    Deadline,
    earlier,
    fit,
    latest_s,
    p95_s,
    percentile_s,
)

seconds = st.floats(0, 1e6)
costs = st.builds(Cost, seconds, st.integers(0, 10**12), st.booleans())
deadlines = st.none() | st.builds(Deadline, seconds, st.booleans())


@given(st.lists(seconds, min_size=1, max_size=100))
def test_at_least_95_percent_of_the_saves_are_within_their_p95(values: list[float]) -> None:
    p95 = percentile_s(values)
    assert p95 in values
    assert sum(value <= p95 for value in values) >= 0.95 * len(values)
    if len(values) < 20:
        assert p95 == max(values)


@given(st.lists(costs, max_size=30))
def test_of_saves_that_were_waited_for_and_others_only_the_former_count(all: list[Cost]) -> None:
    p95 = p95_s(all)
    if not all:
        assert p95 is None
        return
    assert p95 in [cost.seconds for cost in all]
    newest = all[-1]
    if newest.blocked:
        assert p95 == p95_s([cost for cost in all if cost.blocked])


def test_saves_of_a_much_smaller_state_do_not_count() -> None:
    small, large = Cost(0.1, 10, blocked=True), Cost(50.0, 10_000, blocked=False)
    assert p95_s([small] * 100 + [large]) == 50.0
    assert p95_s([large] * 100 + [small]) == 0.1


@given(seconds, deadlines, st.none() | seconds, st.integers(0, 2))
def test_only_a_measured_save_and_a_deadline_that_was_said_forbid_one(
    now_s: float, deadline: Deadline | None, save_s: float | None, behind: int
) -> None:
    found = fit(now_s, deadline, save_s, behind=behind)
    if not found.fits:
        assert deadline is not None
        assert deadline.said
        assert save_s is not None
        assert now_s + save_s * (1 + behind) + MARGIN_S > deadline.at_s - 1e-6
    assert found.left_s is None or found.left_s >= 0


@given(seconds, st.floats(1, 1e6), st.floats(0, 1e6), st.floats(0, 1e6))
def test_what_fits_later_fits_earlier_and_a_cheaper_save_fits_too(
    now_s: float, later_s: float, save_s: float, cheaper_s: float
) -> None:
    deadline = Deadline(now_s + later_s + save_s, said=True)
    if fit(now_s + later_s, deadline, save_s).fits:
        assert fit(now_s, deadline, save_s).fits
        assert fit(now_s, deadline, min(save_s, cheaper_s)).fits


@given(seconds, st.floats(0, 1e6), st.none() | st.floats(0, 1e6))
def test_a_save_that_begins_at_the_latest_moment_fits(
    asked_s: float, grace_s: float, save_s: float | None
) -> None:
    deadline = Deadline(asked_s + grace_s, said=True)
    latest = latest_s(asked_s, deadline, save_s)
    assert asked_s <= latest <= deadline.at_s
    if save_s is not None and latest > asked_s:
        assert fit(latest - 1e-3, deadline, save_s).fits


@given(deadlines, deadlines)
def test_of_two_deadlines_what_was_said_counts_and_the_earlier_of_those(
    one: Deadline | None, other: Deadline | None
) -> None:
    both = [deadline for deadline in (one, other) if deadline is not None]
    said = [deadline for deadline in both if deadline.said]
    chosen = earlier(one, other)
    if not both:
        assert chosen is None
    else:
        assert chosen is not None
        assert chosen.at_s == min(deadline.at_s for deadline in said or both)
        assert chosen.said == bool(said)
    assert earlier(other, one) == chosen or one == other


@pytest.mark.parametrize("left_s", [0.0, -50.0])
def test_a_deadline_that_is_over(left_s: float) -> None:
    assert not fit(100.0, Deadline(100.0 + left_s, said=True), 0.1).fits
    assert fit(100.0, Deadline(100.0 + left_s, said=True), None).fits
