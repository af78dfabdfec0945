"""What holds for every run and every policy."""

from __future__ import annotations

import math
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.records import Record
from holdfast.core.retention import Best, KeepPolicy, Leaders, decide, ordered, parse_keep
from tests.core.policy_records import record, runs

BEST = st.lists(
    st.builds(
        Best,
        k=st.integers(1, 4),
        metric=st.sampled_from(["loss", "acc"]),
        mode=st.sampled_from(["min", "max"]),
    ),
    max_size=2,
    unique_by=lambda best: best.metric,
).map(tuple)

POLICIES = st.builds(
    KeepPolicy,
    last=st.none() | st.integers(1, 6),
    best=BEST,
    every=st.none() | st.integers(1, 15),
    within_s=st.none() | st.integers(1, 1000).map(float),
    size_bytes=st.none() | st.integers(1, 600),
)


def kept(records: list[Record], policy: KeepPolicy) -> list[Record]:
    return [d.record for d in decide(records, policy) if d.keep]


@given(POLICIES)
def test_a_policy_reads_back_from_its_text(policy: KeepPolicy) -> None:
    assert parse_keep(str(policy)) == policy


@given(runs(), POLICIES)
def test_deciding_again_removes_nothing(records: list[Record], policy: KeepPolicy) -> None:
    once = kept(records, policy)
    assert kept(once, policy) == once


@given(runs(), POLICIES, st.randoms())
def test_the_order_of_the_records_does_not_matter(
    records: list[Record], policy: KeepPolicy, random: Random
) -> None:
    shuffled = list(records)
    random.shuffle(shuffled)
    assert decide(shuffled, policy) == decide(records, policy)


@given(runs(), POLICIES)
def test_every_decision_is_there_once_with_a_reason(
    records: list[Record], policy: KeepPolicy
) -> None:
    decisions = decide(records, policy)
    assert [d.record for d in decisions] == ordered(records)
    assert all(d.why and all(d.why) for d in decisions)


@given(runs(), POLICIES)
def test_the_floor_stays(records: list[Record], policy: KeepPolicy) -> None:
    stay = {r.ordinal for r in kept(records, policy)}
    for r in records:
        if r.pins or r.tags:
            assert r.ordinal in stay
    if records:
        assert max(records, key=lambda r: r.ordinal).ordinal in stay


@given(runs(), POLICIES)
def test_the_best_value_of_each_best_rule_survives(
    records: list[Record], policy: KeepPolicy
) -> None:
    """Against a rule told in another way: sort all values, look at the K best steps'."""
    after = kept(records, policy)
    for rule in policy.best:

        def values(of: list[Record], rule: Best = rule) -> list[float]:
            worst_last = max if rule.mode == "max" else min
            by_step: dict[int, float] = {}
            for r in of:
                value = r.metrics.get(rule.metric, math.nan)
                if not math.isnan(value):
                    by_step[r.step] = worst_last(by_step.get(r.step, value), value)
            return sorted(by_step.values(), reverse=rule.mode == "max")[: rule.k]

        assert values(after) == values(records)


@given(runs(), POLICIES.filter(lambda p: p.size_bytes is None))
def test_without_size_each_rule_alone_keeps_no_more_than_all_together(
    records: list[Record], policy: KeepPolicy
) -> None:
    together = {r.ordinal for r in kept(records, policy)}
    for alone in (
        KeepPolicy(last=policy.last),
        KeepPolicy(best=policy.best),
        KeepPolicy(every=policy.every),
        KeepPolicy(within_s=policy.within_s),
    ):
        if not alone.empty:
            assert {r.ordinal for r in kept(records, alone)} <= together


@given(runs(), st.integers(1, 6))
def test_last_is_the_newest_commits_of_different_steps(records: list[Record], n: int) -> None:
    plain = [record(r.step, r.ordinal) for r in records]
    newest: dict[int, Record] = {}
    for r in sorted(plain, key=lambda r: r.ordinal, reverse=True):
        newest.setdefault(r.step, r)
    assert kept(plain, KeepPolicy(last=n)) == list(newest.values())[:n][::-1]


@given(runs(), POLICIES.filter(lambda p: p.size_bytes is not None))
def test_size_is_kept_or_only_the_floor_is_left(records: list[Record], policy: KeepPolicy) -> None:
    assert policy.size_bytes is not None

    def used(of: list[Record]) -> int:
        return sum({p: n for r in of for p, n in r.packs.items()}.values())

    after = kept(records, policy)
    floor = [r for r in kept(records, KeepPolicy(best=policy.best, last=1)) if r in after]
    assert used(after) <= max(policy.size_bytes, used(floor))


@given(runs(), st.integers(1, 600))
def test_size_removes_the_oldest_first(records: list[Record], cap: int) -> None:
    decisions = decide(records, KeepPolicy(size_bytes=cap))
    packs_kept = {p for d in decisions if d.keep for p in d.record.packs}
    removed = [d.record for d in decisions if not d.keep]
    for r in removed:
        assert not set(r.packs) <= packs_kept, "removing it freed nothing"
    if removed:
        newest_removed = ordered(removed)[-1]
        for d in decisions:
            if d.keep and d.record.ordinal < newest_removed.ordinal:
                others = {p for e in decisions if e.keep and e != d for p in e.record.packs}
                floor = d.record.pins or d.record.tags or "newest" in d.why
                assert floor or set(d.record.packs) <= others


@given(runs(), POLICIES, st.dictionaries(st.sampled_from(["loss", "acc"]), st.floats()))
def test_leaders_admit_what_deciding_would_keep(
    records: list[Record], policy: KeepPolicy, metrics: dict[str, float]
) -> None:
    step = max((r.step for r in records), default=0) + 1
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    new = record(step, max((r.ordinal for r in records), default=0) + 1, metrics=finite)
    decided = decide([*records, new], policy)
    wanted = any("best=" in reason for d in decided if d.record == new for reason in d.why)
    assert Leaders(policy.best, records).admit(metrics) == wanted


@given(
    runs(),
    st.integers(0, 30),
    BEST,
    st.dictionaries(st.sampled_from(["loss", "acc"]), st.floats()),
)
def test_leaders_are_the_same_whether_all_are_there_or_come_one_by_one(
    records: list[Record], first: int, best: tuple[Best, ...], metrics: dict[str, float]
) -> None:
    leaders = Leaders(best, records[:first])
    for one in records[first:]:
        leaders.add(one)
    assert leaders.admit(metrics) == Leaders(best, records).admit(metrics)


@given(st.lists(st.integers(0, 200), unique=True, max_size=40), st.integers(1, 50))
def test_every_gives_the_same_whether_decided_at_once_or_at_each_save(
    steps: list[int], every: int
) -> None:
    policy = KeepPolicy(every=every)
    alive: list[Record] = []
    for step in sorted(steps):
        alive = kept([*alive, record(step)], policy)
    assert alive == kept([record(step) for step in sorted(steps)], policy)
