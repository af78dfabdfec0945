from __future__ import annotations

import pytest

from holdfast.stores.base import Store
from holdfast.stores.memory import MemoryStore
from holdfast.stores.open import open_store
from tests.stores.contract import ANY, StoreContract, fresh, listed


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return MemoryStore()


class TestNamedMemoryStore(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return open_store(f"memory://{fresh()}")

    def reopen(self, store: Store) -> Store:
        return open_store(store.address)


class TestMemoryStoreBelowAnother(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        above = fresh()
        open_store(f"memory://{above}").put_new("other", [b"never listed below"])
        return open_store(f"memory://{above}/runs/x")

    def reopen(self, store: Store) -> Store:
        return open_store(store.address)


def test_names_are_shared_and_nested() -> None:
    name = fresh()
    assert open_store(f"memory://{name}/runs/x").put_new("log/1", [b"1"])
    assert listed(open_store(f"memory://{name}")) == {"runs/x/log/1": 1}
    assert open_store(f"memory://{name}/runs").get("x/log/1", max_bytes=ANY) == b"1"
    assert listed(open_store(f"memory://{fresh()}")) == {}


def test_unnamed_stores_are_apart() -> None:
    one, other = MemoryStore(), MemoryStore()
    one.put_new("a", [b"x"])
    assert listed(other) == {}
