"""Objects that are kept nearby, too: whatever is wrong there, the store is the far one."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from holdfast.errors import StoreUnavailable
from holdfast.stores.base import Store
from holdfast.stores.faulty import Effect, Fault, FaultPlan, FaultyStore
from holdfast.stores.local import LocalStore
from holdfast.stores.memory import MemoryStore
from holdfast.stores.tiered import TieredStore
from tests.stores.contract import StoreContract


class TestTieredStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return TieredStore(LocalStore(tmp_path / "near"), MemoryStore(), "")


class TestTieredStoreWhoseNearOneFails(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        near = FaultyStore(MemoryStore(), FaultPlan((Fault(Effect.FAIL, times=None),)))
        return TieredStore(near, MemoryStore(), "")


def read(store: Store, key: str, nbytes: int) -> bytes:
    data = bytearray(nbytes)
    store.read_into(key, 0, memoryview(data))
    return bytes(data)


def put(store: Store, key: str, data: bytes) -> None:
    made = store.create(key, at_most_bytes=1 << 20)
    made.write(0, memoryview(data))
    assert made.publish(len(data))
    made.discard()


def test_what_is_below_the_prefix_is_kept_near_and_read_there() -> None:
    near, far = MemoryStore(), MemoryStore()
    store = TieredStore(near, far, "packs/")
    assert store.put_new("packs/a", [b"one"])
    put(store, "packs/b", b"two")
    assert store.put_new("log/a", [b"three"])
    put(store, "other/b", b"four")
    assert sorted(info.key for info in near.list("")) == ["packs/a", "packs/b"]
    assert len(list(far.list(""))) == 4
    far.delete(["packs/a", "packs/b"])
    assert (read(store, "packs/a", 3), read(store, "packs/b", 3)) == (b"one", b"two")


def test_what_is_not_near_is_read_far() -> None:
    near, far = MemoryStore(), MemoryStore()
    store = TieredStore(near, far, "packs/")
    far.put_new("packs/a", [b"whole"])
    near.put_new("packs/a", [b"who"])  # torn by a power loss
    assert read(store, "packs/a", 5) == b"whole"
    far.put_new("packs/b", [b"far"])
    assert read(store, "packs/b", 3) == b"far"


def test_what_is_damaged_near_is_read_far_and_goes() -> None:
    near, far = MemoryStore(), MemoryStore()
    store = TieredStore(near, far, "packs/")
    far.put_new("packs/a", [b"right"])
    near.put_new("packs/a", [b"wrong"])
    data = bytearray(5)
    store.read_far("packs/a", 0, memoryview(data))
    assert data == b"right"
    assert read(store, "packs/a", 5) == b"right"
    assert not list(near.list(""))


def test_a_full_disk_is_said_once_and_fails_nothing(caplog: pytest.LogCaptureFixture) -> None:
    near = FaultyStore(MemoryStore(), FaultPlan((Fault(Effect.FAIL, times=None),)))
    store = TieredStore(near, MemoryStore(), "packs/")
    with caplog.at_level(logging.WARNING):
        for number in range(3):
            assert store.put_new(f"packs/{number}", [b"data"])
            put(store, f"packs/{number}b", b"data")
    assert len(caplog.messages) == 1
    assert "are not kept in memory://" in caplog.text
    assert read(store, "packs/2b", 4) == b"data"


def test_nothing_is_kept_that_is_not_in_the_far_one() -> None:
    near = MemoryStore()
    far = FaultyStore(MemoryStore(), FaultPlan((Fault(Effect.FAIL, times=None),)))
    store = TieredStore(near, far, "packs/")
    with pytest.raises(StoreUnavailable):
        store.put_new("packs/a", [b"data"])
    with pytest.raises(StoreUnavailable):
        put(store, "packs/b", b"data")
    assert not list(near.list(""))


def test_what_is_being_written_is_not_trimmed() -> None:
    near = MemoryStore()
    store = TieredStore(near, MemoryStore(), "packs/")
    for name in ("old", "kept", "next"):
        store.put_new(f"packs/{name}", [b"data"])

    def trim(*wanted: str) -> list[str]:
        store.trim({f"packs/{name}" for name in wanted})
        return sorted(info.key.removeprefix("packs/") for info in near.list(""))

    assert trim("kept") == ["kept", "next", "old"]
    assert trim("kept", "next") == ["kept", "next"]
    assert trim("next") == ["kept", "next"]
    assert trim("next") == ["next"]
