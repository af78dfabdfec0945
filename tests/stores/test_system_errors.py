"""What LocalStore says and does when the system lacks calls or they fail."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from typing import Any

import pytest

from holdfast.errors import (
    StoreError,
    StoreFull,
    StoreReadOnly,
    StoreUnavailable,
    StoreUnfit,
)
from holdfast.stores.base import Store
from holdfast.stores.filesystem import FileStatus, FileSystem
from holdfast.stores.local import LocalStore
from tests.stores.contract import listed
from tests.stores.crash_checks import DATA, KEY, OLD_KEY, ROOT, machine, must_be
from tests.support.crashfs import CrashFileSystem


def make(fs: FileSystem) -> Store:
    return LocalStore(ROOT, fs)


class Lacking(CrashFileSystem):
    """Calls that raise an errno whenever they are made."""

    def __init__(self, **lacking: int) -> None:
        super().__init__()
        self.lacking = lacking

    def _call(self, name: str, run: Callable[[], Any], *, can_fail: bool = True) -> Any:
        if name in self.lacking:
            raise OSError(self.lacking[name], os.strerror(self.lacking[name]))
        return super()._call(name, run, can_fail=can_fail)


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS])
def test_rename_stands_in_for_link(code: int) -> None:
    store = make(Lacking(link=code))
    store.prepare_writing()
    assert store.put_new(KEY, [DATA])
    assert not store.put_new(KEY, [b"second"])
    assert store.get(KEY, max_bytes=1 << 20) == DATA


@pytest.mark.parametrize(
    ("lacking", "says"),
    [
        ({"link": errno.EPERM, "rename_new": errno.EINVAL}, "only if it is absent"),
        ({"link": errno.ENOTSUP, "rename_new": errno.ENOSYS}, "only if it is absent"),
        ({"sync_folder": errno.EINVAL}, "cannot sync folders"),
        ({"link": errno.EXDEV}, "different file systems"),
    ],
)
def test_unfit_file_systems_are_refused(lacking: dict[str, int], says: str) -> None:
    store = make(Lacking(**lacking))
    with pytest.raises(StoreUnfit, match=says) as caught:
        store.prepare_writing()
    assert caught.value.hint
    with pytest.raises(StoreUnfit, match=says):
        store.put_new(KEY, [DATA])
    assert listed(store) == {}


class Replacing(CrashFileSystem):
    """A link that replaces what is there, as some network file systems had it."""

    def link(self, name: str, folder: int, new_name: str, new_folder: int) -> None:
        if new_name in self.scan(new_folder):
            self.unlink(new_name, new_folder)
        super().link(name, folder, new_name, new_folder)


def test_a_file_system_that_lets_both_writers_win_is_refused() -> None:
    with pytest.raises(StoreUnfit, match="must be created once"):
        make(Replacing()).prepare_writing()


def test_probing_leaves_no_files() -> None:
    fs = CrashFileSystem()
    make(fs).prepare_writing()
    assert [path for path in fs.files() if not path.endswith("/")] == []
    assert fs.open_descriptors == 0


def test_unlinking_the_temporary_may_fail() -> None:
    fs = Lacking(unlink=errno.EIO)
    assert make(fs).put_new(KEY, [DATA])
    assert listed(make(fs)) == {KEY: len(DATA)}


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOSPC, StoreFull),
        (errno.EDQUOT, StoreFull),
        (errno.EFBIG, StoreFull),
        (errno.EROFS, StoreReadOnly),
        (errno.EACCES, StoreReadOnly),
        (errno.EPERM, StoreReadOnly),
        (errno.EIO, StoreUnavailable),
        (errno.ESTALE, StoreUnavailable),
    ],
)
@pytest.mark.parametrize("call", ["open_folder", "create", "write", "sync_file", "make_folder"])
def test_errors_of_the_system(call: str, code: int, kind: type[StoreError]) -> None:
    store = make(Lacking(**{call: code}))
    with pytest.raises(kind) as caught:
        store.put_new(KEY, [DATA])
    assert type(caught.value) is kind
    assert KEY in str(caught.value)
    assert os.strerror(code) in str(caught.value)
    with pytest.raises(kind):
        store.prepare_writing()


@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS, errno.EINVAL, errno.EACCES])
def test_after_the_link_every_error_leaves_the_outcome_unknown(code: int) -> None:
    trial = machine(make)
    make(trial).put_new(KEY, [DATA])
    link = len(trial.history) - trial.history[::-1].index("link")
    assert trial.history[link] == "sync_folder"
    fs = machine(make)
    fs.fail_at = {link + 1: code}
    with pytest.raises(StoreUnavailable, match="could not be synced"):
        make(fs).put_new(KEY, [DATA])
    assert make(fs).get(KEY, max_bytes=1 << 20) == DATA


def test_space_is_reserved_and_its_lack_noticed_before_writing() -> None:
    fs = Lacking(allocate=errno.ENOSPC)
    with pytest.raises(StoreFull):
        make(fs).put_new(KEY, [bytes(2 << 20)])
    assert "write" not in fs.history
    fs = Lacking(allocate=errno.ENOTSUP)  # some cannot reserve, and need not
    assert make(fs).put_new(KEY, [bytes(2 << 20)])


@pytest.mark.parametrize(
    ("call", "reads"),
    [
        ("open_folder", ["get", "read_into", "size", "list"]),
        ("open_file", ["get", "read_into", "size"]),
        ("status", ["get", "read_into", "size"]),
        ("read", ["get"]),
        ("read_into", ["read_into"]),
        ("scan", ["list"]),
        ("status_of", ["list"]),
    ],
)
@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_a_disk_that_does_not_answer_is_not_an_empty_one(
    call: str, reads: list[str], code: int
) -> None:
    disk = Lacking()
    store = make(disk)
    store.put_new(OLD_KEY, [b"x"])
    disk.lacking = {call: code}
    calls: dict[str, Callable[[], object]] = {
        "get": lambda: store.get(OLD_KEY, max_bytes=100),
        "read_into": lambda: store.read_into(OLD_KEY, 0, memoryview(bytearray(1))),
        "size": lambda: store.size(OLD_KEY),
        "list": lambda: list(store.list("")),
    }
    for name in reads:
        with pytest.raises(StoreUnavailable):
            calls[name]()


# -- names that must be synced, and those that need not ------------------------------------


def test_a_link_made_by_a_call_that_was_sent_twice_is_ours() -> None:
    """NFS repeats a call whose reply was lost, and reports the first one's success."""
    trial = machine(make)
    make(trial).put_new(KEY, [DATA])
    link = len(trial.history) - trial.history[::-1].index("link")
    fs = machine(make)
    fs.fail_after = {link: errno.EEXIST}
    assert make(fs).put_new(KEY, [DATA]) is True
    must_be(fs, KEY, {DATA}, "after True")


def test_a_folder_that_is_made_again_is_synced_again() -> None:
    """Even where it gets the number of the one that is gone, as on ext4."""
    fs = machine(make)
    store = make(fs)
    assert store.put_new("packs/a", [DATA])
    run = fs._folder(fs.open_folder(ROOT))
    gone = run.names["packs"]
    for names in (run.names, run.synced):
        del names["packs"]
    fs._inodes = itertools.chain([gone.inode], fs._inodes)  # type: ignore[assignment]
    assert store.put_new("packs/b", [DATA])
    assert run.names["packs"].inode == gone.inode
    must_be(fs, "packs/b", {DATA}, "after True")


class Guarded(CrashFileSystem):
    """Folders above the store that we may not read, or that cannot be synced."""

    def __init__(self, *, unreadable: bool, last_inode: int = 3) -> None:
        super().__init__()
        self.last_inode = last_inode
        self.unreadable = unreadable
        self.guarded = False

    def open_folder(self, name: str, folder: int | None = None) -> int:
        if self.guarded and self.unreadable and name == "..":
            raise PermissionError(errno.EACCES, "Permission denied")
        return super().open_folder(name, folder)

    def sync(self, fd: int) -> None:
        if self.guarded and self._open[fd].inode <= self.last_inode:  # /, /data, /data/runs
            raise OSError(errno.EINVAL, "Invalid argument")
        super().sync(fd)


@pytest.mark.parametrize("unreadable", [True, False])
def test_old_folders_above_the_store_need_not_be_ours(unreadable: bool) -> None:
    fs = Guarded(unreadable=unreadable)
    for folder in ("/data", "/data/runs", ROOT):
        fs.make_folder(folder)
    fs.guarded = True
    make(fs).prepare_writing()
    assert make(fs).put_new(KEY, [DATA])


@pytest.mark.parametrize(("unreadable", "kind"), [(True, StoreReadOnly), (False, StoreUnfit)])
def test_new_folders_above_the_store_must_be_synced(
    unreadable: bool, kind: type[StoreError]
) -> None:
    fs = Guarded(unreadable=unreadable)
    for folder in ("/data", "/data/runs"):
        fs.make_folder(folder)
    fs.guarded = True
    with pytest.raises(kind):
        make(fs).put_new(KEY, [DATA])
    assert listed(make(fs)) == {}


def test_nothing_is_synced_beyond_a_mount_point() -> None:
    class Mounted(CrashFileSystem):
        def status(self, fd: int) -> FileStatus:
            found = super().status(fd)
            return found._replace(device=99) if found.inode == 1 else found

        def sync(self, fd: int) -> None:
            assert self._open[fd].inode != 1, "synced another disk"
            super().sync(fd)

    fs = Mounted()
    fs.make_folder("/data")
    assert make(fs).put_new(KEY, [DATA])


def test_only_folders_with_new_ones_in_them_must_be_synced() -> None:
    fs = Guarded(unreadable=False, last_inode=2)  # / and /data cannot, /data/runs can
    for folder in ("/data", "/data/runs"):
        fs.make_folder(folder)
    fs.guarded = True
    assert make(fs).put_new(KEY, [DATA])


def test_folders_are_synced_once() -> None:
    """Afterwards an object costs two syncs: its own and its folder's."""
    fs = CrashFileSystem()
    store = make(fs)
    store.put_new("log/1", [b"x"])
    before = len(fs.history)
    store.put_new("log/2", [b"x"])
    calls = [call for call in fs.history[before:] if call.startswith("sync")]
    assert calls == ["sync_file", "sync_folder"]
