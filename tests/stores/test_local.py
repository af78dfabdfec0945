"""LocalStore on the real file system of this machine."""

from __future__ import annotations

import errno
import gc
import logging
import os
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from holdfast.core import process
from holdfast.core.records import Holder
from holdfast.errors import (
    BadAddress,
    DamagedObject,
    ObjectNotFound,
    StoreUnavailable,
    StoreUnfit,
)
from holdfast.stores.base import BadKey, Store
from holdfast.stores.filesystem import FileStatus, OsFileSystem
from holdfast.stores.local import LocalStore
from holdfast.stores.unfinished import is_temporary, owner_of, temporary_name
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
    gc.collect()  # what earlier tests have left is not closed meanwhile
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
    assert store.put_new("log/2", [b"x"])
    assert not store.put_new("log/2", [b"x"])
    store.settle("log/2")
    for key in ("absent", "absent/too", "log", "log/1/x"):
        with pytest.raises(ObjectNotFound):
            store.get(key, max_bytes=ANY)
        with pytest.raises(ObjectNotFound):
            store.settle(key)
    with pytest.raises(DamagedObject):
        store.get("log/1", max_bytes=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OsFileSystem, "link", refuse)
        patch.setattr(OsFileSystem, "rename_new", refuse)
        with pytest.raises(StoreUnfit):
            store.prepare_writing()
    next(store.list(""))  # a listing that nobody finishes
    store.prepare_writing()
    store.remove_debris()
    store.delete(["log/2", "absent/too"])
    assert open_descriptors() == before


def refuse(*arguments: object) -> None:
    raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))


def test_names_that_are_no_keys_are_left_out(root: Path) -> None:
    for name in [".hidden", "with space", "ü", "a:b", "-x", "a\nb"]:
        (root / "packs" / name).write_bytes(b"x")
    Path(os.fsdecode(os.fsencode(root) + b"/packs/\xff")).write_bytes(b"x")
    (root / ".git").mkdir()
    (root / ".git" / "config").write_bytes(b"x")
    assert set(listed(LocalStore(root))) == {"log/1", "packs/a"}


def test_listing_ends_in_a_folder_without_end(root: Path) -> None:
    at = os.open(root, os.O_RDONLY)
    for _ in range(100):
        os.mkdir("d" * 100, dir_fd=at)
        below = os.open("d" * 100, os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(os.open("file", os.O_CREAT, dir_fd=at))
    os.close(at)
    assert set(listed(LocalStore(root))) == {"log/1", "packs/a"}


@pytest.mark.parametrize("path", ["file", "file/below", "file/below/deeper"])
def test_a_file_is_no_store(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_bytes(b"x")
    store = LocalStore(tmp_path / path)
    calls: list[Callable[[], object]] = [
        lambda: list(store.list("")),
        lambda: store.get("log/1", max_bytes=ANY),
        lambda: store.put_new("log/1", [b"x"]),
        lambda: store.delete(["log/1"]),
        store.prepare_writing,
    ]
    for call in calls:
        with pytest.raises(BadAddress, match="is a file"):
            call()


def test_a_folder_that_vanishes_is_made_again(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "runs/x")
    store.put_new("packs/a", [b"x"])
    (tmp_path / "runs/x/packs/a").unlink()
    (tmp_path / "runs/x/packs").rmdir()
    assert store.put_new("packs/b", [b"x"])
    assert listed(store) == {"packs/b": 1}


# -- what is not a file ----------------------------------------------------------------------


def reads(store: Store, key: str) -> list[Callable[[], object]]:
    return [
        lambda: store.get(key, max_bytes=ANY),
        lambda: store.read_into(key, 0, memoryview(bytearray(1))),
        lambda: store.size(key),
        lambda: store.settle(key),
    ]


def test_the_root_may_be_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    store = LocalStore(tmp_path / "link")
    store.prepare_writing()
    assert store.put_new("log/2", [b"x"])
    assert set(listed(store)) == {"log/1", "log/2", "packs/a"}
    assert (root / "log/2").exists()


@pytest.mark.parametrize("path", ["link", "link/runs", "link/runs/x"])
def test_a_root_that_leads_nowhere_is_not_an_empty_store(tmp_path: Path, path: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "not mounted")
    store = LocalStore(tmp_path / path)
    for call in [
        *reads(store, "log/1"),
        lambda: list(store.list("")),
        lambda: store.put_new("log/1", [b"x"]),
        store.prepare_writing,
    ]:
        with pytest.raises(StoreUnavailable, match="link to a folder that is absent"):
            call()


def test_linked_objects_are_not_followed(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"do not read me")
    (root / "log/2").symlink_to(secret)
    (root / "log/3").symlink_to("1")  # nor inside the store
    store = LocalStore(root)
    for key in ("log/2", "log/3"):
        for read in reads(store, key):
            with pytest.raises(DamagedObject, match="link"):
                read()
        assert not store.put_new(key, [b"x"])
    with caplog.at_level(logging.WARNING, logger="holdfast"):
        assert set(listed(store, "log/")) == {"log/1"}
    assert "log/2" in caplog.text
    store.delete(["log/2", "log/3"])
    assert secret.read_bytes() == b"do not read me"
    assert not (root / "log/2").is_symlink()
    assert store.get("log/1", max_bytes=ANY) == b"entry"


def test_linked_folders_are_not_followed(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a").write_bytes(b"keep")
    (root / "manifests").symlink_to(outside)
    store = LocalStore(root)
    for call in [
        *reads(store, "manifests/a"),
        lambda: list(store.list("manifests/")),
        lambda: store.delete(["manifests/a"]),
    ]:
        with pytest.raises(DamagedObject, match="manifests/ is damaged: it is a symbolic link"):
            call()
    with pytest.raises(StoreUnfit, match="symbolic link") as caught:
        store.put_new("manifests/b", [b"x"])
    assert caught.value.hint
    assert set(listed(store)) == {"log/1", "packs/a"}
    assert [path.name for path in outside.iterdir()] == ["a"]


def test_a_linked_tmp_is_not_followed(root: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (root / "tmp").rmdir()
    (root / "tmp").symlink_to(tmp_path / "outside")
    store = LocalStore(root)
    for call in (lambda: store.put_new("log/2", [b"x"]), store.prepare_writing):
        with pytest.raises(StoreUnfit, match="symbolic link"):
            call()
    assert set(listed(store)) == {"log/1", "packs/a"}


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_pipes_and_sockets_are_no_objects(
    root: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root / "packs")  # a socket's path may have 108 bytes only
    if kind == "pipe":
        os.mkfifo("odd")
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("odd")
    store = LocalStore(root)
    for read in reads(store, "packs/odd"):  # and none waits for a writer
        with pytest.raises(DamagedObject):
            read()
    assert set(listed(store, "packs/")) == {"packs/a"}


def test_a_file_that_gets_shorter_while_it_is_read(root: Path) -> None:
    class Shrinking(OsFileSystem):
        def status(self, fd: int) -> FileStatus:
            found = super().status(fd)
            return found._replace(size_bytes=found.size_bytes + 1)

    store = LocalStore(root, Shrinking())
    with pytest.raises(DamagedObject, match="ends at byte 5 of 6"):
        store.get("log/1", max_bytes=ANY)
    with pytest.raises(DamagedObject, match="ends at byte 5, before byte 6"):
        store.read_into("log/1", 0, memoryview(bytearray(6)))


# -- unfinished files --------------------------------------------------------------------------


def temporary_of(owner: Holder, root: Path, *, age_s: float = 0) -> Path:
    path = root / "tmp" / temporary_name(owner)
    path.write_bytes(b"half of an obj")
    then = time.time() - age_s
    os.utime(path, (then, then))
    return path


def test_unfinished_files_are_no_objects(root: Path) -> None:
    path = temporary_of(process.current(), root)
    store = LocalStore(root)
    assert set(listed(store)) == {"log/1", "packs/a"}
    assert set(listed(LocalStore(root.parent))) == {"run/log/1", "run/packs/a"}
    key = f"tmp/{path.name}"
    for call in [
        *reads(store, key),
        lambda: store.put_new(key, [b"x"]),
        lambda: store.delete([key]),
    ]:
        with pytest.raises(BadKey):
            call()


def test_a_run_may_be_called_tmp(tmp_path: Path) -> None:
    LocalStore(tmp_path / "tmp").put_new("log/1", [b"x"])
    assert listed(LocalStore(tmp_path)) == {"tmp/log/1": 1}


DAY_S = 24 * 3600


def test_debris_of_dead_processes_is_removed(root: Path) -> None:
    me = process.current()
    replace = msgspec.structs.replace
    odd_host = replace(me, host="other-host.example")
    dead = [
        temporary_of(replace(me, started="1"), root),  # our pid, in an earlier life
        temporary_of(replace(me, pid=2**22 + 1), root),  # above the kernel's largest pid
        temporary_of(replace(me, boot="0" * 8), root, age_s=2 * 3600),
        temporary_of(odd_host, root, age_s=DAY_S + 60),
        temporary_of(replace(me, namespace="1"), root, age_s=DAY_S + 60),
    ]
    alive = [
        temporary_of(me, root, age_s=30 * DAY_S),
        temporary_of(replace(me, boot="0" * 8), root),  # perhaps another machine of our name
        temporary_of(odd_host, root, age_s=DAY_S - 60),
        temporary_of(replace(me, namespace="1"), root, age_s=DAY_S - 60),
    ]
    (root / "tmp" / "notes.txt").write_bytes(b"somebody's")
    (root / "tmp" / "folder").mkdir()
    dead[0].with_name(dead[0].name[:-16] + "0123456789abcdef").mkdir()
    store = LocalStore(root)
    assert store.remove_debris() == len(dead)
    assert not any(path.exists() for path in dead)
    assert all(path.exists() for path in alive)
    assert (root / "tmp" / "notes.txt").exists()
    assert store.remove_debris() == 0
    assert set(listed(store)) == {"log/1", "packs/a", "tmp/notes.txt"}


@pytest.mark.parametrize(
    "host", ["a-b-1-2-3", "über host", "x" * 300, "", "h/../../x", "0-0-0-0-0"]
)
def test_a_temporary_names_its_owner(host: str) -> None:
    me = msgspec.structs.replace(process.current(), host=host)
    name = temporary_name(me)
    assert is_temporary(f"tmp/{name}")
    assert len(name) < 255
    assert "/" not in name
    owner = owner_of(name, me)
    assert owner is not None
    assert (owner.host, owner.boot, owner.namespace) == (me.host, me.boot, me.namespace)
    assert (owner.pid, owner.started) == (me.pid, me.started)


def test_a_writer_in_the_middle_is_left_alone(root: Path) -> None:
    """Its temporary is there, and `remove_debris` of another thread keeps it."""
    seen: list[int] = []

    class Watched(OsFileSystem):
        def link(self, name: str, folder: int, new_name: str, new_folder: int) -> None:
            seen.append(len(list((root / "tmp").iterdir())))
            assert LocalStore(root).remove_debris() == 0
            super().link(name, folder, new_name, new_folder)

    assert LocalStore(root, Watched()).put_new("log/2", [b"x"])
    assert seen == [1]
    assert list((root / "tmp").iterdir()) == []


@pytest.mark.parametrize("call", ["write", "sync", "link"])
def test_an_interrupted_write_cleans_up(root: Path, call: str) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    store = LocalStore(root)
    store.put_new("packs/b", [b"x"])  # its folder is known: the next sync is the file's
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OsFileSystem, call, interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.put_new("packs/c", [b"x"])
    assert list((root / "tmp").iterdir()) == []
    assert set(listed(store)) == {"log/1", "packs/a", "packs/b"}


# -- the calls themselves ----------------------------------------------------------------------


def test_rename_new_of_this_kernel(tmp_path: Path) -> None:
    fs = OsFileSystem()
    folder = fs.open_folder(str(tmp_path))
    try:
        (tmp_path / "a").write_bytes(b"a")
        (tmp_path / "b").write_bytes(b"b")
        with pytest.raises(FileExistsError):
            fs.rename_new("a", folder, "b", folder)
        assert (tmp_path / "b").read_bytes() == b"b"
        fs.rename_new("a", folder, "c", folder)
        assert (tmp_path / "c").read_bytes() == b"a"
        assert not (tmp_path / "a").exists()
        with pytest.raises(FileNotFoundError):
            fs.rename_new("a", folder, "d", folder)
    finally:
        fs.close(folder)


def test_allocate_sets_the_size(tmp_path: Path) -> None:
    fs = OsFileSystem()
    folder = fs.open_folder(str(tmp_path))
    fd = fs.create("a", folder)
    try:
        fs.allocate(fd, 3 << 20)
        assert fs.status(fd).size_bytes == 3 << 20
        assert os.fstat(fd).st_blocks * 512 >= 3 << 20
    finally:
        fs.close(fd)
        fs.close(folder)


def test_descriptors_are_not_inherited(tmp_path: Path) -> None:
    fs = OsFileSystem()
    folder = fs.open_folder(str(tmp_path))
    fd = fs.create("a", folder)
    again = fs.open_file("a", folder)
    for each in (folder, fd, again):
        assert not os.get_inheritable(each)
        fs.close(each)
    fs.close(again)  # never fails
