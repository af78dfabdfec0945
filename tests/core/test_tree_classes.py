"""Classes of users in a state: made without their code, objects, refusals, pickle."""

from __future__ import annotations

import dataclasses
import sys
from collections import defaultdict, namedtuple
from typing import Any, ClassVar

import pytest

from holdfast.core.tree import Record, capture
from holdfast.errors import PickleRefused, StateError, UnsupportedValue
from tests.core.test_tree import Counter
from tests.core.tree_harness import roundtrip, save

# -- classes --------------------------------------------------------------------

Pair = namedtuple("Pair", "left right")


@dataclasses.dataclass
class Holder:
    value: Any
    calls: ClassVar[list[str]] = []

    def __post_init__(self) -> None:
        Holder.calls.append("init")


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenSlots:
    a: Any
    b: Any = dataclasses.field(default=None, init=False)


@dataclasses.dataclass
class Guarded:
    value: Any = None

    def __setattr__(self, name: str, value: Any) -> None:
        raise AssertionError("code of the class ran")

    def __del__(self) -> None:
        Holder.calls.append("del")


def test_dataclasses_are_made_without_their_code() -> None:
    holder = Holder("x" * 6000)
    holder.extra = [1]  # type: ignore[attr-defined]
    Holder.calls.clear()
    back = roundtrip([holder, FrozenSlots("y" * 6000), Pair("z" * 6000, 1)])
    assert Holder.calls == []
    assert back[0].value == "x" * 6000
    assert back[0].extra == [1]
    assert back[1].a == "y" * 6000
    assert back[2] == Pair("z" * 6000, 1)
    assert list(map(type, back)) == [Holder, FrozenSlots, Pair]


def test_a_class_with_a_finalizer_is_not_filled_from_a_store() -> None:
    saved = save({"v": Holder(1)})
    saved.tree["v"][0][1]["type"] = f"{__name__}:Guarded"
    Holder.calls.clear()
    assert saved.restore()["v"] == Record(f"{__name__}:Guarded", {"value": 1})
    assert Holder.calls == []


@pytest.mark.parametrize(
    "name",
    [
        "os:environ",
        "os:system",
        "builtins:dict",
        "subprocess:Popen",
        "not.loaded:Thing",
        f"{__name__}:Holder.calls",
        f"{__name__}:nothing",
        f"{__name__}:",
        "",
        ":",
        f"{__name__}:dataclasses.Field",
    ],
)
def test_names_of_other_things_become_records(name: str) -> None:
    for value in (Holder(1), Pair(1, 2)):
        saved = save({"v": value})
        saved.tree["v"][0][1]["type"] = name
        back = saved.restore()["v"]
        assert type(back) is Record
        assert back.type == name


def test_a_class_of_a_module_that_is_not_loaded_is_not_imported() -> None:
    saved = save({"v": Holder(1)})
    saved.tree["v"][0][1]["type"] = "antigravity:Holder"
    assert saved.restore()["v"] == Record("antigravity:Holder", {"value": 1})
    assert "antigravity" not in sys.modules


def test_a_class_that_changed() -> None:
    saved = save({"v": Pair(1, 2)})
    saved.tree["v"][0][1]["fields"] = ["left", "middle"]
    assert saved.restore()["v"].fields == {"left": 1, "middle": 2}
    saved = save({"v": FrozenSlots(1)})
    saved.tree["v"][0][1]["v"][0][0] = "gone"
    with pytest.raises(StateError, match="FrozenSlots has no gone"):
        saved.restore()


def test_local_classes_come_back_with_a_live_one() -> None:
    @dataclasses.dataclass
    class Local:
        a: int

    saved = save({"v": Local(1)})
    assert type(saved.restore()["v"]) is Record
    live = Local(5)
    assert saved.restore({"v": live})["v"] is live
    assert live.a == 1


# -- what cannot be saved -------------------------------------------------------


class Opaque:
    pass


class OnlyState:
    def state_dict(self) -> dict[str, int]:
        return {}


class MyDict(dict[str, int]):
    pass


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (Opaque(), "Opaque"),
        (lambda: 0, "function"),
        (MyDict(), "MyDict"),
        (OnlyState(), "no load_state_dict"),
        (int, "builtins.type"),
        (iter([]), "list_iterator"),
        (defaultdict(lambda: 0), "factory"),
        (1j.__class__, "type"),
        (memoryview(b""), "memoryview"),
    ],
)
def test_other_values_are_named_with_their_place_and_a_way_out(value: Any, words: str) -> None:
    with pytest.raises(UnsupportedValue, match=f"'a/0/b'.*{words}") as caught:
        capture({"a": [{"b": value}]})
    assert caught.value.path == "a/0/b"
    assert caught.value.hint


def test_pickle_needs_consent_at_both_ends() -> None:
    state = {"v": [Opaque(), Opaque()], "plain": 1}
    state["v"].append(state["v"][0])
    saved = save(state, allow_pickle=True)
    assert saved.pickled
    assert not save({"plain": 1}, allow_pickle=True).pickled
    with pytest.raises(PickleRefused, match=r"'v/0'.*Opaque") as caught:
        saved.restore()
    assert "allow_pickle=True" in caught.value.hint
    back = saved.restore(allow_pickle=True)
    assert type(back["v"][0]) is Opaque
    assert back["v"][0] is back["v"][2]
    assert back["v"][0] is not back["v"][1]


class Bomb:
    def __reduce__(self) -> Any:
        return (Holder.calls.append, ("boom",))


def test_a_pickle_runs_only_after_everything_else_was_accepted() -> None:
    saved = save({"v": Bomb(), "w": 1}, allow_pickle=True)
    Holder.calls.clear()
    decoder = saved.decoder(allow_pickle=True)
    decoder.apply(saved.tree, {"v": None})
    with pytest.raises(StateError, match="unexpected"):
        decoder.report()
    assert Holder.calls == []
    with pytest.raises(UnsupportedValue, match="cannot be pickled"):
        save({"v": lambda: 0}, allow_pickle=True)


# -- objects with a state -------------------------------------------------------


def test_objects_load_their_state_after_everything_was_accepted() -> None:
    counter = Counter(3)
    saved = save({"c": counter, "again": counter})
    live = Counter()
    decoder = saved.decoder()
    decoder.apply(saved.tree, {"c": live, "again": live})
    assert live.loaded == 0
    saved.fetch(decoder.requests)
    decoder.run()
    assert (live.count, live.loaded) == (3, 1)
    assert saved.restore()["c"] == {"count": 3, "text": "t" * 6000}


def test_an_object_where_the_other_side_has_a_value() -> None:
    saved = save({"a": Counter(1), "b": 5, "c": [1]})
    live: Any = {"a": 3, "b": Counter(), "c": Counter()}
    decoder = saved.decoder()
    decoder.apply(saved.tree, live)
    with pytest.raises(StateError, match=r"a: saved as .*Counter, live is int"):
        decoder.report()
    assert len(decoder.mismatch.changed) == 3
