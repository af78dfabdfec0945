"""Several checkpoints in one text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.core.address import select
from holdfast.core.choosing import choose, parse_choice
from holdfast.core.records import Record
from holdfast.core.retention import Best, decide, ordered, parse_keep
from holdfast.errors import BadAddress, BadPolicy, CheckpointNotFound
from tests.core.policy_records import record, runs

RUN = [
    record(100, 1, metrics={"loss": 0.5}, tags=["gold"]),
    record(200, 2, metrics={"loss": 0.2}),
    record(150, 3),  # it went back
    record(200, 4, metrics={"loss": 0.3}),
    record(1300, 5, metrics={"loss": 0.4}, pins=[""]),
]


def ordinals(choice: object, rules: list[Best] | None = None) -> list[int]:
    found = choose(RUN, parse_choice(choice), rules or [])  # type: ignore[arg-type]
    return [record.ordinal for record in found]


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        ("all", [1, 2, 3, 4, 5]),
        ("last=1", [5]),
        ("last=2", [4, 5]),
        ("last=9", [1, 3, 4, 5]),  # one per step
        ("best=1:loss", [2]),
        ("best=2:loss", [2, 5]),
        ("best=1:loss:max", [1]),
        ("every=1000", [1, 5]),
        ("within=200s", [5]),
        ("latest", [5]),
        (200, [4]),
        ("200", [4]),
        ("gold", [1]),
        (RUN[2].id, [3]),
        ("best:loss", [2]),
        ("best", [2]),
        ("last=1 gold 150", [1, 3, 5]),
        (["gold", 200], [1, 4]),
        (["last=1 gold", "150"], [1, 3, 5]),
        (["gold", "gold", 100], [1]),
        (("all", "gold"), [1, 2, 3, 4, 5]),
    ],
)
def test_words(choice: object, wanted: list[int]) -> None:
    assert ordinals(choice) == wanted


def test_best_follows_the_rules_of_the_run() -> None:
    run = [record(1, metrics={"acc": 0.5}), record(2, metrics={"acc": 0.7})]
    rules = list(parse_keep("best=1:acc:max").best)
    assert choose(run, parse_choice("best"), rules) == run[1:]


@pytest.mark.parametrize(
    ("choice", "error", "words"),
    [
        ("", BadAddress, "no checkpoint is named"),
        ([], BadAddress, "no checkpoint is named"),
        ("last=many", BadPolicy, "cannot read 'last=many'"),
        ("latst=3", BadPolicy, "there is no rule 'latst'"),
        ("size=3GB", BadPolicy, "names no checkpoints"),
        ("best=1:acc", BadPolicy, "best=1:acc:max or best=1:acc:min"),
        ("a/b", BadAddress, "names no checkpoint"),
        (-1, BadAddress, "counted from 0"),
        ([1.5], BadAddress, "names no checkpoint"),
        ("best=1:other", CheckpointNotFound, "no checkpoint has a finite metric 'other'"),
        ("300", CheckpointNotFound, "no checkpoint at step 300"),
        ("silver", CheckpointNotFound, "no checkpoint has the tag 'silver'"),
        ("last=2 silver", CheckpointNotFound, "no checkpoint has the tag 'silver'"),
    ],
)
def test_refused(choice: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ordinals(choice)


RULES = st.sampled_from(
    ["last=1", "last=3", "best=2:loss", "best=1:loss:max", "every=7", "within=90s"]
)


@settings(max_examples=60)
@given(runs(), st.lists(RULES, min_size=1, max_size=3, unique_by=lambda rule: rule[:4]))
def test_rules_name_what_keep_would_keep_for_them(records: list[Record], words: list[str]) -> None:
    """And nothing that it keeps for other reasons."""
    wanted = {
        d.record.id
        for word in words
        for d in decide(records, parse_keep(word))
        if any(why.startswith(word.partition("=")[0] + "=") for why in d.why)
    }
    try:
        found = choose(records, parse_choice(words))
    except CheckpointNotFound:
        best = [word for word in words if word.startswith("best")]
        assert not records or not all(
            select_or_none(records, f"best:{word.partition(':')[2]}") for word in best
        )
        return
    assert {record.id for record in found} == wanted
    assert found == [record for record in ordered(records) if record.id in wanted]


def select_or_none(records: list[Record], word: str) -> Record | None:
    (selector,) = parse_choice(word).selectors
    try:
        return select(records, selector)
    except CheckpointNotFound:
        return None
