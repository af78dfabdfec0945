"""Any layout of a tensor over processes, restored to any other.

The processes are threads, and what they hold are parts of NumPy arrays: the framework is a toy,
the save, the join, the store and the restore are real.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from holdfast.core import frameworks
from holdfast.core.adapters import NOTHING, Decoder, Encoder
from holdfast.core.arrays import ArraySource, MemoryDestination
from holdfast.core.placement import Placement
from holdfast.core.plan import Part
from holdfast.manager import CheckpointManager, cutting
from holdfast.repo.repo import Repo
from holdfast.stores.memory import MemoryStore
from tests.support.thread_ranks import ThreadGroup, all_ranks
from tests.support.tilings import parts_of, tilings


@dataclass
class Held:
    """What a process holds of an array of all."""

    array: np.ndarray
    placement: Placement


class Parts:
    """The adapter of `Held`."""

    name = "parts"
    together = frozenset[type]()

    def encode(self, value: object, path: str, encoder: Encoder) -> Any:
        if not isinstance(value, Held):
            return None
        placement = value.placement if encoder.ranks else None
        return {"!": "parts.held", "leaf": encoder.leaf(ArraySource(value.array), path, placement)}

    def decode(self, node: dict[str, Any], target: object, path: str, decoder: Decoder) -> Any:
        _, shape = decoder.spec(node["leaf"])
        if target is NOTHING:
            target = Held(np.zeros(shape, "<i4"), Placement(shape, (0,) * len(shape), ()))
        assert isinstance(target, Held)
        part = target.placement.start, target.array.shape
        decoder.request(node["leaf"], MemoryDestination(target.array, part=part))
        return target

    def is_live(self, value: object) -> bool:
        return isinstance(value, Held)

    def capture_rng(self) -> dict[str, object]:
        return {}

    def apply_rng(self, states: dict[str, Any]) -> None: ...


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """`parts` is a framework that is loaded; Held comes from it."""
    module: Any = type(sys)("holdfast_parts")
    module.adapter = Parts()
    monkeypatch.setitem(sys.modules, "parts", type(sys)("parts"))
    monkeypatch.setitem(sys.modules, "holdfast_parts", module)
    monkeypatch.setitem(frameworks.ADAPTERS, "parts", "holdfast_parts")
    monkeypatch.setattr(Held, "__module__", "parts.held")
    monkeypatch.setattr(frameworks, "_roots_of_type", {})


def layout(whole: np.ndarray, boxes: Sequence[Part], size: int) -> list[Held]:
    """Who holds what: the boxes dealt to the ranks, so that some are held by several."""
    held: list[Held] = []
    for rank in range(size):
        start, shape = boxes[rank % len(boxes)]
        holders = tuple(range(rank % len(boxes), size, len(boxes)))
        array = whole[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))].copy()
        held.append(Held(array, Placement(whole.shape, start, holders)))
    return held


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(st.lists(st.integers(1, 5), max_size=4).map(tuple), st.data())
def test_any_layout_to_any_other(parts: None, shape: tuple[int, ...], data: st.DataObject) -> None:
    whole = np.arange(np.prod(shape, dtype=int), dtype="<i4").reshape(shape)
    size = data.draw(st.integers(1, 4))
    boxes = data.draw(tilings(shape, most=size))
    assume(len(boxes) <= size)
    replicated: list[Part] = [((0,) * len(shape), shape)]
    sides = [layout(whole, boxes, size), layout(whole + 7, replicated, size)]
    most = data.draw(st.integers(4, 40))
    store = MemoryStore("layouts")

    def save(group: ThreadGroup) -> None:
        rank = group.ranks.rank
        with CheckpointManager("", store=store, group=group) as manager:
            state = {"x": sides[0][rank], "y": sides[1][rank], "own": np.full(3, rank)}
            manager.save(1, state).result()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "CHUNK_BYTES", most)
        all_ranks(size, save)

    repo = Repo(store)
    manifest = repo.manifest(repo.records()[-1])
    for name in "xy":
        # No byte twice: the chunks tile the leaf, and each is small.
        [leaf] = [leaf for leaf in manifest.leaves if leaf.path == name]
        assert leaf.shape == shape
        assert sum(chunk.nbytes for chunk in leaf.chunks) == whole.nbytes
        assert all(chunk.nbytes <= most for chunk in leaf.chunks)
    with CheckpointManager("", store=store) as manager:
        assert all(found.ok for found in manager.verify())
        opened = manager.load()
        np.testing.assert_array_equal(opened["x"].array, whole)
        np.testing.assert_array_equal(opened["y"].array, whole + 7)

    later = data.draw(st.integers(1, 4))
    wanted = [data.draw(parts_of(shape)) for _ in range(later)]

    def restore(group: ThreadGroup) -> dict[str, Any]:
        start, extent = wanted[group.ranks.rank]
        live = {
            name: Held(np.zeros(extent, "<i4"), Placement(shape, start, (group.ranks.rank,)))
            for name in "xy"
        }
        with CheckpointManager("", store=store, group=group) as manager:
            manager.restore(live, strict=False, rng=False)
        return live

    for (start, extent), live in zip(wanted, all_ranks(later, restore), strict=True):
        box = whole[tuple(slice(a, a + n) for a, n in zip(start, extent, strict=True))]
        np.testing.assert_array_equal(live["x"].array, box)
        np.testing.assert_array_equal(live["y"].array, box + 7)
