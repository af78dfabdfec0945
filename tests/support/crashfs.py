"""A disk in memory that forgets what was not synced.

`CrashFileSystem` is a `FileSystem` that keeps, per file, the content as last synced
and each block written since; per folder, the names as last synced and each change
since. `crash_states` yields the disks that a loss of power now could leave:

- of the unsynced blocks of a file any subset is there, each whole or torn; what is
  missing reads as zeros, as old content or as garbage, and the file may be short;
- of the unsynced changes to a folder any subset is there, in order. The two halves
  of a rename are two changes. A synced file without its name is gone.

This is harsher than any one file system: what survives here survives on all of them.
It can also stop at any call (the process is gone, the disk is not), fail calls with
an errno and write fewer bytes than it was asked to. Every call is counted.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar, cast

from holdfast.stores.faulty import Died
from holdfast.stores.filesystem import FileStatus
from tests.support.crash_states import (
    BLOCK_BYTES,
    File,
    Folder,
    choices,
    variants,
)

_T = TypeVar("_T")

_DEVICE = 7


class CrashFileSystem:
    """See the module. `before`, if given, is called with (number, name) of each call."""

    def __init__(
        self,
        *,
        stop_at: int | None = None,
        fail_at: Mapping[int, int] | None = None,
        fail_after: Mapping[int, int] | None = None,
        max_write_bytes: int | None = None,
        before: Callable[[int, str], None] | None = None,
    ) -> None:
        self.calls = 0
        """How many calls were made."""
        self.history: list[str] = []
        self.stop_at = stop_at
        """The call that finds the process gone, and all later ones."""
        self.fail_at = dict(fail_at or {})
        """Call -> errno: it fails and has no effect."""
        self.fail_after = dict(fail_after or {})
        """Call -> errno: it fails although it had its effect."""
        self.max_write_bytes = max_write_bytes
        self.before = before
        self._lock = threading.RLock()
        self._inodes = itertools.count(2)
        self._fds = itertools.count(100)
        self._open: dict[int, File | Folder] = {}
        self._root = Folder(1, None)

    @property
    def open_descriptors(self) -> int:
        return len(self._open)

    def restart(self) -> None:
        """A new process on the same machine: the disk and its cache stay as they are."""
        self.stop_at = None
        self.fail_at, self.fail_after = {}, {}
        self.before = None
        self._open.clear()

    # -- FileSystem ------------------------------------------------------------------

    def open_folder(self, name: str, folder: int | None = None) -> int:
        def run() -> int:
            node = self._find(name, folder)
            if not isinstance(node, Folder):
                raise _error(errno.ENOTDIR, name)
            return self._descriptor(node)

        return self._call("open_folder", run)

    def open_file(self, name: str, folder: int) -> int:
        return self._call("open_file", lambda: self._descriptor(self._find(name, folder)))

    def create(self, name: str, folder: int) -> int:
        def run() -> int:
            node = File(next(self._inodes))
            self._add(name, self._folder(folder), node)
            return self._descriptor(node)

        return self._call("create", run)

    def open_to_write(self, name: str, folder: int) -> int:
        def run() -> int:
            if name not in self._folder(folder).names:
                self._add(name, self._folder(folder), File(next(self._inodes)))
            return self._descriptor(self._find(name, folder))

        return self._call("open_to_write", run)

    def close(self, fd: int) -> None:
        self._call("close", lambda: self._open.pop(fd), can_fail=False)

    def write(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        def run() -> int:
            data = b"".join(buffers)[: self.max_write_bytes]
            self._write(self._file(fd), offset, data)
            return len(data)

        return self._call("write", run)

    def read(self, fd: int, nbytes: int, offset: int) -> bytes:
        return self._call("read", lambda: bytes(self._file(fd).content[offset : offset + nbytes]))

    def read_into(self, fd: int, into: memoryview, offset: int, *, cached: bool = False) -> int:
        data = self._call(
            "read_into", lambda: bytes(self._file(fd).content[offset : offset + into.nbytes])
        )
        into.cast("B")[: len(data)] = data
        return len(data)

    def allocate(self, fd: int, nbytes: int) -> None:
        def run() -> None:
            node = self._file(fd)
            node.content.extend(bytes(max(0, nbytes - len(node.content))))
            node.size = max(node.size, nbytes)

        self._call("allocate", run)

    def truncate(self, fd: int, nbytes: int) -> None:
        def run() -> None:
            node = self._file(fd)
            del node.content[nbytes:]
            node.content.extend(bytes(nbytes - len(node.content)))

        self._call("truncate", run)

    def direct(self, fd: int, on: bool) -> None:
        """What was written directly is not safe before a sync either: the drive has a cache."""
        self._call("direct", lambda: self._file(fd))

    def sync(self, fd: int) -> None:
        node = self._open[fd]
        name = "sync_file" if isinstance(node, File) else "sync_folder"
        try:
            self._call(name, lambda: self._sync(node))
        except OSError:
            if isinstance(node, File):
                node.lost = True
            raise

    def status(self, fd: int) -> FileStatus:
        return self._call("status", lambda: _status(self._open[fd]))

    def status_of(self, name: str, folder: int | None = None) -> FileStatus:
        return self._call("status_of", lambda: _status(self._find(name, folder)))

    def scan(self, folder: int) -> list[str]:
        return self._call("scan", lambda: list(self._folder(folder).names))

    def make_folder(self, name: str, folder: int | None = None) -> None:
        def run() -> None:
            above, last = self._place(name, folder)
            self._add(last, above, Folder(next(self._inodes), above))

        self._call("make_folder", run)

    def link(self, name: str, folder: int, new_name: str, new_folder: int) -> None:
        self._call(
            "link",
            lambda: self._add(new_name, self._folder(new_folder), self._find(name, folder)),
        )

    def rename_new(self, name: str, folder: int, new_name: str, new_folder: int) -> None:
        def run() -> None:
            self._add(new_name, self._folder(new_folder), self._find(name, folder))
            self._remove(name, self._folder(folder))

        self._call("rename_new", run)

    def replace(self, name: str, folder: int, new_name: str, new_folder: int) -> None:
        """rename(2): not in `FileSystem`, for stores that are wrong on purpose."""

        def run() -> None:
            target = self._folder(new_folder)
            node = self._find(name, folder)
            target.names[new_name] = node
            target.changes.append((new_name, node))
            self._remove(name, self._folder(folder))

        self._call("replace", run)

    def unlink(self, name: str, folder: int) -> None:
        def run() -> None:
            if isinstance(self._find(name, folder), Folder):
                raise _error(errno.EISDIR, name)
            self._remove(name, self._folder(folder))

        self._call("unlink", run)

    # -- how it works ----------------------------------------------------------------

    def _call(self, name: str, run: Callable[[], _T], *, can_fail: bool = True) -> _T:
        with self._lock:
            self.calls += 1
            number = self.calls
            self.history.append(name)
            if self.stop_at is not None and number >= self.stop_at:
                raise Died(f"before call {number}: {name}")
            if self.before:
                self.before(number, name)
            if can_fail and number in self.fail_at:
                raise _error(self.fail_at[number], name)
            result = run()
            if can_fail and number in self.fail_after:
                raise _error(self.fail_after[number], name)
            return result

    def _descriptor(self, node: File | Folder) -> int:
        fd = next(self._fds)
        self._open[fd] = node
        return fd

    def _file(self, fd: int) -> File:
        node = self._open.get(fd)
        if not isinstance(node, File):
            raise _error(errno.EBADF, str(fd))
        return node

    def _folder(self, fd: int) -> Folder:
        node = self._open.get(fd)
        if not isinstance(node, Folder):
            raise _error(errno.EBADF, str(fd))
        return node

    def _place(self, name: str, folder: int | None) -> tuple[Folder, str]:
        """(the folder that holds it, its last segment) of a name as `FileSystem` has it."""
        if folder is not None:
            assert "/" not in name, name
            return self._folder(folder), name
        assert name.startswith("/"), name
        at = self._root
        *above, last = name.strip("/").split("/")
        for segment in above:
            below = at.names.get(segment)
            if below is None:
                raise _error(errno.ENOENT, name)
            if not isinstance(below, Folder):
                raise _error(errno.ENOTDIR, name)
            at = below
        return at, last

    def _find(self, name: str, folder: int | None) -> File | Folder:
        above, last = self._place(name, folder)
        if last == "":
            return self._root
        if last == "..":
            return above.parent or above
        if last not in above.names:
            raise _error(errno.ENOENT, name)
        return above.names[last]

    def _add(self, name: str, folder: Folder, node: File | Folder) -> None:
        if name in folder.names:
            raise _error(errno.EEXIST, name)
        folder.names[name] = node
        folder.changes.append((name, node))

    def _remove(self, name: str, folder: Folder) -> None:
        if folder.names.pop(name, None) is None:
            raise _error(errno.ENOENT, name)
        folder.changes.append((name, None))

    def _write(self, node: File, offset: int, data: bytes) -> None:
        content = node.content
        content.extend(bytes(max(0, offset + len(data) - len(content))))
        content[offset : offset + len(data)] = data
        node.size = max(node.size, len(content))
        at = 0
        while at < len(data):
            take = BLOCK_BYTES - (offset + at) % BLOCK_BYTES
            node.writes.append((offset + at, data[at : at + take]))
            at += take

    def _sync(self, node: File | Folder) -> None:
        if isinstance(node, Folder):
            node.synced = dict(node.names)
            node.changes = []
        elif not node.lost:
            node.synced = bytes(node.content)
            node.size = len(node.synced)
            node.writes = []

    # -- the power fails ---------------------------------------------------------------

    def crash_states(self, limit: int = 200, seed: int = 0) -> Iterator[CrashFileSystem]:
        """Disks that a loss of power now could leave, each a new file system.

        All of them, no two alike, if they are at most `limit`; else that many: nothing
        unsynced is there, all of it, each variant of one file or folder with all or
        nothing of the others, then chance (always the same for one `seed`).
        """
        with self._lock:
            nodes = self._nodes()
            chance = random.Random(seed)
            left = [variants(node, chance) for node in nodes]
            numbers = {node.inode: at for at, node in enumerate(nodes)}
            # Where the names in each variant of each folder lead.
            below = [
                [
                    [
                        numbers[node.inode]
                        for node in cast("dict[str, File | Folder]", names).values()
                    ]
                    for names in found
                ]
                if isinstance(node, Folder)
                else None
                for node, found in zip(nodes, left, strict=True)
            ]
            seen, tried = set[object](), set[frozenset[tuple[int, int]]]()
            for choice in choices([len(found) for found in left], limit, chance):
                # Most choices differ in nothing that has a name: that is told before a copy.
                named, pending = set[tuple[int, int]](), [0]
                while pending:
                    at = pending.pop()
                    named.add((at, choice[at]))
                    if (variant := below[at]) is not None:
                        pending += variant[choice[at]]
                if (key := frozenset(named)) in tried:
                    continue
                tried.add(key)
                picked = {
                    node.inode: found[index]
                    for node, found, index in zip(nodes, left, choice, strict=True)
                }
                disk = CrashFileSystem()
                copies: dict[int, File | Folder] = {}
                disk._root = disk._copy(self._root, None, picked, copies)  # type: ignore[assignment]
                print_of_disk = tuple(sorted(disk.files().items()))
                if print_of_disk in seen:
                    continue
                seen.add(print_of_disk)
                yield disk
                if len(seen) >= limit:
                    return

    def files(self) -> dict[str, bytes | None]:
        """Path -> content of everything on the disk; folders are None."""
        found: dict[str, bytes | None] = {}

        def walk(folder: Folder, path: str) -> None:
            for name, node in folder.names.items():
                if isinstance(node, File):
                    found[f"{path}/{name}"] = bytes(node.content)
                else:
                    found[f"{path}/{name}/"] = None
                    walk(node, f"{path}/{name}")

        walk(self._root, "")
        return found

    def _nodes(self) -> list[File | Folder]:
        """Everything that any state of the disk can name."""
        found: dict[int, File | Folder] = {}
        pending: list[File | Folder | None] = [self._root]
        while pending:
            node = pending.pop()
            if node is None or node.inode in found:
                continue
            found[node.inode] = node
            if isinstance(node, Folder):
                pending += [*node.synced.values(), *(now for _, now in node.changes)]
        return list(found.values())

    def _copy(
        self,
        node: File | Folder,
        parent: Folder | None,
        picked: Mapping[int, object],
        copies: dict[int, File | Folder],
    ) -> File | Folder:
        if node.inode in copies:
            return copies[node.inode]
        state = picked[node.inode]
        inode = 1 if parent is None else next(self._inodes)
        if isinstance(node, File):
            assert isinstance(state, bytes)
            copies[node.inode] = File(inode, bytearray(state), state, size=len(state))
        else:
            assert isinstance(state, dict)
            folder = copies[node.inode] = Folder(inode, parent)
            for name, below in state.items():
                folder.names[name] = self._copy(below, folder, picked, copies)
            folder.synced = dict(folder.names)
        return copies[node.inode]


def _status(node: File | Folder) -> FileStatus:
    if isinstance(node, File):
        return FileStatus(_DEVICE, node.inode, stat.S_IFREG | 0o644, len(node.content), 0.0)
    return FileStatus(_DEVICE, node.inode, stat.S_IFDIR | 0o755, 0, 0.0)


def _error(code: int, name: str) -> OSError:
    return OSError(code, os.strerror(code), name)
