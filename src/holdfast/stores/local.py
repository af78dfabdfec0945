"""A folder as a store: temporary file, fsync, link, fsync of the folders.

An object appears under its name by `link(2)`, which never replaces anything, only
after its content is synced, and counts only after the names that lead to it are
synced. What an interrupted writer leaves is a file in `tmp/` (see `unfinished`).
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

from holdfast.core import process
from holdfast.core.types import Buffer, MiB
from holdfast.errors import (
    DamagedObject,
    ObjectNotFound,
    StoreError,
    StoreFull,
    StoreReadOnly,
    StoreUnavailable,
    StoreUnfit,
)
from holdfast.stores.base import BadKey, NewObject, ObjectInfo, check_key, check_prefix
from holdfast.stores.filesystem import UNSUPPORTED, FileStatus, FileSystem, OsFileSystem
from holdfast.stores.filling import FULL, Blocks, Temporary, fill, write_all
from holdfast.stores.folders import Folders
from holdfast.stores.unfinished import TEMPORARIES, is_temporary, owner_of, temporary_name

logger = logging.getLogger("holdfast")

MAX_READ_BYTES = 64 * MiB

# Another host's temporary is taken for dead after a day; one with our host name but of
# another boot (a second machine of that name is unlikely, and its save only fails and
# is repeated) after an hour.
_STRANGER_AGE_S = 24 * 3600
_OTHER_BOOT_AGE_S = 3600

_READ_ONLY = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
# What link(2) says where there are no hard links: EPERM on FAT and many FUSE systems,
# EMLINK where a file may have one name only.
_NO_LINKS = UNSUPPORTED | {errno.EPERM, errno.EMLINK}
# What open(2) says about a symbolic link (EMLINK on FreeBSD), a socket, a dead device.
_NOT_A_FILE = frozenset({errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.ENODEV})


class LocalStore:
    """Objects as files below `root`, which is made when first written to.

    `root` may be a symbolic link; nothing below it may. Where it is a file, every
    call raises BadAddress. Safe in forked children: nothing is held between calls.

    >>> store = LocalStore("runs/mnist")  # doctest: +SKIP
    >>> store.put_new("packs/a", [b"bytes"])  # doctest: +SKIP
    True
    """

    def __init__(self, root: str | os.PathLike[str], fs: FileSystem | None = None) -> None:
        self._address = os.fspath(root)
        self._fs: FileSystem = fs if fs is not None else OsFileSystem()
        # The process may change its folder later: the path is made absolute now.
        self._folders = Folders(os.path.abspath(self._address), self._fs, self._address)

    def __repr__(self) -> str:
        return f"LocalStore({self._address!r})"

    @property
    def address(self) -> str:
        return self._address

    # -- writing -------------------------------------------------------------------

    @property
    def whole_bytes(self) -> int:
        return 0

    @property
    def parallel(self) -> int:
        return 4

    def put_new(self, key: str, parts: Sequence[Buffer]) -> bool:
        *folders, name = _split(key)
        with (
            self._writing(f"write {key!r}"),
            self._folders.open(folders, durable=True, create=True) as folder,
        ):
            if self._taken(name, folder):
                return False
            with self._temporary() as file:
                fill(self._fs, file.fd, parts)
                return self._place(file, key, name, folder)

    def create(self, key: str, *, at_most_bytes: int) -> NewObject:
        *folders, name = _split(key)

        def place(file: Temporary) -> bool:
            with self._folders.open(folders, durable=True, create=True) as folder:
                return not self._taken(name, folder) and self._place(file, key, name, folder)

        translated = partial(self._writing, f"write {key!r}")
        return Blocks(self._fs, self._temporary(), place, translated, at_most_bytes)

    def append(self, key: str, data: Buffer) -> None:
        *folders, name = _split(key)
        with (
            self._writing(f"append to {key!r}"),
            self._folders.open(folders, create=True) as folder,
            self._open_object(key, name, folder, self._fs.open_to_write) as (fd, nbytes),
        ):
            write_all(self._fs, fd, [memoryview(data).cast("B")], nbytes)

    @contextmanager
    def _temporary(self) -> Generator[Temporary, None, None]:
        """A new empty file in `tmp/`, whose name is gone afterwards, whatever happens."""
        with self._folders.open([TEMPORARIES], create=True) as scratch:
            name = temporary_name(process.current())
            fd = self._fs.create(name, scratch)
            try:
                yield Temporary(fd, name, scratch)
            finally:
                self._fs.close(fd)
                with suppress(OSError):
                    self._fs.unlink(name, scratch)

    def _place(self, file: Temporary, key: str, name: str, folder: int) -> bool:
        """Make a whole file durable, and the object `key`; False if that exists."""
        self._fs.sync(file.fd)
        if not self._publish(file, name, folder):
            return False
        try:
            self._fs.sync(folder)
        except OSError as error:
            kind = StoreFull if error.errno in FULL else StoreUnavailable
            raise kind(
                f"{key!r} was written to {self._address}, but its folder could not be synced: "
                f"{error.strerror}"
            ) from error
        return True

    def _publish(self, file: Temporary, name: str, folder: int) -> bool:
        """Give the synced file its name unless the name is taken."""
        fd, temporary, scratch = file
        try:
            self._fs.link(temporary, scratch, name, folder)
            return True
        except FileExistsError:
            # NFS sends a call again when its reply was lost, and then finds our own link.
            return self._same_file(fd, name, folder)
        except OSError as error:
            if error.errno == errno.EXDEV:
                raise StoreUnfit(
                    f"folders of {self._address} are on different file systems",
                    hint="A run must be on one file system.",
                ) from error
            if error.errno not in _NO_LINKS:
                raise
            no_links = error
        try:
            self._fs.rename_new(temporary, scratch, name, folder)
            return True
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            raise StoreUnfit(
                f"the file system of {self._address} has no call that creates a file only "
                f"if it is absent (link: {no_links.strerror}; rename: {error.strerror})",
                hint="Put the run on a local disk, NFS or Lustre, or into an object store.",
            ) from error

    def _same_file(self, fd: int, name: str, folder: int) -> bool:
        try:
            there = self._fs.status_of(name, folder)
        except FileNotFoundError:
            return False
        ours = self._fs.status(fd)
        return (there.device, there.inode) == (ours.device, ours.inode)

    def _taken(self, name: str, folder: int) -> bool:
        try:
            self._fs.status_of(name, folder)
        except FileNotFoundError:
            return False
        return True

    def settle(self, key: str) -> None:
        *folders, name = _split(key)
        with (
            self._reading(key, "sync"),
            self._folders.open(folders, durable=True) as folder,
            self._open_object(key, name, folder) as (fd, _),
        ):
            self._fs.sync(fd)
            self._fs.sync(folder)

    def delete(self, keys: Iterable[str]) -> None:
        for *folders, name in [_split(key) for key in keys]:  # a bad one stops us before
            try:
                with self._folders.open(folders) as folder:
                    self._fs.unlink(name, folder)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                pass  # no such object
            except OSError as error:
                key = "/".join([*folders, name])
                raise self._cannot_write(f"delete {key!r}", error) from error

    def prepare_writing(self) -> None:
        with (
            self._writing("write"),
            self._folders.open([], durable=True, create=True),
        ):
            self._probe()

    def _probe(self) -> None:
        """Two creations of one name: exactly the first may succeed."""
        with self._temporary() as first, self._temporary() as second:
            scratch = first.folder
            fill(self._fs, first.fd, [b"first"])
            self._fs.sync(first.fd)
            fill(self._fs, second.fd, [b"second"])
            self._fs.sync(second.fd)
            probe = temporary_name(process.current())
            try:
                won = self._publish(first, probe, scratch)
                lost = not self._publish(second, probe, scratch)
                with self._open_object(probe, probe, scratch) as (fd, nbytes):
                    intact = self._fs.read(fd, nbytes, 0) == b"first"
                self._folders.sync(scratch)
            finally:
                with suppress(OSError):
                    self._fs.unlink(probe, scratch)
        if not (won and lost and intact):
            raise StoreUnfit(
                f"the file system of {self._address} lets a second writer replace a file that "
                "must be created once only",
                hint="Put the run on a local disk, NFS or Lustre, or into an object store.",
            )

    def remove_debris(self, *, thorough: bool = False) -> int:
        removed = 0
        try:
            with self._folders.open([TEMPORARIES]) as scratch:
                for name in self._fs.scan(scratch):
                    with suppress(FileNotFoundError):
                        if self._is_debris(name, scratch):
                            self._fs.unlink(name, scratch)
                            removed += 1
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            raise self._cannot_write("remove unfinished files", error) from error
        return removed

    def _is_debris(self, name: str, scratch: int) -> bool:
        owner = owner_of(name, process.current())
        if owner is None:
            return False  # not a name that we give
        found = self._fs.status_of(name, scratch)
        if not stat.S_ISREG(found.mode):
            return False
        alive = process.is_alive(owner)
        age_s = time.time() - found.modified_s
        if alive is None:
            return age_s > _STRANGER_AGE_S
        if owner.boot != process.current().boot:
            return age_s > _OTHER_BOOT_AGE_S
        return not alive

    # -- reading -------------------------------------------------------------------

    def get(self, key: str, *, max_bytes: int) -> bytes:
        *folders, name = _split(key)
        with (
            self._reading(key),
            self._folders.open(folders) as folder,
            self._open_object(key, name, folder) as (fd, nbytes),
        ):
            if nbytes > max_bytes:
                raise DamagedObject(key, f"it has {nbytes:,} bytes; at most {max_bytes:,} can be")
            pieces: list[bytes] = []
            offset = 0
            while offset < nbytes:
                piece = self._fs.read(fd, min(MAX_READ_BYTES, nbytes - offset), offset)
                if not piece:
                    raise DamagedObject(key, f"it ends at byte {offset:,} of {nbytes:,}")
                pieces.append(piece)
                offset += len(piece)
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def read_into(self, key: str, offset: int, into: memoryview, *, shared: bool = False) -> None:
        *folders, name = _split(key)
        view = into.cast("B") if into.nbytes else into
        end = offset + into.nbytes
        with (
            self._reading(key),
            self._folders.open(folders) as folder,
            self._open_object(key, name, folder) as (fd, nbytes),
        ):
            if offset < 0:
                raise DamagedObject(key, f"there is no byte {offset:,}")
            if end > nbytes:
                raise DamagedObject(key, f"it ends at byte {nbytes:,}, before byte {end:,}")
            at = offset
            while at < end:
                piece = view[at - offset : min(at - offset + MAX_READ_BYTES, into.nbytes)]
                count = self._fs.read_into(fd, piece, at, cached=shared)
                if count <= 0:
                    raise DamagedObject(key, f"it ends at byte {at:,}, before byte {end:,}")
                at += count

    def size(self, key: str) -> int:
        *folders, name = _split(key)
        with (
            self._reading(key),
            self._folders.open(folders) as folder,
            self._open_object(key, name, folder) as (_, nbytes),
        ):
            return nbytes

    def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectInfo]:
        return (info for info in self._list(check_prefix(prefix)) if info.key > after)

    def _list(self, prefix: str) -> Iterator[ObjectInfo]:
        pending = [prefix]
        while pending:
            at = pending.pop()
            try:
                found = self._scan(at)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise self._unavailable(f"list {at!r}", error) from error
            for name, status in found:
                key = f"{at}{name}"
                if not _is_key(key):
                    continue
                if stat.S_ISDIR(status.mode):
                    pending.append(f"{key}/")
                elif stat.S_ISREG(status.mode):
                    yield ObjectInfo(key, status.size_bytes)
                else:
                    logger.warning("ignored %r in %s: not a regular file", key, self._address)

    def _scan(self, prefix: str) -> list[tuple[str, FileStatus]]:
        """What one folder holds, read as a whole so that nothing stays open meanwhile."""
        found: list[tuple[str, FileStatus]] = []
        with self._folders.open(prefix.split("/")[:-1]) as folder:
            for name in self._fs.scan(folder):
                with suppress(FileNotFoundError):
                    found.append((name, self._fs.status_of(name, folder)))
        return found

    def close(self) -> None:
        """Nothing is kept open between calls."""

    # -- objects and errors ----------------------------------------------------------

    @contextmanager
    def _open_object(
        self, key: str, name: str, folder: int, call: Callable[[str, int], int] | None = None
    ) -> Generator[tuple[int, int], None, None]:
        """(descriptor, size in bytes) of a regular file, opened by `call` (else for reading)."""
        try:
            fd = (call or self._fs.open_file)(name, folder)
        except OSError as error:
            if error.errno in _NOT_A_FILE:
                raise DamagedObject(key, "it is a link or device, not a file") from None
            raise
        try:
            found = self._fs.status(fd)
            if stat.S_ISDIR(found.mode):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
            if not stat.S_ISREG(found.mode):
                raise DamagedObject(key, "it is a pipe or device, not a file")
            yield fd, found.size_bytes
        finally:
            self._fs.close(fd)

    @contextmanager
    def _writing(self, doing: str) -> Generator[None, None, None]:
        try:
            yield
        except OSError as error:
            raise self._cannot_write(doing, error) from error

    @contextmanager
    def _reading(self, key: str, doing: str = "read") -> Generator[None, None, None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError):
            raise ObjectNotFound(key, self._address) from None
        except OSError as error:
            raise self._unavailable(f"{doing} {key!r}", error) from error

    def _unavailable(self, doing: str, error: OSError) -> StoreUnavailable:
        hint = "Check who may read it." if error.errno in _READ_ONLY else ""
        return StoreUnavailable(
            f"cannot {doing} in {self._address}: {error.strerror or error}", hint=hint
        )

    def _cannot_write(self, doing: str, error: OSError) -> StoreError:
        message = f"cannot {doing} in {self._address}: {error.strerror or error}"
        if error.errno in FULL:
            return StoreFull(message, hint="Free some space, or keep fewer checkpoints.")
        if error.errno in _READ_ONLY:
            return StoreReadOnly(message, hint="Check the folder's owner and how it is mounted.")
        return StoreUnavailable(message)


# -- keys ----------------------------------------------------------------------------


def _split(key: str) -> list[str]:
    if is_temporary(check_key(key)):
        raise BadKey(f"{key!r} is the name of an unfinished file")
    return key.split("/")


def _is_key(name: str) -> bool:
    try:
        return not is_temporary(check_key(name))
    except BadKey:
        return False
