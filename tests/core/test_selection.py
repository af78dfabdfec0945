"""only=, skip= and rename= by path: in lists too, and never silently about nothing."""

from __future__ import annotations

import copy
from collections import deque, namedtuple
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.selection import Selection
from holdfast.errors import StructureMismatch, UsageError
from tests.core.tree_harness import Saved, save


class Layer:
    """Something live: it must be restored in place."""

    def __init__(self, value: Any = 0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state.get("value", self.value)


@dataclass
class Settings:
    rate: float = 0.0
    sizes: list[int] = field(default_factory=list)


Pair = namedtuple("Pair", ["left", "right"])


def saved_state() -> Saved:
    return save(
        {
            "model": {"layers.0": Layer(1), "layers.1": Layer(2), "head": Layer(3)},
            "steps": 5,
            "history": [1, 2, {"loss": 0.5}],
            "settings": Settings(0.1, [3, 4]),
            "numbered": {0: "a", 1: "b"},
        }
    )


UNKNOWN = {
    "modle": "model",
    "model/layrs": "model/layers",
    "model/layers.2": "model/layers.1",
    "model/layers.0/valu": "model/layers.0/value",
    "model/layers/0": "model/layers.0",
    "steps/0": "steps",
    "history/3": "history/2",
    "history/2/los": "history/2/loss",
    "settings/rates": "settings/rate",
    "settings/sizes/2": "settings/sizes/1",
    "numbered/2": "numbered/1",
    "model/": "model",
}


@pytest.mark.parametrize("option", ["only", "skip", "rename"])
@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize(("entry", "closest"), UNKNOWN.items())
def test_an_entry_that_names_nothing_is_an_error(
    entry: str, closest: str, live: bool, option: str
) -> None:
    into: Any = {
        "model": {"layers.0": Layer(), "layers.1": Layer(), "head": Layer()},
        "steps": 0,
        "history": [0],
        "settings": Settings(),
        "numbered": {},
    }
    value: Any = {entry: f"{entry}x"} if option == "rename" else [entry, "steps"]
    with pytest.raises(UsageError) as caught:
        saved_state().restore(into if live else None, **{option: value})
    assert caught.value.message == f"nothing in the checkpoint is called {entry!r}"
    assert f"Closest to {entry!r}: " in caught.value.hint
    assert closest in caught.value.hint
    assert "At the top level it has: model, steps, history" in caught.value.hint
    assert into["steps"] == 0


def test_nothing_alike_lists_the_top_level_only() -> None:
    with pytest.raises(UsageError) as caught:
        saved_state().restore(skip=["qqqqqq"])
    assert caught.value.hint.startswith("At the top level it has: model, steps")


def test_what_only_the_live_objects_have_is_named_too() -> None:
    live: Any = {
        "model": {"layers.0": Layer(7), "new": [Layer(8)], "layers.1": Layer(), "head": Layer()}
    }
    saved_state().restore(live, only=["model"], skip=["model/new/0/value", "model/layers.0"])
    assert live["model"]["layers.0"].value == 7


def test_a_rename_that_was_done_before_is_no_error() -> None:
    saved = save({"net": {"new": 1}})
    assert saved.restore(rename={"model": "net", "net/old": "net/new"}) == {"net": {"new": 1}}


def test_an_entry_inside_another_counts() -> None:
    live: Any = {"steps": 0, "settings": Settings()}
    saved_state().restore(live, only=["steps"], skip=["model", "model/head", "settings/sizes/0"])
    assert live == {"steps": 5, "settings": Settings()}


def test_names_behind_a_reference() -> None:
    shared = {"x": 1, "y": [2, 3]}
    saved = save({"a": shared, "b": shared})
    live: Any = {"a": {"x": 0, "y": [0, 0]}, "b": {"x": 8, "y": [9, 9]}}
    saved.restore(live, skip=["b/x", "b/y/0"])
    assert live == {"a": {"x": 1, "y": [2, 3]}, "b": {"x": 8, "y": [9, 3]}}
    with pytest.raises(UsageError, match="'b/z'"):
        saved.restore(live, skip=["b/z"])


def test_items_of_lists_stay_in_place() -> None:
    first, second = Layer(7), Layer(8)
    live: Any = {"x": [first, second], "y": [[0, 0], [0]], "z": [np.zeros(2), np.zeros(2)]}
    items = live["x"]
    saved = save(
        {"x": [Layer(1), Layer(2)], "y": [[1, 2], [3]], "z": [np.ones(2), np.full(2, 2.0)]}
    )
    saved.restore(live, skip=["x/0", "y/0/1", "z/1"])
    assert live["x"] is items
    assert live["x"][0] is first
    assert (first.value, second.value) == (7, 2)
    assert live["y"] == [[1, 0], [3]]
    assert [array.tolist() for array in live["z"]] == [[1, 1], [0, 0]]
    saved.restore(live, only=["x/0", "y/1/0"])
    assert (first.value, second.value) == (1, 2)
    assert live["y"] == [[1, 0], [3]]


def test_items_of_tuples_deques_and_fields_stay_too() -> None:
    saved = save({"t": (1, 2), "d": deque([1, 2], 4), "p": Pair(1, 2), "s": Settings(0.5, [1, 2])})
    live: Any = {"t": (8, 9), "d": deque([8, 9], 4), "p": Pair(8, 9), "s": Settings(8.0, [8, 9])}
    saved.restore(live, skip=["t/0", "d/1", "p/0", "s/rate", "s/sizes/0"])
    assert live == {
        "t": (8, 2),
        "d": deque([1, 9]),
        "p": Pair(8, 2),
        "s": Settings(8.0, [8, 2]),
    }
    live = {"s": Settings(8.0, [8, 9])}
    saved.restore(live, only=["s/rate"])
    assert live == {"s": Settings(0.5, [8, 9])}


def test_dicts_in_lists() -> None:
    saved = save({"groups": [{"rate": 1, "decay": 2}, {"rate": 3, "decay": 4}]})
    live: Any = {"groups": [{"rate": 0}, {"rate": 0}]}
    saved.restore(live, skip=["groups/0/rate", "groups/1/decay"])
    assert live == {"groups": [{"rate": 0, "decay": 2}, {"rate": 3}]}
    renamed = saved.restore(rename={"groups/0/rate": "groups/0/lr"})
    assert renamed == {"groups": [{"lr": 1, "decay": 2}, {"rate": 3, "decay": 4}]}


def test_lists_of_other_lengths() -> None:
    saved = save({"x": [1, 2, 3]})

    def restored(live: list[int], **selection: Any) -> list[int]:
        state: Any = {"x": live}
        saved.restore(state, **selection)
        return state["x"]

    assert restored([7, 8, 9, 10], only=["x/1"]) == [7, 2, 9, 10]
    assert restored([7, 8, 9, 10], skip=["x/1"]) == [1, 8, 3]
    assert restored([7, 8, 9, 10], skip=["x/3"]) == [1, 2, 3, 10]
    assert restored([7], only=["x/1"]) == [7, 2]
    assert restored([7, 8], skip=["x/2"]) == [1, 2]
    assert saved.restore(skip=["x/2"]) == {"x": [1, 2]}


@pytest.mark.parametrize(
    ("value", "entry"),
    [([1, 2], "x/0"), ((1, 2), "x/0"), (Pair(1, 2), "x/1"), (Settings(), "x/rate")],
)
def test_a_gap_is_refused(value: Any, entry: str) -> None:
    with pytest.raises(UsageError, match=f"'{entry}' cannot be left out"):
        save({"x": value}).restore(skip=[entry])


@pytest.mark.parametrize(
    ("value", "live"),
    [
        (value, live)
        for value in (5, [1], (1,), Settings())
        for live in ({"new": 1}, [1, 2], (1, 2), deque([1, 2]))
        if type(value) is not type(live)
    ],
)
def test_a_part_of_something_of_another_kind_is_a_mismatch(value: Any, live: Any) -> None:
    live = copy.deepcopy(live)
    into = {"x": live}
    entry = "x/new" if type(live) is dict else "x/1"
    before = copy.deepcopy(live)
    with pytest.raises(StructureMismatch, match="x: saved as"):
        save({"x": value}).restore(into, only=[entry])
    assert into["x"] is live
    assert live == before


def test_items_of_a_list_that_is_saved_as_an_array_are_refused() -> None:
    numbers = list(range(5000))
    with pytest.raises(UsageError, match="one array of numbers"):
        save({"x": numbers}).restore({"x": [0] * 10}, skip=["x/1"])


def test_states_of_objects() -> None:
    saved = save({"m": Layer([1, 2])})
    live = Layer([7, 8])
    with pytest.raises(UsageError, match="cannot be left out"):
        saved.restore({"m": live}, skip=["m/value/0"])
    saved.restore({"m": live}, skip=["m/value"])
    assert live.value == [7, 8]


# -- against a model -------------------------------------------------------------------

SCALARS = st.integers(0, 9)
TREES: st.SearchStrategy[Any] = st.deferred(
    lambda: st.one_of(
        SCALARS,
        st.lists(TREES, max_size=3),
        st.dictionaries(st.sampled_from(["a", "b", "a.b", "c"]), TREES, max_size=3),
    )
)
STATES = st.dictionaries(st.sampled_from(["m", "n", "o"]), TREES, min_size=1, max_size=3)


def children(value: Any) -> dict[Any, Any]:
    return dict(enumerate(value)) if isinstance(value, list) else value


def paths_of(value: Any, path: str = "") -> list[str]:
    found: list[str] = []
    if isinstance(value, dict | list):
        for key, inner in children(value).items():
            where = f"{path}/{key}" if path else key
            found += [where, *paths_of(inner, where)]
    return found


@st.composite
def changed(draw: st.DrawFn, value: Any, top: bool = True) -> Any:
    """`value` with other numbers, and some items more or fewer."""
    if isinstance(value, dict):
        result = {
            key: draw(changed(inner, False))
            for key, inner in value.items()
            if top or draw(st.booleans())
        }
        if not top and draw(st.booleans()):
            result["new"] = 77
        return result
    if isinstance(value, list):
        result = [draw(changed(inner, False)) for inner in value]
        return [result[:-1], result, [*result, 77]][draw(st.integers(0, 2))]
    return value + 10


class Gap(Exception):
    """The model's UsageError."""


def expected(saved: Any, live: Any, chosen: Selection, path: str = "") -> Any:
    """What a restore makes of `live`, written for clarity."""
    if isinstance(saved, list):
        live = live if isinstance(live, list) else []
        result: list[Any] = []
        for index in range(max(len(saved), len(live))):
            where = f"{path}/{index}"
            if not chosen.wanted(where):
                items = live[index : index + 1]
            elif index < len(saved):
                inner = live[index] if index < len(live) else None
                items = [expected(saved[index], inner, chosen, where)]
            else:
                continue
            if items and len(result) < index:
                raise Gap
            result += items
        return result
    if isinstance(saved, dict):
        live = live if isinstance(live, dict) else {}
        names = {key: f"{path}/{key}" if path else key for key in {**live, **saved}}
        return {
            key: expected(saved[key], live.get(key), chosen, where)
            if chosen.wanted(where)
            else live[key]
            for key, where in names.items()
            if (key in saved if chosen.wanted(where) else key in live)
        }
    return saved


@given(st.data())
def test_any_selection_restores_what_it_names(data: st.DataObject) -> None:
    saved = data.draw(STATES)
    live = data.draw(changed(saved))
    entries = st.sampled_from(sorted({*paths_of(saved), *paths_of(live)}))
    chosen = Selection(
        tuple(data.draw(st.lists(entries, max_size=2))),
        tuple(data.draw(st.lists(entries, max_size=2))),
    )
    try:
        wish = expected(saved, live, chosen)
    except Gap:
        with pytest.raises(UsageError, match="cannot be left out"):
            save(saved).restore(live, only=chosen.only, skip=chosen.skip, strict=False)
        return
    save(saved).restore(live, only=chosen.only, skip=chosen.skip, strict=False)
    assert live == wish


@given(st.data())
def test_any_entry_that_names_nothing_is_refused(data: st.DataObject) -> None:
    saved = data.draw(STATES)
    live = data.draw(changed(saved))
    path = data.draw(st.sampled_from(paths_of(saved)))
    at = data.draw(st.integers(0, len(path)))
    entry = f"{path[:at]}z{path[at:]}"  # no name has a z
    option = data.draw(st.sampled_from(["only", "skip"]))
    into = data.draw(st.sampled_from([None, live]))
    with pytest.raises(UsageError, match="nothing in the checkpoint is called"):
        if option == "only":
            save(saved).restore(into, only=[path, entry])
        else:
            save(saved).restore(into, skip=[path, entry])
