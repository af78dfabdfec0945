from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.stores.base import Store
from holdfast.stores.local import LocalStore
from tests.stores.contract import StoreContract
from tests.support.crashfs import CrashFileSystem


class TestLocalStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return LocalStore(tmp_path / "runs" / "x")

    def reopen(self, store: Store) -> Store:
        return LocalStore(store.address)
