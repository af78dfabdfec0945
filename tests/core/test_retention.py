"""`keep=`: the words, the rules one by one, and their reasons."""

from __future__ import annotations

import math
from typing import Any

import pytest

from holdfast.core.records import Record
from holdfast.core.retention import (
    Best,
    KeepPolicy,
    Leaders,
    decide,
    looks_higher_better,
    ordered,
    parse_keep,
    ranking,
)
from holdfast.errors import BadPolicy
from tests.core.policy_records import record


def kept(records: list[Record], keep: str | None, **options: Any) -> list[int]:
    return [d.record.step for d in decide(records, parse_keep(keep), **options) if d.keep]


def why(records: list[Record], keep: str | None, **options: Any) -> dict[int, tuple[str, ...]]:
    return {d.record.ordinal: d.why for d in decide(records, parse_keep(keep), **options)}


HUNDREDS = [record(step) for step in range(100, 1100, 100)]


# -- the language -------------------------------------------------------------


def test_all_words() -> None:
    policy = parse_keep(" last=3  best=2:val_loss best=1:acc:max every=1000\twithin=2d size=200GB ")
    assert policy == KeepPolicy(
        last=3,
        best=(Best(2, "val_loss", "min"), Best(1, "acc", "max")),
        every=1000,
        within_s=172800,
        size_bytes=200 * 10**9,
    )
    assert str(policy) == ("last=3 best=2:val_loss best=1:acc:max every=1000 within=2d size=200GB")
    assert policy.default_best == ("val_loss", "min")
    assert policy.mode_of("acc") == "max"
    assert policy.mode_of("other") is None


@pytest.mark.parametrize("text", [None, "", "   "])
def test_no_words_are_no_rules(text: str | None) -> None:
    assert parse_keep(text).empty


@pytest.mark.parametrize(
    ("text", "best"),
    [
        ("best=1:eval/loss", Best(1, "eval/loss", "min")),
        ("best=1:loss:min", Best(1, "loss", "min")),
        ("best=1:acc:min", Best(1, "acc", "min")),
        ("best=1:a:b:max", Best(1, "a:b", "max")),
        ("best=1:max", Best(1, "max", "min")),
        ("best=1:x=y", Best(1, "x=y", "min")),
        ("best=1:x:max:min", Best(1, "x:max", "min")),
    ],
)
def test_best_words(text: str, best: Best) -> None:
    policy = parse_keep(text)
    assert policy.best == (best,)
    assert parse_keep(str(policy)) == policy


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("3", "name=value"),
        ("last", "name=value"),
        ("last=", "name=value"),
        ("last=0", "above 0"),
        ("last=-1", "above 0"),
        ("last=three", "above 0"),
        ("last=1.5", "above 0"),
        ("newest=3", "no rule 'newest'"),
        ("best=2", "a number and a metric"),
        ("best=val_loss", "a number and a metric"),
        ("best=0:val_loss", "above 0"),
        ("best=2:val_loss:", "ends in ':'"),
        ("best=2:val_acc", "best=2:val_acc:max or best=2:val_acc:min"),
        ("every=1d", "above 0"),
        ("within=5", "not a duration"),
        ("within=5m", "write 'min'"),
        ("size=200", "not a size"),
        ("size=200G", "unknown unit"),
    ],
)
def test_the_wrong_word_and_the_grammar_are_shown(word: str, reason: str) -> None:
    with pytest.raises(BadPolicy) as caught:
        parse_keep(f"within=1d {word}" if not word.startswith("within") else word)
    assert repr(word) in caught.value.message
    assert reason in caught.value.message
    assert "last=N best=K:metric[:max|:min]" in caught.value.hint
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["last=1 last=2", "size=1GB size=2GB", "best=1:x best=2:x:max"])
def test_a_rule_is_given_once(text: str) -> None:
    with pytest.raises(BadPolicy, match=r"twice|two best= rules"):
        parse_keep(text)


def test_keep_is_text() -> None:
    number: Any = 3
    with pytest.raises(BadPolicy, match="is a int, not text"):
        parse_keep(number)


@pytest.mark.parametrize(
    ("metric", "higher"),
    [
        ("acc", True),
        ("val_accuracy", True),
        ("eval/f1", True),
        ("valAcc", True),
        ("Top1", True),
        ("loss", False),
        ("accuracy_loss", False),
        ("map_error", False),
        ("tracc", False),
        ("space", False),
        ("", False),
    ],
)
def test_min_is_not_assumed_for_metrics_where_more_may_be_better(metric: str, higher: bool) -> None:
    assert looks_higher_better(metric) is higher


# -- the rules ----------------------------------------------------------------


def test_no_rules_remove_nothing() -> None:
    for keep in (None, ""):
        assert all(d.keep for d in decide(HUNDREDS, parse_keep(keep)))
    assert decide([], parse_keep("last=1")) == []


def test_last() -> None:
    assert kept(HUNDREDS, "last=3") == [800, 900, 1000]
    assert why(HUNDREDS, "last=3")[800] == ("last=3",)
    assert why(HUNDREDS, "last=3")[1000] == ("newest", "last=3")
    assert why(HUNDREDS, "last=3")[100] == ("no rule keeps it",)


def test_order_is_by_commit_not_by_clock() -> None:
    records = [record(1, time_s=9e9), record(2, time_s=5), record(3, time_s=1)]
    assert kept(records[::-1], "last=2") == [2, 3]


def test_after_going_back_the_newest_are_those_of_the_new_line() -> None:
    alive = [record(step, n) for n, step in enumerate((100, 400, 450, 500), 1)]
    left: list[list[int]] = []
    for ordinal, step in enumerate((150, 200, 250), 5):  # resumed from step 100
        decisions = decide([*alive, record(step, ordinal)], parse_keep("last=3"))
        alive = [d.record for d in decisions if d.keep]
        left.append([r.step for r in alive])
    assert left == [[450, 500, 150], [500, 150, 200], [150, 200, 250]]


def test_best_keeps_the_best_and_says_its_value() -> None:
    records = [record(s, metrics={"val_loss": v}) for s, v in [(1, 0.5), (2, 0.231), (3, 0.4)]]
    records.append(record(4))
    assert kept(records, "best=2:val_loss") == [2, 3, 4]
    assert why(records, "best=2:val_loss")[2] == ("best=2:val_loss (0.231)",)
    assert kept(records, "best=1:val_loss:max") == [1, 4]
    assert why(records, "best=1:val_loss:max")[1] == ("best=1:val_loss:max (0.5)",)


def test_metrics_that_are_not_finite_never_win() -> None:
    records = [
        record(1, metrics={"loss": math.nan}),
        record(2, metrics={"loss": -math.inf}),
        record(3, metrics={"loss": 7.0}),
        record(4, metrics={"loss": math.nan}),
        record(5, metrics={}, odd_metrics={"loss": "nan"}),
    ]
    assert kept(records, "best=1:loss") == [3, 5]
    assert [r.step for r in ranking(records, "loss", "max")] == [3]


def test_of_equal_metrics_the_earlier_step_wins() -> None:
    records = [record(s, metrics={"acc": 1.0}) for s in (3, 1, 2)]
    assert kept(records, "best=1:acc:max") == [1, 3]


def test_every_keeps_the_first_of_each_bucket_for_ever() -> None:
    steps = [0, 100, 250, 260, 499, 500, 740, 1001]
    assert kept([record(s) for s in steps], "every=250") == [0, 250, 500, 1001]
    assert why([record(s) for s in steps], "every=250")[0] == ("every=250",)


def test_every_does_not_lose_its_checkpoints_while_the_run_grows() -> None:
    alive: list[Record] = []
    for step in range(30, 1000, 30):
        alive = [
            d.record for d in decide([*alive, record(step)], parse_keep("every=100")) if d.keep
        ]
    assert [r.step for r in alive] == [30, 120, 210, 300, 420, 510, 600, 720, 810, 900, 990]


def test_every_keeps_the_lowest_step_of_each_bucket_whatever_was_committed_first() -> None:
    back = [record(420, 1), record(480, 2), record(410, 3), record(450, 4)]
    assert [d.record.ordinal for d in decide(back, parse_keep("every=100")) if d.keep] == [3, 4]


def test_within_counts_from_the_newest_commit() -> None:
    assert kept(HUNDREDS, "within=200s") == [800, 900, 1000]
    # The newest commit is not the highest step after going back to an earlier one.
    back = [record(1, 1, time_s=0), record(9, 2, time_s=50), record(2, 3, time_s=100)]
    assert kept(back, "within=60s") == [9, 2]
    assert why(back, "within=60s")[3] == ("newest", "within=1min")
    assert why(back, "within=60s")[2] == ("within=1min",)


def test_rules_are_ored_and_each_gives_its_reason() -> None:
    records = [record(s, metrics={"loss": float(s)}) for s in (100, 200, 300, 400)]
    reasons = why(records, "last=2 best=1:loss every=300")
    assert reasons == {
        100: ("every=300", "best=1:loss (100)"),
        200: ("no rule keeps it",),
        300: ("last=2", "every=300"),
        400: ("newest", "last=2"),
    }


def test_pins_and_tags_stay() -> None:
    records = [
        record(1, pins=("",)),
        record(2, tags=("gold", "paper")),
        record(3, pins=("runs/child",)),
        record(4),
        record(5),
    ]
    assert kept(records, "last=1 size=1B") == [1, 2, 3, 5]
    reasons = why(records, "last=1")
    assert reasons[1] == ("pinned",)
    assert reasons[2] == ("tag gold", "tag paper")
    assert reasons[3] == ("pinned: runs/child",)


def test_a_step_saved_twice_is_represented_by_its_newest_commit() -> None:
    records = [record(1, 1), record(2, 2), record(2, 4), record(2, 3)]
    assert [d.record.ordinal for d in decide(records, parse_keep("last=2")) if d.keep] == [1, 4]
    assert why(records, "last=2")[3] == ("step 2 was saved again",)
    assert [r.ordinal for r in ordered(records)] == [1, 2, 3, 4]
    again = [record(2, 1), record(3, 2), record(2, 3)]
    assert [d.record.ordinal for d in decide(again, parse_keep("last=2")) if d.keep] == [2, 3]


def test_the_best_is_not_given_up_when_its_step_comes_round_again() -> None:
    records = [
        record(5, 1, metrics={"loss": 0.1}),
        record(5, 2, metrics={"loss": 0.3}),
        record(6, 3, metrics={"loss": 0.2}),
        record(7, 4),
    ]
    decisions = decide(records, parse_keep("best=2:loss"))
    assert [d.record.ordinal for d in decisions if d.keep] == [1, 3, 4]
    # Equal values: the newest commit, and the step takes one place only.
    same = [
        record(5, 1, metrics={"loss": 0.1}),
        record(5, 2, metrics={"loss": 0.1}),
        record(6, 3, metrics={"loss": 0.2}),
    ]
    assert [r.ordinal for r in ranking(same, "loss", "min")] == [2, 3]


def test_the_newest_commit_stays_after_going_back() -> None:
    records = [record(s, s) for s in (1, 2, 3)] + [record(1, 4)]
    decisions = decide(records, parse_keep("last=1"))
    assert [(d.record.step, d.record.ordinal) for d in decisions if d.keep] == [(1, 4)]
    assert kept(records, "size=1B") == [1]


def test_damaged_ones_take_nobodys_place_and_are_left_alone() -> None:
    records = [record(s, metrics={"loss": -s}) for s in (1, 2, 3)]
    damaged = {records[2].id}
    assert kept(records, "last=1", damaged=damaged) == [2, 3]
    reasons = why(records, "last=1 best=1:loss", damaged=damaged)
    assert reasons[3] == ("damaged: no rule removes it",)
    assert reasons[2] == ("newest", "last=1", "best=1:loss (-2)")
    assert kept(records[2:], "last=1", damaged=damaged) == [3]


# -- size ---------------------------------------------------------------------


def test_size_alone_keeps_what_fits() -> None:
    assert kept(HUNDREDS, "size=350B") == [800, 900, 1000]
    assert kept(HUNDREDS, "size=1KB") == [r.step for r in HUNDREDS]
    assert why(HUNDREDS, "size=350B")[100] == ("size: over 350B",)
    assert why(HUNDREDS, "size=350B")[900] == ("size=350B",)
    assert kept(HUNDREDS, "size=1B") == [1000], "the newest stays even if it does not fit"
    twice = [record(1, 1), record(1, 2)]
    assert all(d.keep for d in decide(twice, parse_keep("size=1KB")))


def test_size_is_a_cap_on_the_other_rules() -> None:
    assert kept(HUNDREDS, "last=5 size=250B") == [900, 1000]
    assert kept(HUNDREDS, "last=5 size=1GB") == [600, 700, 800, 900, 1000]
    reasons = why(HUNDREDS, "last=5 size=250B")
    assert reasons[600] == ("size: over 250B",)
    assert reasons[100] == ("no rule keeps it",)


def test_size_never_takes_the_floor() -> None:
    records = [
        record(1, tags=("gold",)),
        record(2, metrics={"loss": 0.1}),
        record(3, metrics={"loss": 0.2}),
        record(4, pins=("",)),
        record(5),
    ]
    assert kept(records, "last=9 best=1:loss size=1B") == [1, 2, 4, 5]


def test_shared_packs_count_once() -> None:
    base = {"base": 1000}
    records = [record(s, packs={**base, f"p{s}": 10}) for s in (1, 2, 3, 4)]
    assert kept(records, "size=1040B") == [1, 2, 3, 4]
    assert kept(records, "size=1030B") == [2, 3, 4]


def test_what_would_free_nothing_stays() -> None:
    records = [
        record(1, packs={"shared": 50}),
        record(2, packs={"mine": 50}),
        record(3, packs={"shared": 50}),
    ]
    assert kept(records, "size=60B") == [1, 3]


def test_two_that_free_space_only_together_go_together() -> None:
    records = [
        record(1, packs={"old": 50}),
        record(2, packs={"old": 50}),
        record(3, packs={"new": 50}),
    ]
    assert kept(records, "size=60B") == [3]


# -- a metric that improves ---------------------------------------------------


def admits(keep: str, records: list[Record], **metrics: float) -> bool:
    return Leaders(parse_keep(keep).best, records).admit(metrics)


def test_what_would_be_among_the_best() -> None:
    records = [record(s, metrics={"loss": v}) for s, v in [(1, 0.5), (2, 0.3), (3, 0.4)]]
    keep = "best=2:loss last=1"
    assert admits(keep, records, loss=0.35)
    assert not admits(keep, records, loss=0.4), "equal is not better"
    assert not admits(keep, records, loss=math.nan)
    assert not admits(keep, records, loss=-math.inf)
    assert not admits(keep, records, acc=1.0)
    assert admits(keep, records[:1], loss=9.0), "a place is free"
    assert admits(keep, [], loss=9.0)
    assert not admits("last=1", records, loss=0.0)
    assert admits("best=1:loss:max", records, loss=0.6)
    assert admits("best=1:loss best=1:acc:max", records, loss=9.0, acc=0.1)


def test_a_step_that_comes_again_takes_one_place() -> None:
    leaders = Leaders(parse_keep("best=2:loss").best, [record(1, metrics={"loss": 0.5})])
    leaders.add(record(1, 2, metrics={"loss": 0.3}))
    leaders.add(record(1, 3, metrics={"loss": 0.4}))
    assert leaders.admit({"loss": 9.0}), "a place is free"
    leaders.add(record(2, 4, metrics={"loss": 0.6}))
    assert not leaders.admit({"loss": 0.6})
    assert leaders.admit({"loss": 0.55})
    leaders.add(record(3, 5, metrics={"loss": math.nan}))
    leaders.add(record(4, 6, metrics={}))
    assert leaders.admit({"loss": 0.55})
