"""Adapters are found by type and tag, and imported only when they are needed."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from holdfast.core import frameworks
from holdfast.core.adapters import NOTHING, Decoder, Encoder
from holdfast.core.rng import apply_rng, capture_rng
from holdfast.errors import StateError, StructureMismatch
from tests.core.tree_harness import save


class Thing:
    def __init__(self, value: int) -> None:
        self.value = value


class ToyAdapter:
    """A whole adapter: what the tree promises frameworks."""

    name = "toy"
    together = frozenset[type]()
    seed = 7

    def encode(self, value: object, path: str, encoder: Encoder) -> Any:
        if not isinstance(value, Thing):
            return None
        text = encoder.encode("t" * 6000, f"{path}/text")
        return {"!": "toy.thing", "v": encoder.encode([value.value], path), "text": text}

    def decode(self, node: dict[str, Any], target: object, path: str, decoder: Decoder) -> Any:
        box = decoder.decode(node["v"], NOTHING, path)
        text = decoder.decode([node["text"]], NOTHING, path)
        thing = target if isinstance(target, Thing) else Thing(0)

        def finish() -> None:
            assert text == ["t" * 6000]
            thing.value = box[0]

        decoder.finish(finish)
        return thing

    def is_live(self, value: object) -> bool:
        return isinstance(value, Thing)

    def capture_rng(self) -> dict[str, object]:
        return {"seed": self.seed}

    def apply_rng(self, states: dict[str, Any]) -> None:
        self.seed = states["seed"]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ToyAdapter:
    """`toy` is a framework that is loaded; Thing claims to come from it."""
    adapter = ToyAdapter()
    module: Any = type(sys)("holdfast_toy")
    module.adapter = adapter
    monkeypatch.setitem(sys.modules, "toy", type(sys)("toy"))
    monkeypatch.setitem(sys.modules, "holdfast_toy", module)
    monkeypatch.setitem(frameworks.ADAPTERS, "toy", "holdfast_toy")
    monkeypatch.setattr(Thing, "__module__", "toy.things")
    monkeypatch.setattr(frameworks, "_roots_of_type", {})
    return adapter


class Derived(Thing):
    pass


def test_values_of_a_framework_go_through_its_adapter(toy: ToyAdapter) -> None:
    thing = Derived(5)  # a user's subclass is found through its bases
    saved = save({"a": thing, "b": [thing]})
    back = saved.restore()
    assert back["a"] is back["b"][0]
    assert back["a"].value == 5
    live = Thing(1)
    assert saved.restore({"a": live, "b": []})["a"] is live
    assert live.value == 5


def test_live_things_are_reported_missing(toy: ToyAdapter) -> None:
    saved = save({"a": {"x": Thing(1)}, "b": 3, "c": [Thing(1)]})
    live: Any = {"a": {"x": Thing(0), "y": Thing(2)}, "b": Thing(3), "c": [Thing(4), Thing(5)]}
    with pytest.raises(StructureMismatch) as caught:
        saved.restore(live)
    assert caught.value.missing == ("a/y", "c/1")
    assert caught.value.changed == ("b: saved as 3, live is Thing",)


class Stateful:
    def state_dict(self) -> dict[str, int]:
        return {"k": 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        raise AssertionError("not its state")


def test_a_live_object_of_another_kind_is_reported(toy: ToyAdapter) -> None:
    saved = save({"a": Thing(1), "b": Stateful(), "c": {"k": 1}, "d": {1}})
    live: Any = {"a": Stateful(), "b": Thing(0), "c": Thing(0), "d": Thing(0)}
    with pytest.raises(StructureMismatch) as caught:
        saved.restore(live)
    assert [line.partition(":")[0] for line in caught.value.changed] == ["a", "b", "c", "d"]


def test_random_states_of_frameworks(toy: ToyAdapter) -> None:
    states = capture_rng()
    toy.seed = 0
    apply_rng(save(states).restore())
    assert toy.seed == 7
    assert toy in frameworks.loaded_adapters()


def test_a_framework_that_is_not_loaded_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(frameworks.ADAPTERS, "absent_toy", "holdfast_absent_toy")
    monkeypatch.setattr(frameworks, "_roots_of_type", {})
    odd = type("Odd", (), {"__module__": "absent_toy.x"})
    assert frameworks.adapter_for_value(odd()) is None
    assert frameworks.adapter_for_tag("plain") is None
    assert frameworks.adapter_for_tag("mystery.tensor") is None


def test_a_framework_that_is_not_installed_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / "holdfast_absent_toy.py").write_text("import absent_toy\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(frameworks.ADAPTERS, "absent_toy", "holdfast_absent_toy")
    with pytest.raises(StateError, match="not installed") as caught:
        frameworks.adapter_for_tag("absent_toy.tensor")
    assert "pip install 'holdfast[absent_toy]'" in caught.value.hint


def test_the_tree_imports_no_framework() -> None:
    program = (
        "import sys, holdfast.core.tree as t, holdfast.core.rng as r;"
        "t.capture({'a': [1, object.__new__(type('X', (), {'state_dict': dict, "
        "'load_state_dict': dict}))]}); r.capture_rng();"
        "sys.exit('torch' in sys.modules or 'holdfast.torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_framework_that_is_being_imported_is_not_loaded_yet(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A loop may end in a garbage collection in the middle of the import."""
    (tmp_path / "slowtoy.py").write_text(
        "from holdfast.core.frameworks import loaded_adapters\nseen = loaded_adapters()\n"
    )
    (tmp_path / "slowtoy_adapter.py").write_text("import slowtoy\nadapter = slowtoy.seen\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(frameworks, "ADAPTERS", {"slowtoy": "slowtoy_adapter"})
    slowtoy = importlib.import_module("slowtoy")
    try:
        assert slowtoy.seen == []
        assert frameworks.loaded_adapters() == [slowtoy.seen]
    finally:
        for name in ("slowtoy", "slowtoy_adapter"):
            sys.modules.pop(name, None)
