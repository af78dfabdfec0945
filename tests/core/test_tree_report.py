"""Differences in one report; only=, skip=, rename=, strict=False."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from holdfast.core.adapters import NOTHING
from holdfast.core.report import MAX_LINES
from holdfast.core.selection import Selection, make_selection
from holdfast.errors import StructureMismatch, UsageError
from tests.core.tree_harness import Saved, save


class Layer:
    """Something live: it must be restored in place."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


def saved_state() -> Saved:
    return save(
        {
            "model": {"encoder": Layer(1), "encoder.norm": Layer(2), "head": Layer(3)},
            "steps": 5,
            "history": [1, 2],
        }
    )


def test_everything_that_differs_is_in_one_message() -> None:
    live: Any = {"model": {"encoder": Layer(), "tail": Layer()}, "stats": 1, "history": Layer()}
    with pytest.raises(StructureMismatch) as caught:
        saved_state().restore(live)
    error = caught.value
    assert error.missing == ("model/tail", "stats")
    assert error.unexpected == ("steps",)
    assert error.changed == ("history: saved as a list, live is Layer",)
    message = str(error)
    for part in ("missing in the checkpoint (2):\n  model/tail", "unexpected", "strict=False"):
        assert part in message
    assert live["model"]["encoder"].value == 0


def test_long_reports_are_cut_but_counted() -> None:
    live = {f"layer{index}": 0 for index in range(50)}
    with pytest.raises(StructureMismatch) as caught:
        save({}).restore(live)
    assert len(caught.value.missing) == 50
    assert "(50):" in caught.value.message
    assert f"and {50 - MAX_LINES} more" in caught.value.message
    assert len(caught.value.message.splitlines()) == MAX_LINES + 3


def test_not_strict_leaves_alone_what_differs() -> None:
    tail, layer = Layer(9), Layer(8)
    live: Any = {"model": {"encoder": Layer(), "tail": tail}, "stats": 1, "history": layer}
    saved = saved_state()
    decoder = saved.decoder()
    values = decoder.apply(saved.tree, live)
    report = decoder.report(strict=False)
    assert report.missing == ["model/tail", "stats"]
    assert report
    assert len(report.lines()) == 7
    saved.fetch(decoder.requests)
    decoder.run()
    assert set(values) == {"model", "history"}
    assert live["model"]["encoder"].value == 1
    assert live["model"]["tail"] is tail
    assert tail.value == 9
    assert live["history"] is layer
    assert live["stats"] == 1
    assert "steps" not in live


def test_only_and_skip_at_the_top() -> None:
    live: Any = {"steps": 0, "history": [0], "other": 1}
    assert set(saved_state().restore(live, only=["steps"])) == {"steps"}
    assert live == {"steps": 5, "history": [0], "other": 1}
    live = {"history": [0], "steps": 0}
    saved_state().restore(live, skip=["model", "history"])
    assert live == {"history": [0], "steps": 5}
    assert set(saved_state().restore(skip=["model"])) == {"steps", "history"}


def test_only_and_skip_below_the_top() -> None:
    def live() -> Any:
        return {
            "model": {"encoder": Layer(), "encoder.norm": Layer(), "head": Layer()},
            "steps": 0,
            "history": [0],
        }

    def restored(**selection: Any) -> Iterator[int]:
        state = live()
        objects = dict(state["model"])
        saved_state().restore(state, **selection)
        for name, layer in objects.items():
            assert state["model"][name] is layer
            yield layer.value

    # Names of layers have dots: "encoder" is a prefix of "encoder.norm".
    assert list(restored(only=["model/encoder"])) == [1, 2, 0]
    assert list(restored(skip=["model/encoder"])) == [0, 0, 3]
    assert list(restored(only=["model"], skip=["model/encoder.norm"])) == [1, 0, 3]
    assert list(restored(only=["model/head", "steps"])) == [0, 0, 3]


def test_skipped_plain_values_stay() -> None:
    saved = save({"config": {"lr": 1, "name": "a"}, "x": [1, 2, 3]})
    live: Any = {"config": {"lr": 9, "name": "old", "extra": 1}, "x": [7, 8]}
    saved.restore(live, skip=["config/lr"])
    assert live == {"config": {"name": "a", "lr": 9}, "x": [1, 2, 3]}


def test_a_new_name_may_be_missing_if_it_is_skipped() -> None:
    live: Any = {"model": {"encoder": Layer(), "encoder.norm": Layer(), "new_head": Layer(7)}}
    saved_state().restore(live, only=["model"], skip=["model/new_head", "model/head"])
    assert live["model"]["new_head"].value == 7
    assert live["model"]["encoder"].value == 1


def test_rename_at_the_top_and_below() -> None:
    live: Any = {
        "net": {"backbone": Layer(), "backbone.norm": Layer(), "head": Layer()},
        "steps": 0,
        "log": [],
    }
    layers = dict(live["net"])
    values = saved_state().restore(
        live,
        rename={"model": "net", "model/encoder": "model/backbone", "history": "log"},
    )
    assert set(values) == {"net", "steps", "log"}
    assert [layer.value for layer in layers.values()] == [1, 2, 3]
    assert live["log"] == [1, 2]


def test_renames_apply_to_keys_of_objects_states() -> None:
    saved = save({"m": Layer(4)})
    live = {"m": {"level": 0}}
    assert saved.restore(live, rename={"m/value": "m/level"}) == {"m": {"level": 4}}


def test_two_things_renamed_to_one_name_are_refused() -> None:
    saved = save({"a": 1, "b": 2})
    with pytest.raises(Exception, match="twice"):
        saved.restore(rename={"a": "b"})


def test_references_to_what_was_skipped_are_found() -> None:
    shared = [1]
    saved = save({"a": shared, "b": [shared], "c": shared})
    back = saved.restore(skip=["a"])
    assert back == {"b": [[1]], "c": [1]}
    assert back["b"][0] is back["c"]


def test_arguments_that_cannot_be_meant() -> None:
    with pytest.raises(UsageError, match="list of names"):
        make_selection("model", (), {})
    with pytest.raises(UsageError, match="elsewhere"):
        make_selection((), (), {"model/a": "other/a"})


def test_selection_knows_ancestors_and_prefixes() -> None:
    chosen = Selection(only=("model/layers.0",), skip=("model/layers.0.bias",))
    assert [
        chosen.wanted(path)
        for path in ("model", "model/layers", "model/layers.0.w", "model/layers.0.bias", "model/x")
    ] == [True, True, True, False, False]
    assert not chosen.wanted("model/layers.00")
    renamed = Selection(rename=(("a", "b"), ("a/x", "a/y")))
    assert [renamed.live_path(path) for path in ("a/x/1", "a/z", "ab", "a.x")] == [
        "b/y/1",
        "b/z",
        "ab",
        "b.x",
    ]


def test_a_part_without_selection_is_untouched_by_it() -> None:
    saved = save({"a": np.arange(3)})
    decoder = saved.decoder()
    assert decoder.decode({"!": "tuple", "v": [1]}, NOTHING, "x") == (1,)
