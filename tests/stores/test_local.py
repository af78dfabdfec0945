"""LocalStore on the real file system of this machine."""

from __future__ import annotations

import logging
import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from holdfast.errors import (
    BadAddress,
    DamagedObject,
    ObjectNotFound,
    StoreUnavailable,
    StoreUnfit,
)
from holdfast.stores.base import BadKey, Store
from holdfast.stores.filesystem import OsFileSystem
from holdfast.stores.local import LocalStore
from tests.stores.contract import ANY, StoreContract, listed


class TestLocalStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return LocalStore(tmp_path / "runs" / "x")

    def reopen(self, store: Store) -> Store:
        return LocalStore(store.address)


class RenamesOnly(OsFileSystem):
    """What a file system without hard links does, with the kernel's own rename."""

    def link(self, name: str, folder: int, new_name: str, new_folder: int) -> None:
        raise PermissionError(1, "Operation not permitted")


class TestLocalStoreWithoutLinks(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return LocalStore(tmp_path / "x", RenamesOnly())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folder of a store with two objects."""
    store = LocalStore(tmp_path / "run")
    store.put_new("log/1", [b"entry"])
    store.put_new("packs/a", [b"pack"])
    return tmp_path / "run"


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"))


# -- files -----------------------------------------------------------------------------------


def test_objects_are_plain_files(root: Path) -> None:
    assert (root / "packs/a").read_bytes() == b"pack"
    assert stat.S_ISREG((root / "packs/a").lstat().st_mode)
    assert (root / "packs/a").stat().st_nlink == 1
    assert list((root / "tmp").iterdir()) == []


def test_reading_needs_no_folder_and_makes_none(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "absent" / "run")
    assert listed(store) == {}
    with pytest.raises(ObjectNotFound):
        store.get("log/1", max_bytes=ANY)
    store.delete(["log/1"])
    assert store.remove_debris() == 0
    assert list(tmp_path.iterdir()) == []


def test_deleting_keeps_the_folders(root: Path) -> None:
    LocalStore(root).delete(["log/1", "packs/a"])
    assert sorted(path.name for path in root.iterdir()) == ["log", "packs", "tmp"]


def test_no_descriptor_stays_open(root: Path) -> None:
    store = LocalStore(root)
    before = open_descriptors()
    store.put_new("log/2", [b"x"])
    assert not store.put_new("log/2", [b"x"])
    for key in ("log/2", "absent", "absent/too", "log"):
        for read in (store.size, store.settle, lambda key: store.get(key, max_bytes=0)):
            with pytest.raises((ObjectNotFound, DamagedObject)) if key != "log/2" else nothing():
                read(key) if read != store.get else None
    next(iter(store.list("")))
    store.prepare_writing()
    store.remove_debris()
    store.delete(["log/2", "absent/too"])
    assert open_descriptors() == before
