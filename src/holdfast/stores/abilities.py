"""What the file system below a local store can do, found out by trying.

`LocalStore.prepare_writing` asks only whether safe commits are possible; this is for
people who want to know why not, or how.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

from holdfast.stores.base import Store
from holdfast.stores.filesystem import OsFileSystem
from holdfast.stores.local import LocalStore

_MOUNTS = "/proc/self/mountinfo"


@dataclass(frozen=True)
class Abilities:
    """Of one folder, as of now."""

    writable: bool
    reason: str
    """Why it is not."""
    kind: str
    """The file system's name ("ext4", "nfs4"); "" where it cannot be told."""
    free_bytes: int
    hard_links: bool = False
    rename_new: bool = False
    """Renaming that fails where the new name is taken: stands in for hard links."""
    sync_folders: bool = False
    preallocation: bool = False

    @property
    def safe(self) -> bool:
        """Whether a run can be written here."""
        return self.writable and self.sync_folders and (self.hard_links or self.rename_new)


def probe(store: Store) -> Abilities | None:
    """Try each call in a scratch folder inside the store, which is removed again.

    None for a store that is no folder. Raises OSError if the folder cannot be looked at.
    """
    if not isinstance(store, LocalStore):
        return None
    root = os.path.abspath(store.address)
    space = os.statvfs(root)
    kind, free_bytes = _kind(os.stat(root).st_dev), space.f_bavail * space.f_frsize
    try:
        # A leading dot: no key of a store starts so, and no reader sees it.
        scratch = tempfile.mkdtemp(prefix=".holdfast-probe-", dir=root)
    except OSError as error:
        return Abilities(False, error.strerror or str(error), kind, free_bytes)
    try:
        return _try_all(scratch, kind, free_bytes)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _try_all(scratch: str, kind: str, free_bytes: int) -> Abilities:
    fs = OsFileSystem()
    folder = fs.open_folder(scratch)
    try:
        fd = fs.create("a", folder)
        try:
            preallocation = _works(lambda: fs.allocate(fd, 4096))
        finally:
            fs.close(fd)
        hard_links = _works(lambda: fs.link("a", folder, "b", folder))
        return Abilities(
            True,
            "",
            kind,
            free_bytes,
            hard_links=hard_links,
            rename_new=_works(lambda: fs.rename_new("a", folder, "c", folder)),
            sync_folders=_works(lambda: fs.sync(folder)),
            preallocation=preallocation,
        )
    finally:
        fs.close(folder)


def _works(call: Callable[[], None]) -> bool:
    try:
        call()
    except OSError:
        return False
    return True


def _kind(device: int) -> str:
    """The file system's name, from the kernel's list of mounts (Linux)."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open(_MOUNTS, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                fields = line.split()
                if len(fields) > 4 and fields[2] == wanted and "-" in fields:
                    return fields[fields.index("-") + 1]
    except OSError:
        return ""
    return ""
