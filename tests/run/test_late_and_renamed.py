"""Objects that are tracked after the start, and were saved under other names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

import holdfast
from holdfast.errors import StructureMismatch, UsageError
from tests.support.jobs import Model, fresh_address
from tests.support.refusals import hinted


def model(seen: int = 0) -> Model:
    made = Model()
    made.seen = seen
    return made


def saved(**seen: int) -> str:
    """A run of three steps whose checkpoint has models that have `seen` so much."""
    address = fresh_address()
    run = holdfast.Run(address, quiet=True)
    list(run.track(**{name: model(count) for name, count in seen.items()}).range(3))
    return address


def go_on(
    address: str, steps: int, early: Mapping[str, Model], then: Mapping[str, Model], **options: Any
) -> dict[str, int]:
    """A process that tracks `early` before its loop and `then` in it; what all had seen
    then, by name."""
    seen: dict[str, int] = {}
    with holdfast.Run(address, quiet=True, **options) as run:
        run.track(**early)
        for _ in run.range(steps):
            if not seen:
                run.track(**then)
                seen.update({name: one.seen for name, one in {**early, **then}.items()})
    return seen


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("late_name", ["ema", "mean"])
@pytest.mark.parametrize("early_name", ["", "net", "model"])
def test_both_under_each_name(early_name: str, late_name: str, strict: bool) -> None:
    """With nothing tracked before the loop too; and started again with the same options."""
    address = saved(ema=7, **({"net": 1} if early_name else {}))
    early = {early_name: model()} if early_name else {}
    rename = {"ema": late_name} | ({"net": early_name} if early_name else {})
    rename = {old: new for old, new in rename.items() if old != new}
    options: dict[str, Any] = {"late": [late_name], "rename": rename, "strict": strict}
    expected = {late_name: 7} | ({early_name: 1} if early_name else {})
    for steps in (5, 7):
        late = {late_name: model()}
        assert go_on(address, steps, early, late, **options) == expected
        with holdfast.CheckpointManager(address) as manager:
            assert set(manager.load()) == set(expected)


@pytest.mark.parametrize(
    ("name", "rename"),
    [
        ("ema", {"ema/old": "ema/new"}),
        ("mean", {"ema": "mean", "ema/old": "ema/new"}),
    ],
)
def test_a_part_of_what_is_late_is_renamed(name: str, rename: dict[str, str]) -> None:
    address = fresh_address()
    run = holdfast.Run(address, quiet=True)
    list(run.track(net=model(1), ema={"old": model(7)}).range(3))
    for steps in (5, 7):  # the second checkpoint has the new names
        part = model()
        with holdfast.Run(address, quiet=True, late=[name], rename=rename) as run:
            run.track(net=model())
            for _ in run.range(steps):
                run.track(**{name: {"new": part}})
        assert part.seen == 7


def test_saved_before_what_is_late_was_tracked() -> None:
    """The checkpoint has it under neither name: it starts as it is, as without a rename."""
    address = saved(net=1, ema=7)
    options: dict[str, Any] = {"late": ["mean"], "rename": {"ema": "mean"}}
    assert go_on(address, 5, {"net": model()}, {}, **options) == {"net": 1}
    assert go_on(address, 7, {"net": model()}, {"mean": model(3)}, **options) == {
        "net": 1,
        "mean": 3,
    }


def test_renames_of_several_generations_may_stay() -> None:
    address = saved(first=7)
    rename: dict[str, str] = {}
    for first, (old, new) in {5: ("first", "second"), 9: ("second", "third")}.items():
        rename[old] = new
        for steps in (first, first + 2):
            assert go_on(address, steps, {new: model()}, {}, rename=rename) == {new: 7}
    assert go_on(address, 20, {}, {"third": model()}, late=["third"], rename=rename) == {"third": 7}


# -- misspelt ----------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("late", [(), ("ema",)])
def test_a_rename_of_what_the_checkpoint_does_not_hold(late: tuple[str, ...], strict: bool) -> None:
    address = saved(net=1, ema=7)
    early = {"net": model()} if late else {"net": model(), "ema": model()}
    run = holdfast.Run(address, quiet=True, late=late, rename={"ne": "model"}, strict=strict)
    with pytest.raises(UsageError, match="nothing in the checkpoint is called 'ne'") as caught:
        run.track(**early).range(5)
    assert "Closest to 'ne': net." in caught.value.hint


def refused(address: str, **options: Any) -> StructureMismatch:
    with pytest.raises(StructureMismatch, match="nothing tracks here") as caught:
        go_on(address, 5, {"net": model()}, {"mean": model()}, **options)
    return caught.value


@pytest.mark.parametrize("strict", [True, False])
def test_a_misspelt_old_name_of_what_is_late(strict: bool) -> None:
    address = saved(net=1, ema=7)
    error = refused(address, late=["mean"], rename={"emma": "mean"}, strict=strict)
    assert "holds 'ema', which" in error.message
    rename = hinted(error.hint, "rename")
    assert rename == {"ema": "mean"}
    found = go_on(address, 5, {"net": model()}, {"mean": model()}, late=["mean"], rename=rename)
    assert found == {"net": 1, "mean": 7}


@pytest.mark.parametrize("late", [["maen"], ["ema"], ["ema", "maen"]])
def test_a_wrong_name_of_what_is_late(late: list[str]) -> None:
    """Misspelt, or the name under which it was saved."""
    address = saved(net=1, ema=7)
    rename = {"ema": "mean"}
    error = refused(address, late=late, rename=rename)
    assert "holds 'mean' (saved as 'ema'), which" in error.message
    pasted = hinted(error.hint, "late")
    assert pasted == sorted({*late, "mean"} - {"ema"})
    found = go_on(address, 5, {"net": model()}, {"mean": model()}, late=pasted, rename=rename)
    assert found == {"net": 1, "mean": 7}


@pytest.mark.parametrize(
    "rename",
    [
        {"a": "b", "b": "a"},
        {"a": "b", "b": "c", "c": "a"},
        {"x": "a", "m/a": "m/b", "m/b": "m/a"},
    ],
)
def test_names_that_change_places_are_refused(rename: dict[str, str]) -> None:
    """The second start of the same program would change them back."""
    address = saved(a=1, b=2)
    with pytest.raises(UsageError, match=r"comes back to .*, and would be done again") as caught:
        holdfast.Run(address, quiet=True, rename=rename)
    assert "give both a new one" in caught.value.hint


def test_a_name_that_is_taken_is_refused_and_the_hint_helps() -> None:
    """Whether `a` became `b`, which became `c`, or is still to do so, nobody can tell."""
    address = saved(a=1, b=2)
    chain = {"a": "b", "b": "c"}
    with pytest.raises(UsageError, match=r"rename={'a': 'b'} is not clear"):
        go_on(address, 5, {"b": model(), "c": model()}, {}, rename=chain)
    for steps in (5, 7):
        early = {"a2": model(), "b2": model()}
        found = go_on(address, steps, early, {}, rename={"a": "a2", "b": "b2"})
        assert found == {"a2": 1, "b2": 2}


def test_a_name_may_be_renamed_to_itself() -> None:
    address = saved(a=1)
    assert go_on(address, 5, {"a": model()}, {}, rename={"a": "a"}) == {"a": 1}
