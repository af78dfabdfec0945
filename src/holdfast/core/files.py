"""Files and folders as part of a state: streamed when saved, copies when restored.

    manager.save(step, {"booster": File("model.ubj"), "tokenizer": Directory("tok/")})
    manager.restore({"booster": File("model.ubj"), "tokenizer": Directory("tok/")})

Saving opens a file at capture and reads it in the background; if it changed until
then, the save fails. Permission bits are kept; times, owners and extended attributes
are not. Inside a Directory, a symbolic link that is relative and stays inside is kept
as a link; any other is refused, or stored as what it points to with
`follow_links=True`. Restoring writes a copy beside the target, syncs it and renames it
into place.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import PurePosixPath

from holdfast.core import arrays
from holdfast.core.adapters import Encoder
from holdfast.core.types import KiB, Node
from holdfast.errors import StateError, UnsupportedValue

SMALL_BYTES = 64 * KiB  # read at capture: cheaper than holding a descriptor
MAX_OPEN = 64  # held by one save; beyond it files are opened when read and must be the same
MAX_LEVELS = 64


@dataclass(frozen=True)
class File:
    """A file that belongs to the state.

    >>> File("model.ubj").path
    'model.ubj'
    """

    path: str

    def __init__(self, path: str | os.PathLike[str]) -> None:
        object.__setattr__(self, "path", os.fspath(path))


@dataclass(frozen=True)
class Directory:
    """A folder that belongs to the state, with everything in it."""

    path: str
    follow_links: bool = False

    def __init__(self, path: str | os.PathLike[str], *, follow_links: bool = False) -> None:
        object.__setattr__(self, "path", os.fspath(path))
        object.__setattr__(self, "follow_links", follow_links)


_Identity = tuple[int, int, int, int, int]


def _identity(status: os.stat_result) -> _Identity:
    return (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


def _same(now: os.stat_result, then: os.stat_result) -> bool:
    """Whether an open file still has the content that it had then."""
    if now.st_nlink != then.st_nlink:
        # Another file was renamed over it, or it was linked elsewhere: that alone
        # changes ctime, and does no harm.
        return _identity(now)[:4] == _identity(then)[:4]
    return _identity(now) == _identity(then)


class OpenFiles:
    """The descriptors that one save holds."""

    def __init__(self) -> None:
        self.count = 0


class FileSource:
    """A file's bytes, read while the save goes on; see `adapters.LeafSource`."""

    dtype = "U8"
    streamed = True

    def __init__(self, name: str, fd: int, status: os.stat_result, held: OpenFiles) -> None:
        """Takes over `fd`; keeps it open only while few are."""
        self._name = name
        self._status = status
        self._held = held
        self._fd: int | None = fd
        self.nbytes = status.st_size
        self.shape: tuple[int, ...] = (self.nbytes,)
        if held.count >= MAX_OPEN:
            os.close(fd)
            self._fd = None
        else:
            held.count += 1
        self._counted = self._fd is not None

    def copy_range(self, offset: int, into: memoryview) -> None:
        fd = self._open()
        done = 0
        while done < len(into):
            count = os.preadv(fd, [into[done:]], offset + done)
            if count == 0:
                raise self._changed()
            done += count

    def close(self) -> None:
        if self._fd is None and self.nbytes == 0:
            return
        try:
            unchanged = _same(os.fstat(self._open()), self._status)
        finally:
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None
                if self._counted:
                    self._held.count -= 1
                    self._counted = False
        if not unchanged:
            raise self._changed()

    def _open(self) -> int:
        if self._fd is None:
            try:
                fd = os.open(self._name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except OSError as error:
                raise self._changed() from error
            if _identity(os.fstat(fd)) != _identity(self._status):
                os.close(fd)
                raise self._changed()
            self._fd = fd
        return self._fd

    def _changed(self) -> StateError:
        return StateError(
            f"file {self._name!r} changed while it was being saved",
            hint="Write it under another name and rename it, or save after it is complete.",
        )


def encode_file(value: File, path: str, encoder: Encoder, held: OpenFiles) -> Node:
    """The node of a File. Opens it now: later renames over it do no harm."""
    return {**_file(value.path, path, encoder, held), "name": _name(value.path)}


def _name(path: str) -> str:
    return os.path.basename(os.path.abspath(path)).encode("utf-8", "replace").decode()


def _file(name: str, path: str, encoder: Encoder, held: OpenFiles) -> dict[str, Node]:
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise StateError(f"cannot save {path!r}: {error}", hint="Check the path.") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise _not_a_file(path, name, status.st_mode)
        mode = stat.S_IMODE(status.st_mode) & 0o777
        if status.st_size <= SMALL_BYTES:
            data = _read_small(fd, status, name)
            os.close(fd)
            return {"!": "file", "leaf": encoder.leaf(arrays.BytesSource(data), path), "mode": mode}
    except BaseException:
        os.close(fd)
        raise
    source = FileSource(name, fd, status, held)
    return {"!": "file", "leaf": encoder.leaf(source, path), "mode": mode}


def _read_small(fd: int, status: os.stat_result, name: str) -> bytes:
    data = b""
    while len(data) <= status.st_size:
        part = os.read(fd, status.st_size - len(data) + 1)
        if not part:
            break
        data += part
    if len(data) != status.st_size or _identity(os.fstat(fd)) != _identity(status):
        raise StateError(
            f"file {name!r} changed while it was being saved",
            hint="Write it under another name and rename it, or save after it is complete.",
        )
    return data


def _not_a_file(path: str, name: str, mode: int) -> UnsupportedValue:
    kind = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}.get(
        stat.S_IFMT(mode), "device"
    )
    hint = "Use holdfast.Directory(path)." if kind == "folder" else "Only regular files are saved."
    return UnsupportedValue(path, f"{kind}: {name!r}", hint=hint)


def encode_directory(value: Directory, path: str, encoder: Encoder, held: OpenFiles) -> Node:
    """The node of a Directory, names in sorted order, empty folders included."""
    if not os.path.isdir(value.path):
        raise StateError(f"cannot save {path!r}: no folder {value.path!r}", hint="Check the path.")
    node = _folder(value.path, value.follow_links, path, (), encoder, held)
    return {**node, "name": _name(value.path)}


def _folder(
    folder: str,
    follow: bool,
    path: str,
    around: tuple[tuple[int, int], ...],
    encoder: Encoder,
    held: OpenFiles,
) -> dict[str, Node]:
    """`around`: (device, inode) of the folders that this one is in."""
    level = len(around)
    if level > MAX_LEVELS:
        raise StateError(
            f"cannot save {path[:200]!r}: folders are nested more than {MAX_LEVELS} levels deep",
            hint="Save an archive of it as one File.",
        )
    nodes: list[Node] = []
    try:
        status = os.stat(folder)
        mode = stat.S_IMODE(status.st_mode) & 0o777
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise StateError(f"cannot save {path!r}: {error}", hint="Check the folder.") from error
    identity = (status.st_dev, status.st_ino)
    if identity in around:
        raise StateError(
            f"cannot save {path!r}: a link leads to a folder around it", hint="Remove the link."
        )
    around = (*around, identity)
    for entry in entries:
        inner = f"{path}/{entry.name}"
        try:
            entry.name.encode()
        except UnicodeEncodeError as error:
            raise StateError(
                f"cannot save {inner!r}: its name is not valid UTF-8", hint="Rename it."
            ) from error
        if entry.is_symlink() and not follow:
            target = os.readlink(entry.path)
            if not link_stays_inside(target, level):
                raise UnsupportedValue(
                    inner,
                    f"symbolic link to {target!r}, outside its folder",
                    hint="Directory(path, follow_links=True) stores what links point to.",
                )
            nodes.append([entry.name, {"!": "link", "v": target}])
        elif entry.is_dir():
            nodes.append([entry.name, _folder(entry.path, follow, inner, around, encoder, held)])
        else:
            nodes.append([entry.name, _file(entry.path, inner, encoder, held)])
    return {"!": "dir", "v": nodes, "mode": mode}


def link_stays_inside(target: str, level: int) -> bool:
    """Whether a link `level` folders below the root cannot leave the root.

    Only leading ".." are allowed: after a name, which may be a link itself, ".." could
    lead anywhere. By induction no chain of such links leaves.

    >>> link_stays_inside("../a", 1), link_stays_inside("../a", 0), link_stays_inside("a/../..", 2)
    (True, False, False)
    """
    try:
        target.encode()
    except UnicodeEncodeError:
        return False
    parts = PurePosixPath(target).parts
    if not parts or target.startswith("/") or "\0" in target or len(target) > 4096:
        return False
    ups = next((index for index, part in enumerate(parts) if part != ".."), len(parts))
    return ups <= level and ".." not in parts[ups:]
