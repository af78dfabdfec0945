"""What differs between two checkpoints: everything that does, and nothing else."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import holdfast
from holdfast.core.digest import digest
from holdfast.core.plan import Part, boxes
from holdfast.core.records import Chunk, Leaf
from holdfast.errors import DamagedObject
from holdfast.manager import comparison, numbers
from holdfast.manager.comparison import Apart, Comparison
from holdfast.manager.listing import Listing
from tests.support.tilings import SHAPES, tilings

_count = 0


def compared(a: dict[str, Any], b: dict[str, Any], *, values: bool = False) -> Comparison:
    """Two states, saved in two runs from one state of the random generators."""
    global _count
    _count += 1
    names = [f"memory://compared-{_count}-{side}" for side in "ab"]
    generators = np.random.get_state(), torch.get_rng_state()
    for name, state in zip(names, (a, b), strict=True):
        with holdfast.CheckpointManager(name, clock=lambda: 1000.0) as manager:
            manager.save(1, state).result()
        np.random.set_state(generators[0])
        torch.set_rng_state(generators[1])
    with Listing(names[0]) as first, Listing(names[1]) as second:
        return first.compare(None, second, None, values=values)


def found(result: Comparison) -> list[tuple[str, str]]:
    return [(d.kind, d.path) for d in result.differences]


def test_equal_states_are_equal() -> None:
    state = {
        "model": {"w": np.arange(6.0), "nan": np.array([np.nan])},
        "list": [1, 2.5, "x", None, [np.zeros(2)]],
        "tuple": (1, (2, 3)),
        "deep": deque([OrderedDict(a=1)]),
        "nan": float("nan"),
    }
    result = compared(state, state)
    assert result.equal
    assert result.differences == ()
    assert (result.leaves, result.values) == (3, 11)
    assert [(p.name, p.leaves, p.equal) for p in result.parts] == [("model", 2, 2), ("list", 1, 1)]


@pytest.mark.parametrize(
    ("a", "b", "kind", "path"),
    [
        ({"x": np.zeros(3)}, {"x": np.ones(3)}, "values", "x"),
        ({"x": np.zeros(3)}, {"x": -np.zeros(3)}, "values", "x"),
        ({"x": np.zeros(3)}, {"x": np.zeros(4)}, "shape", "x"),
        ({"x": np.zeros(3)}, {"x": np.zeros(3, np.float32)}, "dtype", "x"),
        ({"x": np.zeros(2, complex)}, {"x": np.zeros((2, 16), np.uint8)}, "type", "x"),
        ({"x": np.zeros(3)}, {"x": torch.zeros(3, dtype=torch.float64)}, "type", "x"),
        ({"x": np.zeros(3)}, {"x": 3}, "type", "x"),
        ({"x": np.zeros(3)}, {}, "only a", "x"),
        ({}, {"x": np.zeros(3)}, "only b", "x"),
        ({"x": {"y": 1}}, {"x": {"y": 2}}, "value", "x/y"),
        ({"x": 1}, {"x": True}, "value", "x"),
        ({"x": 1}, {"x": 1.0}, "value", "x"),
        ({"x": 0.0}, {"x": -0.0}, "value", "x"),
        ({"x": {0: 1}}, {"x": {"0": 1}}, "only a", "x/[0]"),
        ({"x": [1, [2]]}, {"x": [1, [3]]}, "value", "x/1"),
        ({"x": [1, 2]}, {"x": (1, 2)}, "value", "x"),
        ({"x": {}}, {"x": []}, "value", "x"),
        ({"x": {}}, {"x": {"y": 1}}, "only a", "x"),
        ({"x": {"a": 1}}, {"x": OrderedDict(a=1)}, "only b", "x"),
        ({"x": "a" * 5000}, {"x": "a" * 4999 + "b"}, "values", "x"),
        ({"x": b"a" * 10}, {"x": b"b" * 10}, "value", "x"),
    ],
)
def test_each_kind_of_difference(a: Any, b: Any, kind: str, path: str) -> None:
    result = compared(a, b)
    assert not result.equal
    assert found(result)[0] == (kind, path)
    assert compared(b, a).equal is False
    assert compared(a, a).equal


def test_sharing_is_part_of_the_state() -> None:
    shared, other = [1, [2]], [1, [2]]
    assert compared({"a": shared, "b": shared}, {"a": shared, "b": shared}).equal
    result = compared({"a": shared, "b": shared}, {"a": shared, "b": other})
    assert not result.equal
    assert {path.partition("/")[0] for _, path in found(result)} == {"b"}
    # Numbers of what is shared shift when something is added before; that is no difference.
    more = [0, [9]]
    result = compared({"x": 1, "b": [shared, shared]}, {"x": [more, more], "b": [shared, shared]})
    assert {path.partition("/")[0] for _, path in found(result)} == {"x"}


def test_a_model_and_its_optimizer() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())

    def state() -> dict[str, Any]:
        return {"model": model, "optimizer": optimizer}

    def step() -> None:
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()

    step()
    assert compared(state(), state()).equal
    with holdfast.CheckpointManager("memory://model-and-optimizer", keep=None) as manager:
        generators = torch.get_rng_state()
        manager.save(1, state()).result()
        step()
        torch.set_rng_state(generators)
        manager.save(2, state()).result()
        result = manager.compare(1, manager, 2, values=True)
    assert not result.equal
    paths = {d.path for d in result.differences}
    assert "model/0.weight" in paths
    assert "optimizer/state/[0]/step" in paths
    assert "optimizer/state/[3]/exp_avg" in paths
    assert {d.section for d in result.differences} == {"state"}
    step_counter = next(d for d in result.differences if d.path == "optimizer/state/[0]/step")
    assert step_counter.apart == Apart(1, 1, 1.0, 0)


def test_random_states_and_position_count_and_the_rest_does_not() -> None:
    with holdfast.CheckpointManager(
        "memory://around", keep=None, config={"lr": 0.1}, environment={"host": "a"}
    ) as manager:
        manager.save(1, {"x": 1}, metrics={"loss": 1.0}, loop={"epoch": 1}, tags=["one"]).result()
        manager.save(1, {"x": 1}, metrics={"loss": 2.0}, loop={"epoch": 1}, tags=["two"]).result()
        manager.config, manager.environment = {"lr": 0.2}, {"host": "b"}
        manager.save(1, {"x": 1}, metrics={"acc": math.nan}, loop={"epoch": 1}).result()
        manager.tag("latest", "three")
        np.random.random()
        manager.save(1, {"x": 1}, loop={"epoch": 1}).result()
        manager.tag("latest", "four")
        manager.save(1, {"x": 1}, loop={"epoch": 2}, tags=["five"]).result()
        manager.save(2, {"x": 1}, loop={"epoch": 2}, tags=["six"]).result()

        def sections(a: str, b: str) -> list[tuple[str, str, str]]:
            result = manager.compare(a, manager, b)
            counted = [d for d in result.differences if d.section in comparison.COUNTED]
            assert result.equal == (not counted and "six" not in (a, b))
            return [(d.section, d.kind, d.path) for d in result.differences]

        assert sections("one", "two") == [("metrics", "value", "loss")]
        assert sections("two", "three") == [
            ("metrics", "only a", "loss"),
            ("metrics", "only b", "acc"),
            ("config", "value", "lr"),
            ("environment", "value", "host"),
        ]
        assert sections("three", "four") == [
            ("random states", "values", "numpy"),
            ("metrics", "only a", "acc"),
        ]
        assert sections("four", "five") == [("position", "value", "loop/epoch")]
        assert sections("five", "six") == []


def test_equal_tensors_are_not_read(tmp_path: Path) -> None:
    for name in "ab":
        with holdfast.CheckpointManager(tmp_path / name) as manager:
            manager.save(1, {"w": np.arange(1000.0), "x": np.arange(5) + (name == "b")}).result()
    for pack in (tmp_path / "a" / "packs").iterdir():
        data = pack.read_bytes()
        pack.chmod(0o644)
        pack.write_bytes(data.replace(np.arange(1000.0).tobytes(), bytes(8000)))
    with Listing(tmp_path / "a") as a, Listing(tmp_path / "b") as b:
        result = a.compare(None, b, None, values=True)
        assert [(d.kind, d.path) for d in result.differences if d.section == "state"] == [
            ("values", "x")
        ]
    for pack in (tmp_path / "a" / "packs").iterdir():
        pack.write_bytes(bytes(pack.stat().st_size))
    with Listing(tmp_path / "a") as a, Listing(tmp_path / "b") as b:
        assert not a.compare(None, b, None).equal
        with pytest.raises(DamagedObject):
            a.compare(None, b, None, values=True)


@pytest.mark.parametrize("cut", [8, 64, 1 << 10])
def test_leaves_that_were_cut_at_other_places_are_read(
    cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another version, or another number of processes, would cut them."""
    monkeypatch.setattr("holdfast.manager.cutting.boxes", _boxes_of(24))
    w = np.arange(100.0).reshape(10, 10)
    with holdfast.CheckpointManager(f"memory://cut-{cut}-a") as manager:
        manager.save(1, {"w": w}).result()
    monkeypatch.setattr("holdfast.manager.cutting.boxes", _boxes_of(cut))
    with holdfast.CheckpointManager(f"memory://cut-{cut}-b", keep=None) as manager:
        manager.save(1, {"w": w}).result()
        changed = w.copy()
        changed[9, 9] = 0
        manager.save(2, {"w": changed}).result()
    with Listing(f"memory://cut-{cut}-a") as a, Listing(f"memory://cut-{cut}-b") as b:
        assert not [d for d in a.compare(1, b, 1).differences if d.section == "state"]
        for values in (False, True):
            [different] = [
                d for d in a.compare(1, b, 2, values=values).differences if d.section == "state"
            ]
            assert different.kind == "values"
        assert different.apart == Apart(100, 1, 99.0, 0)


def test_equal_chunks_of_a_leaf_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.manager.cutting.boxes", _boxes_of(80))
    w = np.arange(1.0, 31.0)
    changed = w.copy()
    changed[-1] = 0
    for name, value in (("a", w), ("b", changed)):
        with holdfast.CheckpointManager(tmp_path / name) as manager:
            manager.save(1, {"w": value}).result()
    [pack] = (tmp_path / "a" / "packs").iterdir()
    data = pack.read_bytes()
    assert w[:10].tobytes() in data
    pack.chmod(0o644)
    pack.write_bytes(data.replace(w[:10].tobytes(), bytes(80)))
    with Listing(tmp_path / "a") as a, Listing(tmp_path / "b") as b:
        found = a.compare(None, b, None, values=True).differences
    assert [d.apart for d in found if d.section == "state"] == [Apart(30, 1, 30.0, 0)]


def _boxes_of(chunk_bytes: int) -> Any:
    return lambda shape, itemsize, _: boxes(shape, itemsize, chunk_bytes)


# -- numbers ----------------------------------------------------------------------

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.5], Apart(2, 1, 0.5, 0)),
        ([NAN, 1.0], [NAN, 1.5], Apart(2, 1, 0.5, 0)),
        ([NAN, 1.0], [0.0, 1.0], Apart(2, 1, 0.0, 1)),
        ([INF, 1.0], [-INF, 1.0], Apart(2, 1, 0.0, 0)),
        ([INF, 1.0], [INF, 3.0], Apart(2, 1, 2.0, 0)),
        ([0.0, 1.0], [-0.0, 1.0], Apart(2, 0, 0.0, 0)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_how_far_apart(a: Any, b: Any, expected: Apart, dtype: torch.dtype) -> None:
    result = compared(
        {"x": torch.tensor(a, dtype=dtype)}, {"x": torch.tensor(b, dtype=dtype)}, values=True
    )
    [difference] = result.differences
    assert difference.apart == expected


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (np.array([1, 5]), np.array([1, 2]), Apart(2, 1, 3.0, 0)),
        (np.array([True, False]), np.array([True, True]), Apart(2, 1, 1.0, 0)),
        (np.array([0], np.uint8), np.array([255], np.uint8), Apart(1, 1, 255.0, 0)),
        (np.array([0, 2**63], np.uint64), np.zeros(2, np.uint64), Apart(2, 1, 2.0**63, 0)),
        (np.array([1j, 2], np.complex64), np.array([1, 2], np.complex64), Apart(2, 1, 2**0.5, 0)),
        (np.array([1j, 2]), np.array([1, 2]) + 0j, Apart(2, 1, None, 0)),
        (np.array(["ab", "c"]), np.array(["ab", "d"]), Apart(2, 1, None, 0)),
        (np.zeros(3, "i4,f8"), np.array([(0, 0), (1, 2), (0, 3)], "i4,f8"), Apart(3, 2, None, 0)),
    ],
)
def test_other_types(a: Any, b: Any, expected: Apart) -> None:
    [difference] = compared({"x": a}, {"x": b}, values=True).differences
    assert difference.apart is not None
    assert difference.apart.largest == pytest.approx(expected.largest)
    assert (difference.apart.elements, difference.apart.differing) == (
        expected.elements,
        expected.differing,
    )


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("F8_E4M3", torch.float8_e4m3fn),
        ("F8_E5M2", torch.float8_e5m2),
        ("F8_E4M3FNUZ", torch.float8_e4m3fnuz),
        ("F8_E5M2FNUZ", torch.float8_e5m2fnuz),
        ("F8_E8M0", torch.float8_e8m0fnu),
    ],
)
def test_eight_bit_floats_as_pytorch_has_them(name: str, dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(dtype).to(torch.float32).numpy()
    ours = np.array([numbers.eight_bit_float(name, byte) for byte in range(256)], np.float32)
    np.testing.assert_array_equal(ours, every)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(SHAPES.filter(prod), st.integers(1, 700), st.data())
def test_any_two_ways_to_cut_a_leaf(shape: tuple[int, ...], most: int, data: st.DataObject) -> None:
    """Each item is compared with the one at its own place, however many stretches it takes."""
    one = np.arange(prod(shape), dtype=np.uint8).reshape(shape)
    other = one.copy()
    at = data.draw(st.integers(0, one.size - 1))
    other.reshape(-1)[at] ^= 1
    sides: list[Any] = []
    for array in (one, other):
        leaf, content = _leaf(array, data.draw(tilings(shape)))
        sides += [_Reader(content), leaf]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numbers, "CHUNK_BYTES", most)
        patch.setattr(numbers, "_ACROSS_BYTES", most)
        for numeric in (True, False):
            result = numbers.apart(*sides, numeric=numeric)
            assert result == Apart(one.size, 1, 1.0 if numeric else None, 0)


class _Reader:
    """Chunks out of memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, wanted: Any) -> None:
        for _, chunk, sink, _ in wanted:
            content = memoryview(self._data)[chunk.offset : chunk.offset + chunk.nbytes]
            sink(chunk.start, chunk.shape, content)


def _leaf(array: np.ndarray, parts: list[Part]) -> tuple[Leaf, bytes]:
    chunks: list[Chunk] = []
    content = b""
    for start, shape in parts:
        box = array[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))].tobytes()
        chunks.append(Chunk(start, shape, 0, len(content), len(box), digest(box)))
        content += box
    return Leaf("x", "U8", array.shape, tuple(chunks)), content
