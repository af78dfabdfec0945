"""Files and folders as part of a state: copied when saved, copies when restored.

    manager.save(step, {"booster": File("model.ubj"), "tokenizer": Directory("tok/")})
    manager.restore({"booster": File("model.ubj"), "tokenizer": Directory("tok/")})

Saving copies a file at capture, or reads it where it is (`core.file_copies`). Permission bits
are kept; times, owners and extended attributes are not. Inside a Directory, a symbolic link
that is relative and stays inside is kept as a link; any other is refused, or stored as what
it points to with `follow_links=True`. Restoring writes a copy beside the target, syncs it
and renames it into place; a file that has only grown since is cut back instead
(`core.stored`).
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import PurePosixPath

from holdfast.core.adapters import Encoder
from holdfast.core.file_copies import FileCopies
from holdfast.core.types import Node
from holdfast.errors import StateError, UnsupportedValue

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


def encode_file(value: File, path: str, encoder: Encoder, copies: FileCopies) -> Node:
    """The node of a File, with the bytes that it has now."""
    return {**_file(value.path, path, encoder, copies), "name": _name(value.path)}


def _name(path: str) -> str:
    return os.path.basename(os.path.abspath(path)).encode("utf-8", "replace").decode()


def _file(name: str, path: str, encoder: Encoder, copies: FileCopies) -> dict[str, Node]:
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
        return {"!": "file", "leaf": encoder.leaf(copies.take(fd, name, path), path), "mode": mode}
    finally:
        os.close(fd)


def _not_a_file(path: str, name: str, mode: int) -> UnsupportedValue:
    kind = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}.get(
        stat.S_IFMT(mode), "device"
    )
    hint = "Use holdfast.Directory(path)." if kind == "folder" else "Only regular files are saved."
    return UnsupportedValue(path, f"{kind}: {name!r}", hint=hint)


def encode_directory(value: Directory, path: str, encoder: Encoder, copies: FileCopies) -> Node:
    """The node of a Directory, names in sorted order, empty folders included."""
    if not os.path.isdir(value.path):
        raise StateError(f"cannot save {path!r}: no folder {value.path!r}", hint="Check the path.")
    node = _folder(value.path, value.follow_links, path, (), encoder, copies)
    return {**node, "name": _name(value.path)}


def _folder(
    folder: str,
    follow: bool,
    path: str,
    around: tuple[tuple[int, int], ...],
    encoder: Encoder,
    copies: FileCopies,
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
        except UnicodeEncodeError:
            raise StateError(
                f"cannot save {inner!r}: its name is not valid UTF-8", hint="Rename it."
            ) from None
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
            nodes.append([entry.name, _folder(entry.path, follow, inner, around, encoder, copies)])
        else:
            nodes.append([entry.name, _file(entry.path, inner, encoder, copies)])
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
