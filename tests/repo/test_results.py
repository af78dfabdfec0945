"""One object per result: what is in it, and what happens when it is damaged."""

from __future__ import annotations

import datetime
import json
from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import holdfast
from holdfast.core.calls import Call
from holdfast.core.digest import digest
from holdfast.errors import DamagedObject, FormatTooNew, ObjectNotFound, UnsupportedValue
from holdfast.repo import results
from holdfast.repo.results_list import Summary, summary
from holdfast.stores.base import Store
from holdfast.stores.local import LocalStore
from holdfast.stores.memory import MemoryStore
from tests.core.exactness import assert_exact

CALL = Call("prep:tokens", digest(b"arguments"), digest(b"code"))
KEY = results.key_of(CALL)

Pair = namedtuple("Pair", "left right")


def put(store: Store, value: Any, call: Call = CALL) -> bool:
    encoded = results.encode(value)
    try:
        return results.put(store, call, encoded, time_s=1.0, took_s=2.0)
    finally:
        encoded.close()


def value() -> dict[str, Any]:
    base = np.arange(30, dtype=np.float32)
    shared = [1, 2]
    return {
        "plain": [None, True, 2**70, 0.1, -0.0, 1 + 2j, "ü" * 5000, b"\0" * 5000],
        "arrays": [base[:10], base[5:15], np.asfortranarray(np.ones((3, 4))), np.zeros((0, 3))],
        "shared": [shared, shared],
        "scalar": np.float16(1.5),
        "numbers": [float(n) for n in range(5000)],
        "ordered": OrderedDict(b=1, a=2),
        "pair": Pair(1, (2, {3})),
        "when": datetime.date(2026, 1, 2),
        "path": Path("a/b"),
    }


@pytest.fixture(params=["memory", "local"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return MemoryStore("results") if request.param == "memory" else LocalStore(tmp_path / "run")


def test_a_value_comes_back_exactly(store: Store) -> None:
    assert put(store, value())
    found = results.stored(store, KEY, CALL)
    assert_exact(found.value(), value(), "result")
    again = found.value()
    assert again["shared"][0] is again["shared"][1]
    assert np.shares_memory(again["arrays"][0], again["arrays"][1])
    assert (found.result.function, found.result.time_s, found.result.took_s) == (
        "prep:tokens",
        1.0,
        2.0,
    )


def test_large_values_come_in_blocks(store: Store) -> None:
    generator = np.random.default_rng(0)
    large: dict[str, Any] = {
        "odd": generator.bytes(4097),
        "large": generator.random((1_300_000, 2)),  # 20.8 MB: three chunks, not at a block's start
        "transposed": generator.random((700, 900)).T,
        "small": np.arange(3),
    }
    assert put(store, large)
    found = results.stored(store, KEY, CALL)
    assert found.nbytes > 2 * results.WHOLE_BYTES
    assert_exact(found.value(), large, "result")
    found.verify()
    assert summary(store).count == 1


def test_it_is_a_safetensors_file(tmp_path: Path) -> None:
    put(LocalStore(tmp_path), {"w": np.ones((2, 3)), "b": [np.arange(4, dtype=np.int16)]})
    arrays = load_file(tmp_path / KEY)
    assert sorted(arrays) == ["result/b/0", "result/w"]
    assert arrays["result/w"].shape == (2, 3)


def test_the_first_one_stays(store: Store) -> None:
    assert put(store, "first")
    assert not put(store, "second")
    assert results.stored(store, KEY, CALL).value() == "first"


def test_there_is_none(store: Store) -> None:
    with pytest.raises(ObjectNotFound):
        results.stored(store, KEY, CALL)
    assert summary(store) == Summary(0, 0)


@pytest.mark.parametrize("part", [object(), {"f": lambda: 1}, [1, [object()]]])
def test_what_cannot_be_stored_is_named(part: Any) -> None:
    with pytest.raises(UnsupportedValue, match="result"):
        results.encode({"part": part})


def test_what_would_come_back_as_something_else_is_refused() -> None:
    class Module:
        def state_dict(self) -> dict[str, int]:
            return {"w": 1}

        def load_state_dict(self, state: dict[str, int]) -> None: ...

    with pytest.raises(UnsupportedValue, match="Module") as error:
        results.encode([Module()])
    assert "state_dict()" in error.value.hint
    with pytest.raises(UnsupportedValue):
        results.encode({"deep": ({"m": Module()},)})


def test_a_file_comes_back_as_a_stored_one(tmp_path: Path) -> None:
    file = tmp_path / "vocabulary.txt"
    file.write_text("a b c")
    store = MemoryStore("results")
    put(store, {"file": holdfast.File(file), "count": 3})
    file.unlink()
    found = results.stored(store, KEY, CALL).value()
    assert found["count"] == 3
    found["file"].copy_to(tmp_path / "again.txt")
    assert (tmp_path / "again.txt").read_text() == "a b c"


def test_every_flipped_bit_is_seen() -> None:
    store = MemoryStore("results")
    put(store, {"a": np.arange(40), "b": "x"})
    data = store.get(KEY, max_bytes=1 << 20)
    stored = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert stored["__metadata__"]["holdfast.result"]
    wrong: list[int] = []
    for at in range(0, len(data), 3):
        spoiled = bytearray(data)
        spoiled[at] ^= 1 << at % 8
        other = MemoryStore("spoiled")
        other.put_new(KEY, [spoiled])
        try:
            results.stored(other, KEY, CALL).verify()
        except (DamagedObject, FormatTooNew):
            continue
        wrong.append(at)
    assert wrong == []


@pytest.mark.parametrize("length", [0, 7, 100, 4096, -1])
def test_what_is_cut_off_or_longer_is_seen(length: int) -> None:
    store = MemoryStore("results")
    put(store, np.arange(40))
    data = store.get(KEY, max_bytes=1 << 20)
    for spoiled in (data[:length], data + b"\0" * 8):
        other = MemoryStore("spoiled")
        other.put_new(KEY, [spoiled])
        with pytest.raises(DamagedObject):
            results.stored(other, KEY, CALL).verify()
        assert [error.key for error in results.damaged(other)] == [KEY]


def test_another_call_s_result_is_not_taken() -> None:
    store = MemoryStore("results")
    put(store, 1)
    other = Call("prep:other", CALL.arguments, CALL.code)
    store.put_new(results.key_of(other), [store.get(KEY, max_bytes=1 << 20)])
    with pytest.raises(DamagedObject, match="another call"):
        results.stored(store, results.key_of(other), other)
    twin = CALL._replace(arguments=CALL.arguments[:32] + "0" * 32)
    with pytest.raises(DamagedObject, match="cut to the same key"):
        results.stored(store, results.key_of(twin), twin)
