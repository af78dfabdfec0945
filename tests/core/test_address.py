"""References: what they mean, what they select, and what is no tag."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.address import (
    AtStep,
    BestBy,
    Latest,
    Named,
    Reference,
    Selector,
    newest_that,
    parse_reference,
    parse_selector,
    select,
    short_ids,
    validate_tag,
)
from holdfast.core.records import Record
from holdfast.core.retention import ordered, parse_keep
from holdfast.errors import BadAddress, CheckpointNotFound
from tests.core.policy_records import record, runs

# -- parsing ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address", "selector"),
    [
        ("runs/mnist@latest", "runs/mnist", Latest()),
        ("runs/mnist@best", "runs/mnist", BestBy()),
        ("runs/mnist@best:val_loss", "runs/mnist", BestBy("val_loss")),
        ("runs/mnist@best:acc:max", "runs/mnist", BestBy("acc", "max")),
        ("runs/mnist@best:eval:loss", "runs/mnist", BestBy("eval:loss")),
        ("runs/mnist@41200", "runs/mnist", AtStep(41200)),
        ("runs/mnist@41,200", "runs/mnist", AtStep(41200)),
        ("runs/mnist@41_200", "runs/mnist", AtStep(41200)),
        ("runs/mnist@a-tag", "runs/mnist", Named("a-tag")),
        ("runs/mnist@9f3c", "runs/mnist", Named("9f3c")),
        ("/home/a@b/run@gold", "/home/a@b/run", Named("gold")),
        ("s3://key@host/exp/gpt@best", "s3://key@host/exp/gpt", BestBy()),
        ("s3://bucket/@latest", "s3://bucket", Latest()),
        ("memory://x@latest", "memory://x", Latest()),
        ("file:///a/b@7", "file:///a/b", AtStep(7)),
        ("runs/a@b/@latest", "runs/a@b", Latest()),
        ("runs/a@b@latest", "runs/a@b", Latest()),
        (".@latest", ".", Latest()),
        ("/@latest", "/", Latest()),
        ("runs/x/@best", "runs/x", BestBy()),
    ],
)
def test_references(text: str, address: str, selector: Selector) -> None:
    assert parse_reference(text) == Reference(address, selector)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("runs/mnist", "runs/mnist"),
        ("runs/mnist/", "runs/mnist"),
        ("/home/a@b/run", "/home/a@b/run"),
        ("/home/a@b/", "/home/a@b"),
        ("s3://key@host", "s3://key@host"),
        ("s3://key:secret@host/bucket/run", "s3://key:secret@host/bucket/run"),
        ("/", "/"),
        (".", "."),
        ("memory://", "memory://"),
    ],
)
def test_without_a_selector_the_latest_is_meant(text: str, address: str) -> None:
    assert parse_reference(text) == Reference(address, Latest(), explicit=False)


@pytest.mark.parametrize("text", ["", "@latest", "@", "a\0b", "a\0b@latest"])
def test_what_names_no_run(text: str) -> None:
    with pytest.raises(BadAddress):
        parse_reference(text)


@pytest.mark.parametrize(
    "text",
    ["x@", "x@a b", "x@best:", "x@best:loss:", "x@-3", "x@\x1b[31m", "x@../y@", "x@é", "x@1.5,0"],
)
def test_what_names_no_checkpoint(text: str) -> None:
    with pytest.raises(BadAddress) as caught:
        parse_reference(text)
    assert "@latest" in caught.value.hint or "@best:" in caught.value.hint
    assert "end it with '/'" in caught.value.hint
    assert caught.value.exit_code == 2


def test_selectors_from_code() -> None:
    assert parse_selector(None) == Latest()
    assert parse_selector(41200) == AtStep(41200)
    assert parse_selector("@best:acc:max") == BestBy("acc", "max")
    wrong: Any
    for wrong in (True, -1, 1.5, b"latest", "", "12,34", "9" * 19):
        with pytest.raises(BadAddress):
            parse_selector(wrong)


SELECTORS = st.one_of(
    st.just(Latest()),
    st.builds(AtStep, st.integers(0, 10**17)),
    st.builds(
        BestBy,
        st.none() | st.sampled_from(["loss", "eval:acc", "x.y"]),
        st.sampled_from([None, "min", "max"]),
    ).filter(lambda b: b.metric is not None or b.mode is None),
    st.builds(Named, st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,63}", fullmatch=True)).filter(
        lambda n: (
            n.name not in ("latest", "best")
            and not n.name.isdigit()
            and not n.name.replace("_", "").isdigit()
        )
    ),
)
ADDRESSES = st.from_regex(
    r"(s3://([a-z]+@)?[a-z]+/|/)?([a-z@.]{1,5}/){0,3}[a-z@.]{0,4}[a-z]", fullmatch=True
)


@given(ADDRESSES, SELECTORS)
def test_what_is_written_is_read_back(address: str, selector: Selector) -> None:
    reference = Reference(address, selector)
    assert parse_reference(str(reference)) == reference


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        reference = parse_reference(text)
    except BadAddress:
        return
    assert parse_reference(str(reference)) == Reference(reference.address, reference.selector)


# -- selecting ----------------------------------------------------------------

RUN = [
    record(100, 1, id="9f3c" + "0" * 60, metrics={"val_loss": 0.5, "acc": 0.7}, tags=["gold"]),
    record(200, 2, id="9f3d" + "0" * 60, metrics={"val_loss": 0.3, "acc": 0.8}),
    record(200, 3, id="1234" + "0" * 59 + "a", metrics={"val_loss": 0.4}),
    record(300, 4, id="abcd" + "0" * 60, metrics={"acc": 0.9}),
]


@pytest.mark.parametrize(
    ("text", "ordinal"),
    [
        ("latest", 4),
        ("200", 3),
        ("100", 1),
        ("gold", 1),
        ("9f3c", 1),
        ("9F3D", 2),
        ("best:val_loss", 2),
        ("best:val_loss:max", 1),
        ("best:acc:max", 4),
        ("best:acc:min", 1),
    ],
)
def test_select(text: str, ordinal: int) -> None:
    for records in (RUN, RUN[::-1]):
        assert select(records, parse_selector(text)).ordinal == ordinal


def test_the_latest_is_the_newest_commit_not_the_highest_step() -> None:
    went_back = [record(100, 1), record(300, 2), record(200, 3)]
    assert select(went_back, Latest()).step == 200


def test_steps_are_listed_in_the_order_of_their_commits() -> None:
    went_back = [record(100, 1), record(300, 2), record(200, 3), record(100, 4)]
    with pytest.raises(CheckpointNotFound) as caught:
        select(went_back, AtStep(1))
    assert caught.value.hint == "There are steps 300, 200, 100."


def test_best_follows_the_runs_own_rules() -> None:
    rules = parse_keep("best=1:acc:max best=2:val_loss:max").best
    assert select(RUN, BestBy(), rules).ordinal == 4
    assert select(RUN, BestBy("acc"), rules).ordinal == 4
    assert select(RUN, BestBy("acc", "min"), rules).ordinal == 1
    assert select(RUN, BestBy("val_loss"), rules).ordinal == 1
    only = [record(1, metrics={"val_loss": 2.0}), record(2, metrics={"val_loss": 1.0})]
    assert select(only, BestBy()).step == 2


def test_best_that_is_not_clear_is_refused() -> None:
    with pytest.raises(BadAddress, match="by which metric") as caught:
        select(RUN, BestBy())
    assert "acc, val_loss" in caught.value.hint
    with pytest.raises(BadAddress, match="higher or lower") as caught:
        select(RUN, BestBy("acc"))
    assert "@best:acc:max" in caught.value.hint


def test_nan_is_never_best() -> None:
    records = [record(1, metrics={"loss": 3.0}), record(2, metrics={"loss": math.nan})]
    assert select(records, BestBy("loss")).step == 1
    with pytest.raises(CheckpointNotFound, match="no checkpoint has a finite metric 'loss'"):
        select(records[1:], BestBy("loss"))


@pytest.mark.parametrize(
    ("selector", "says"),
    [
        (AtStep(999), "no checkpoint at step 999"),
        (AtStep(1234), "no checkpoint at step 1,234"),
        (Named("silver"), "has the tag 'silver'"),
        (Named("ffff"), "an id that starts with 'ffff'"),
        (Named("9f"), "has the tag '9f'"),
        (BestBy("bleu", "max"), "no checkpoint has a finite metric 'bleu'"),
    ],
)
def test_errors_list_what_exists(selector: Selector, says: str) -> None:
    with pytest.raises(CheckpointNotFound, match=says) as caught:
        select(RUN, selector)
    assert caught.value.hint == "There are steps 100, 200, 300; tags gold; metrics acc, val_loss."


def test_long_lists_are_shortened() -> None:
    many = [record(step, tags=[f"t{step}"]) for step in range(1000, 30_000, 1000)]
    with pytest.raises(CheckpointNotFound) as caught:
        select(many, AtStep(1))
    assert "steps 1,000, …, 24,000, 25,000" in caught.value.hint
    assert "… (29 in all)" in caught.value.hint
    assert len(caught.value.hint) < 250


def test_an_ambiguous_id_names_the_candidates() -> None:
    twins = [record(1, id="9f3c" + "a" * 60), record(2, id="9f3c" + "b" * 60)]
    with pytest.raises(CheckpointNotFound, match="2 ids start with '9f3c'") as caught:
        select(twins, Named("9f3c"))
    assert "9f3caaaa (step 1), 9f3cbbbb (step 2)" in caught.value.hint


def test_a_tag_wins_over_an_id_and_the_newest_over_an_older_one() -> None:
    records = [record(1, tags=["abcd"]), record(2, tags=["abcd"]), record(3, id="abcd" + "0" * 60)]
    assert select(records, Named("abcd")).step == 2


def test_an_empty_run_has_none() -> None:
    with pytest.raises(CheckpointNotFound, match="has no checkpoint"):
        select([], Latest())


@given(runs())
def test_short_ids_name_their_checkpoint(records: list[Any]) -> None:
    short = short_ids([r.id for r in records], shortest=4)
    for r in records:
        selector = parse_selector(short[r.id])
        assert isinstance(selector, Named)
        assert select(records, selector) == r


def test_short_ids_are_never_steps() -> None:
    digits = "1234567890" + "a" * 54
    assert short_ids([digits]) == {digits: "1234567890a"}
    twin = digits[:20] + "b" * 44
    assert short_ids([digits, twin]) == {digits: digits[:21], twin: twin[:21]}


# -- tags ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gold", "paper-v1", "v1.0", "_x", "a+b", "2026-11-21", "cafe-1"])
def test_tags(name: str) -> None:
    assert validate_tag(name) == name
    assert parse_selector(name) == Named(name)


@pytest.mark.parametrize(
    "name",
    [
        "", "latest", "Latest", "last", "best", "best-model", "BEST", "best:loss", "41200",
        "41,200", "41_200", "9" * 19, "deadbeef", "9f3c", "FACE", "a b", "a@b", "a/b", "-x", ".x",
        "é", "x\n", "\x1b[31m", "x" * 65,
    ],
)  # fmt: skip
def test_what_is_no_tag(name: str) -> None:
    with pytest.raises(BadAddress, match="cannot be a tag"):
        validate_tag(name)


@given(st.text(max_size=12))
def test_every_tag_can_be_referred_to(name: str) -> None:
    try:
        validate_tag(name)
    except BadAddress:
        return
    records = [record(1, tags=[name]), record(2)]
    assert select(records, parse_reference(f"runs/x@{name}").selector).step == 1


@given(runs(), st.sampled_from(["latest", "3", "17", "id", "best:loss", "gold"]))
def test_what_is_looked_for_newest_first_is_what_all_records_say(
    records: list[Record], text: str
) -> None:
    run = ordered(records)
    if text == "id":
        text = run[len(run) // 2].id if run else "f" * 64
    selector = parse_selector(text)
    wanted = newest_that(selector)
    if wanted is None:
        assert text in ("best:loss", "gold")
        return
    found = next((record for record in reversed(run) if wanted(record)), None)
    try:
        assert select(records, selector) is found
    except CheckpointNotFound:
        assert found is None


@given(st.lists(st.text("ab1", min_size=6, max_size=6), unique=True, min_size=1))
def test_an_id_is_short_among_others_as_among_its_own(ids: list[str]) -> None:
    short = short_ids(ids, shortest=2)
    for id in ids:
        assert short_ids([id], ids, shortest=2) == {id: short[id]}
