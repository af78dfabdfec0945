"""What each save retires is what `decide` says about the whole list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core import retiring
from holdfast.core.records import Record
from holdfast.core.retention import KeepPolicy, decide, parse_keep
from holdfast.core.retiring import Retiring
from tests.core.policy_records import record, runs
from tests.core.test_retention_properties import POLICIES


def unwanted(records: Sequence[Record], policy: KeepPolicy) -> list[str]:
    return [d.record.id for d in decide(records, policy) if not d.keep]


def grow(run: Sequence[Record], policy: KeepPolicy, edit: Callable[[list[Record]], None]) -> None:
    """Save after save, and `edit` in between; compared with the definition each time."""
    saver = Retiring(policy)
    live: list[Record] = []
    for saved in run:
        live.append(saved)
        gone = saver.ids(tuple(live))
        assert gone == unwanted(live, policy)
        live = [r for r in live if r.id not in gone]
        edit(live)


@given(runs(max_size=30), POLICIES)
def test_each_save_retires_what_the_whole_list_says(run: list[Record], policy: KeepPolicy) -> None:
    grow(sorted(run, key=lambda r: r.ordinal), policy, lambda live: None)


@given(runs(max_size=30), POLICIES, st.data())
def test_also_where_others_change_the_list_meanwhile(
    run: list[Record], policy: KeepPolicy, data: st.DataObject
) -> None:
    def edit(live: list[Record]) -> None:
        """Tag or untag one, or remove one."""
        if not live or not data.draw(st.booleans()):
            return
        i = data.draw(st.integers(0, len(live) - 1))
        if data.draw(st.booleans()):
            live[i] = msgspec.structs.replace(live[i], tags=() if live[i].tags else ("gold",))
        else:
            del live[i]

    grow(sorted(run, key=lambda r: r.ordinal), policy, edit)


@given(runs(), POLICIES)
def test_any_list_is_decided_right(run: list[Record], policy: KeepPolicy) -> None:
    """Also one that is no continuation, and whose order is another."""
    saver = Retiring(policy)
    for records in (run, run[:-1], list(reversed(run)), run):
        assert sorted(saver.ids(records)) == sorted(unwanted(records, policy))


def test_what_has_gone_does_not_go_again() -> None:
    """A step that is saved several times, in the time of within=, and a save much later."""
    run = [record(7, ordinal=n, time_s=time_s) for n, time_s in enumerate([0.0, 0.0, 0.0, 9.0], 1)]
    grow(run, parse_keep("within=1s"), lambda live: None)


def test_a_clock_that_goes_back_and_on_again_behind_a_change() -> None:
    run = [record(step, time_s=time_s) for step, time_s in enumerate([0.0, 9.0, 0.0, 0.0, 9.0])]

    def tag(live: list[Record]) -> None:
        if len(live) == 2:
            live[1] = msgspec.structs.replace(live[1], tags=("gold",))

    grow(run, parse_keep("last=2 within=5s"), tag)


@pytest.mark.parametrize(
    "keep",
    ["last=50", "last=3 every=10", "best=5:loss last=9", "within=100s", "size=5kB"],
)
def test_a_long_run_is_looked_at_as_a_whole_only_once(
    keep: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: list[int] = []

    def counting(records: Sequence[Record], policy: KeepPolicy, **more: Any) -> Any:
        whole.append(len(records))
        return decide(records, policy, **more)

    monkeypatch.setattr(retiring, "decide", counting)
    run = [record(step, metrics={"loss": 1 / (step + 1)}) for step in range(1, 400)]
    grow(run, parse_keep(keep), lambda live: None)
    assert len(whole) == 1
