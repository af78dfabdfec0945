"""The folders of a local store: opened without following links, synced once.

A file is durable only when every name that leads to it is. `Folders` knows which
names were synced, and walks from open descriptors, so that neither a symbolic link
in a store nor a folder exchanged meanwhile leads it astray.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from holdfast.errors import BadAddress, DamagedObject, StoreUnavailable, StoreUnfit
from holdfast.stores.filesystem import UNSUPPORTED, FileSystem

_NOT_A_FOLDER = frozenset({errno.ENOTDIR, errno.ELOOP, errno.EMLINK})


class _Folder(NamedTuple):
    """A folder's identity; given to another one only when the folder is gone."""

    device: int
    inode: int


class Folders:
    """The folder `root` and those below it.

    Errors of the system pass through as OSError.
    """

    def __init__(self, root: str, fs: FileSystem, address: str) -> None:
        self._root = root
        self._fs = fs
        self.address = address
        # Folders whose own names are known to be synced. Not only those made here need
        # it: one left by a process that died before its fsync looks like any other.
        # Only added to, so that threads need no lock.
        self._durable: set[_Folder] = set()

    @contextmanager
    def open(
        self, folders: Sequence[str], *, durable: bool = False, create: bool = False
    ) -> Generator[int, None, None]:
        """A descriptor of the folder `folders` below the root.

        `create` makes what is absent. `durable` syncs the names that lead there,
        unless that was done before.
        """
        fd = self._open_root(durable=durable, create=create)
        try:
            for name in folders:
                below = self._open_below(fd, name, durable=durable, create=create)
                # In this order: interrupted between, a descriptor leaks; the other way
                # round one is closed twice, and may be another thread's by then.
                fd, above = below, fd
                self._fs.close(above)
            yield fd
        finally:
            self._fs.close(fd)

    def _open_root(self, *, durable: bool, create: bool) -> int:
        made: list[str] = []
        try:
            try:
                fd = self._fs.open_folder(self._root)
            except FileNotFoundError:
                self._refuse_broken_link()
                if not create:
                    raise
                self._make_folders(self._root, made)
                fd = self._fs.open_folder(self._root)
        except NotADirectoryError:
            raise BadAddress(
                f"{self.address} cannot be a store: it, or a folder above it, is a file",
                hint="Give the run a folder of its own, such as runs/mnist.",
            ) from None
        try:
            if durable and (made or self._identity(fd) not in self._durable):
                self._sync_above(fd, len(made))
                self._durable.add(self._identity(fd))
        except BaseException:
            self._fs.close(fd)
            raise
        return fd

    def _refuse_broken_link(self) -> None:
        """A folder that is absent behind a link is not "no run here yet".

        Taking an unmounted disk for an empty one would start training from zero.
        """
        path = self._root
        while True:
            try:
                found = self._fs.status_of(path)
            except FileNotFoundError:
                path = os.path.dirname(path)
                continue
            if stat.S_ISLNK(found.mode):
                raise StoreUnavailable(
                    f"{path} is a symbolic link to a folder that is absent",
                    hint="Is the disk mounted? Else make the folder or remove the link.",
                )
            return

    def _make_folders(self, path: str, made: list[str]) -> None:
        try:
            try:
                self._fs.make_folder(path)
            except FileNotFoundError:
                above = os.path.dirname(path)
                if above == path:
                    raise
                self._make_folders(above, made)
                self._fs.make_folder(path)
        except FileExistsError:
            return  # another process was faster
        made.append(path)

    def _sync_above(self, root: int, made: int) -> None:
        """Sync the folders above the root, as far as the file system goes.

        Those in which `made` folders were just made must sync; older ones do if we may
        open them and they can be synced at all.
        """
        child, below = self._identity(root), root
        try:
            while True:
                try:
                    above = self._fs.open_folder("..", below)
                except PermissionError:
                    if made > 0:
                        raise
                    return
                below, done = above, below
                if done != root:
                    self._fs.close(done)
                parent = self._identity(above)
                if parent == child or parent.device != child.device:
                    return  # the top of the tree, or of what is mounted here
                try:
                    self.sync(above)
                except (StoreUnfit, PermissionError):
                    if made > 0:
                        raise
                child = parent
                made -= 1
        finally:
            if below != root:
                self._fs.close(below)

    def _open_below(self, folder: int, name: str, *, durable: bool, create: bool) -> int:
        made = False
        try:
            try:
                fd = self._fs.open_folder(name, folder)
            except FileNotFoundError:
                if not create:
                    raise
                with suppress(FileExistsError):
                    self._fs.make_folder(name, folder)
                made = True
                fd = self._fs.open_folder(name, folder)
        except OSError as error:
            if error.errno in _NOT_A_FOLDER:
                self._refuse_link(name, folder, writing=create)
            raise
        try:
            if durable and (made or self._identity(fd) not in self._durable):
                self.sync(folder)
                self._durable.add(self._identity(fd))
        except BaseException:
            self._fs.close(fd)
            raise
        return fd

    def _refuse_link(self, name: str, folder: int, *, writing: bool) -> None:
        if not stat.S_ISLNK(self._fs.status_of(name, folder).mode):
            return
        if not writing:
            raise DamagedObject(f"{name}/", f"it is a symbolic link in {self.address}")
        raise StoreUnfit(
            f"{name!r} in {self.address} is a symbolic link",
            hint="Only the run's own folder may be a link, to another disk for example.",
        )

    def sync(self, folder: int) -> None:
        try:
            self._fs.sync(folder)
        except OSError as error:
            if error.errno not in UNSUPPORTED and error.errno != errno.EBADF:
                raise
            raise StoreUnfit(
                f"the file system of {self.address} cannot sync folders: {error.strerror}",
                hint="A checkpoint there could be lost with the power. Use another disk.",
            ) from error

    def _identity(self, fd: int) -> _Folder:
        found = self._fs.status(fd)
        return _Folder(found.device, found.inode)
