"""Files and folders coming back: into a live target's path, or when asked for.

Names and links were written by others: they are checked again here, and nothing is
written outside the target. A copy is written beside the target under a temporary
name, synced, and renamed into place by the finishers. Only where the target starts with
the very bytes of the copy (a log that has grown since) it is cut back in place instead:
a program that has it open for appending goes on in the file that it sees.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from holdfast.core.containers import items_of
from holdfast.core.file_copies import same_start
from holdfast.core.files import MAX_LEVELS, Directory, File, link_stays_inside
from holdfast.core.leaves import BufferDestination
from holdfast.core.process import pid_exists
from holdfast.core.types import Node
from holdfast.core.values import kind_name, malformed
from holdfast.errors import StateError

if TYPE_CHECKING:
    from holdfast.core.decode import Fetch, TreeDecoder

_MAX_NAME_BYTES = 255  # ext4, XFS, APFS, NTFS
_NO_FETCH = "Open the checkpoint with load(), or give the restore a holdfast.File(path) to fill."


# -- temporary names ----------------------------------------------------------------

_HOST = hashlib.blake2s(socket.gethostname().encode(), digest_size=4).hexdigest()
_TEMPORARY = re.compile(rf"\..*\.{_HOST}-(\d+)-[0-9a-f]{{8}}\.holdfast")


def _temporary(target: str) -> str:
    """A new name beside `target`. It says which process made it, so that a later
    restore can remove what a killed one left."""
    folder, name = os.path.split(os.path.abspath(target))
    short = name.encode()[:100].decode("utf-8", "ignore")
    return os.path.join(folder, f".{short}.{_HOST}-{os.getpid()}-{secrets.token_hex(4)}.holdfast")


def _remove_leftovers(target: str) -> None:
    """Remove temporary copies beside `target` whose process died on this machine."""
    folder, name = os.path.split(os.path.abspath(target))
    short = name.encode()[:100].decode("utf-8", "ignore")
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for entry in names:
        match = _TEMPORARY.fullmatch(entry)
        if match and entry.startswith(f".{short}.{_HOST}-") and not pid_exists(int(match[1])):
            _remove(os.path.join(folder, entry))


def _remove(path: str) -> None:
    try:
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.unlink(path)
    except OSError:
        pass  # it is gone, or only in the way


def _sync_folder(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# -- writing --------------------------------------------------------------------------


class FileDestination:
    """A `U8` leaf goes into a new file; see `adapters.Destination`. The file is created
    at the first write, so that a refused restore leaves nothing."""

    def __init__(self, path: str, mode: int, prepare: Callable[[], None]) -> None:
        """`prepare` makes the folder that the file goes into."""
        self.path = path
        self._mode = mode
        self._prepare = prepare
        self._fd: int | None = None
        self._lock = threading.Lock()

    def write(self, start: Sequence[int], shape: Sequence[int], data: memoryview) -> None:
        fd = self._open()
        done = 0
        while done < len(data):
            done += os.pwrite(fd, data[done:], start[0] + done)

    def _open(self) -> int:
        with self._lock:
            if self._fd is None:
                self._prepare()
                # O_EXCL | O_NOFOLLOW: never through something that is there already.
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
                self._fd = os.open(self.path, flags, 0o600)
            return self._fd

    def finish(self) -> None:
        """Durable under its temporary name, with its permissions."""
        fd = self._open()
        os.fchmod(fd, self._mode)
        os.fsync(fd)
        self.close()

    def close(self) -> None:
        with self._lock:
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None


# -- plans: what a node describes, checked -----------------------------------------------


class StoredFile:
    """A file of a checkpoint that was opened without a target for it.

    `read()` and `copy_to(path)` fetch its bytes, verified, when they are called.
    """

    def __init__(self, name: str, leaf: int, nbytes: int, mode: int, fetch: Fetch | None) -> None:
        self.name = name
        self.nbytes = nbytes
        self.mode = mode
        self._leaf = leaf
        self._fetch = fetch

    def __repr__(self) -> str:
        return f"StoredFile({self.name!r}, {self.nbytes} bytes)"

    def read(self) -> bytes:
        """All its bytes."""
        buffer = bytearray(self.nbytes)
        destination = BufferDestination(buffer)
        _fetch(self._fetch, [(self._leaf, destination)])
        destination.release()
        return bytes(buffer)

    def copy_to(self, path: str | os.PathLike[str]) -> None:
        """Write it to `path`, replacing a file that is there, atomically and durably."""
        target = _Placed(self, os.fspath(path))
        try:
            _fetch(self._fetch, target.requests)
            target.finish()
        except BaseException:
            target.discard()
            raise

    def place(self, path: str, prepare: Callable[[], None]) -> tuple[int, FileDestination]:
        """A request for its bytes, into a new file at `path`."""
        return self._leaf, FileDestination(path, self.mode, prepare)


class StoredDirectory:
    """A folder of a checkpoint that was opened without a target for it."""

    def __init__(
        self, name: str, mode: int, entries: dict[str, StoredFile | StoredDirectory | str]
    ) -> None:
        """`entries`: files, folders, and links (a link is its target)."""
        self.name = name
        self.mode = mode
        self.entries = entries
        self.fetch: Fetch | None = None

    def __repr__(self) -> str:
        return f"StoredDirectory({self.name!r}, {len(self.entries)} entries)"

    def files(self) -> Iterator[tuple[str, StoredFile]]:
        """(relative path, file) of every file in it, in order."""
        for name, entry in self.entries.items():
            if isinstance(entry, StoredFile):
                yield name, entry
            elif isinstance(entry, StoredDirectory):
                for inner, file in entry.files():
                    yield f"{name}/{inner}", file

    def __getitem__(self, path: str) -> StoredFile | StoredDirectory:
        """The file or folder at a relative path."""
        entry: StoredFile | StoredDirectory | str = self
        for name in path.split("/"):
            if not isinstance(entry, StoredDirectory) or name not in entry.entries:
                raise KeyError(path)
            entry = entry.entries[name]
        if isinstance(entry, str):
            raise KeyError(path)
        return entry

    def copy_to(self, path: str | os.PathLike[str]) -> None:
        """Write it to `path`, replacing the folder that is there."""
        target = _Placed(self, os.fspath(path))
        try:
            if target.requests:
                _fetch(self.fetch, target.requests)
            target.finish()
        except BaseException:
            target.discard()
            raise


def _fetch(fetch: Fetch | None, requests: list[tuple[int, Any]]) -> None:
    if fetch is None:
        raise StateError("the bytes of this file were not read", hint=_NO_FETCH)
    fetch(requests)


class _Placed:
    """A file or folder on its way to `path`: requests, then `finish` or `discard`."""

    def __init__(self, content: StoredFile | StoredDirectory, path: str) -> None:
        self._content = content
        self._path = path
        self._temporary = _temporary(path)
        self._destinations: list[FileDestination] = []
        self._prepared = False
        self._lock = threading.Lock()
        self.requests: list[tuple[int, Any]] = []
        files = [("", content)] if isinstance(content, StoredFile) else content.files()
        for name, file in files:
            inner = os.path.join(self._temporary, name) if name else self._temporary
            leaf, destination = file.place(inner, self._prepare)
            self._destinations.append(destination)
            self.requests.append((leaf, destination))

    def _prepare(self) -> None:
        """Before the first byte comes, from whichever thread brings it."""
        with self._lock:
            if not self._prepared:
                os.makedirs(os.path.dirname(self._temporary), exist_ok=True)
                _remove_leftovers(self._path)
                if isinstance(self._content, StoredDirectory):
                    _make_folders(self._content, self._temporary)
                self._prepared = True

    def finish(self) -> None:
        """Everything is written: sync it and put it in place."""
        parent = os.path.dirname(self._temporary)
        if isinstance(self._content, StoredFile):
            if os.path.isdir(self._path):
                raise StateError(f"cannot restore a file to {self._path!r}: it is a folder")
            self._destinations[0].finish()
            if _cut_back(self._path, self._temporary):
                os.unlink(self._temporary)
            else:
                os.replace(self._temporary, self._path)
        else:
            self._prepare()
            for destination in self._destinations:
                destination.finish()
            _seal_folders(self._content, self._temporary)
            self._swap()
        _sync_folder(parent)

    def _swap(self) -> None:
        if not os.path.lexists(self._path):
            os.rename(self._temporary, self._path)
            return
        if os.path.islink(self._path) or not os.path.isdir(self._path):
            raise StateError(
                f"cannot restore a folder to {self._path!r}: something else is there",
                hint="Remove it, or choose another path.",
            )
        old = _temporary(self._path)
        os.rename(self._path, old)
        os.rename(self._temporary, self._path)
        _remove(old)

    def discard(self) -> None:
        for destination in self._destinations:
            destination.close()
        _remove(self._temporary)


def _cut_back(path: str, copy: str) -> bool:
    """Make the file at `path` what `copy` is, in place, if it has only grown since.

    At every moment it starts with the bytes of `copy`, so a crash does no harm.
    """
    try:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        fd = os.open(path, flags)
    except OSError:
        return False  # not there, a link, or not ours to write
    source = os.open(copy, os.O_RDONLY | os.O_CLOEXEC)
    try:
        there, wanted = os.fstat(fd), os.fstat(source)
        # Under its other names a file stays what it is.
        if not stat.S_ISREG(there.st_mode) or there.st_nlink != 1:
            return False
        if there.st_size < wanted.st_size or not same_start(fd, source, wanted.st_size):
            return False
        os.ftruncate(fd, wanted.st_size)
        if stat.S_IMODE(there.st_mode) != stat.S_IMODE(wanted.st_mode):
            os.fchmod(fd, stat.S_IMODE(wanted.st_mode))
        os.fsync(fd)
        return True
    finally:
        os.close(source)
        os.close(fd)


def _make_folders(folder: StoredDirectory, path: str) -> None:
    os.mkdir(path, 0o700)
    for name, entry in folder.entries.items():
        if isinstance(entry, StoredDirectory):
            _make_folders(entry, os.path.join(path, name))


def _seal_folders(folder: StoredDirectory, path: str) -> None:
    """Links, permissions and a sync, from the inside out."""
    for name, entry in folder.entries.items():
        inner = os.path.join(path, name)
        if isinstance(entry, StoredDirectory):
            _seal_folders(entry, inner)
        elif isinstance(entry, str):
            os.symlink(entry, inner)
    # Its owner must be able to replace it at the next restore.
    os.chmod(path, folder.mode | 0o700)
    _sync_folder(path)


# -- nodes -----------------------------------------------------------------------------


def decode_file(decoder: TreeDecoder, node: dict[str, Node], target: object, path: str) -> Any:
    file = _file(decoder, node, path)
    return _into(decoder, file, File, node, target, path)


def decode_directory(decoder: TreeDecoder, node: dict[str, Node], target: object, path: str) -> Any:
    folder = _folder(decoder, node, path, 0)
    folder.fetch = decoder.fetch
    return _into(decoder, folder, Directory, node, target, path)


def _into(
    decoder: TreeDecoder,
    content: StoredFile | StoredDirectory,
    kind: type[File] | type[Directory],
    node: dict[str, Node],
    target: object,
    path: str,
) -> Any:
    if isinstance(target, File | Directory):
        if not isinstance(target, kind):
            decoder.changed(path, f"a {kind.__name__}", kind_name(target))
            return target
        placed = _Placed(content, target.path)
        for leaf, destination in placed.requests:
            decoder.request(leaf, destination)
        decoder.on_discard(placed.discard)
        decoder.finish(placed.finish)
        return target
    return content


def _mode(node: dict[str, Node], path: str) -> int:
    mode = node.get("mode")
    if type(mode) is not int or not 0 <= mode <= 0o777:
        raise malformed(path, "its permissions are malformed")
    return mode


def _file(decoder: TreeDecoder, node: dict[str, Node], path: str) -> StoredFile:
    leaf = cast(Any, node.get("leaf"))
    dtype, shape = decoder.spec(leaf)
    if dtype != "U8" or len(shape) != 1:
        raise malformed(path, "its leaf is no file")
    return StoredFile(_name(node), leaf, shape[0], _mode(node, path), decoder.fetch)


def _name(node: dict[str, Node]) -> str:
    """What it was called, for people and as a name to copy it to."""
    name = node.get("name")
    return cast(str, name) if is_safe_name(name) else ""


def _folder(decoder: TreeDecoder, node: dict[str, Node], path: str, level: int) -> StoredDirectory:
    if level > MAX_LEVELS:
        raise malformed(path[:200], "its folders are nested too deeply")
    entries: dict[str, StoredFile | StoredDirectory | str] = {}
    seen: set[str] = set()
    for pair in items_of(node, path):
        if not isinstance(pair, list) or len(cast(list[Node], pair)) != 2:
            raise malformed(path, "an entry is malformed")
        name, inner = cast(list[Node], pair)
        if not is_safe_name(name):
            raise malformed(path, f"{str(name)[:80]!r} is no file name")
        if name in seen:
            raise malformed(path, f"{name!r} is there twice")
        seen.add(name)
        at = f"{path}/{name}"
        tagged = cast(dict[str, Node], inner) if isinstance(inner, dict) else {}
        match tagged.get("!"):
            case "file":
                entries[name] = _file(decoder, tagged, at)
            case "dir":
                entries[name] = _folder(decoder, tagged, at, level + 1)
            case "link" if isinstance(tagged.get("v"), str) and link_stays_inside(
                tagged["v"], level
            ):
                entries[name] = tagged["v"]
            case _:
                raise malformed(at, "it is neither a file, nor a folder, nor a link inside")
    return StoredDirectory(_name(node), _mode(node, path), entries)


def is_safe_name(name: object) -> bool:
    """Whether this is the name of an entry of a folder, and nothing else.

    >>> [is_safe_name(name) for name in ("a.txt", "..", "a/b", "", "nul\\0")]
    [True, False, False, False, False]
    """
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
        return False
    if os.name == "nt" and (Path(name).name != name or ":" in name):
        return False
    try:
        return len(name.encode()) <= _MAX_NAME_BYTES
    except UnicodeEncodeError:
        return False
