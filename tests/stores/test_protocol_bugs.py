"""Stores that are wrong on purpose: every one must be caught by the crash checks.

A check that lets one of these pass would let the same mistake pass in LocalStore.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest

from holdfast.core.types import Buffer
from holdfast.errors import ObjectNotFound
from holdfast.stores.filling import fill
from holdfast.stores.local import LocalStore
from tests.stores.crash_checks import (
    ROOT,
    STORIES,
    Make,
    Violation,
    calls_fail_while_writing,
    errors_leave_nothing,
    power_fails_while_writing,
    process_dies_while_writing,
    settling,
    two_writers_race,
)

Story = Callable[[Make], None]


class Skewed:
    """A file system that passes all calls on; subclasses get one of them wrong."""

    def __init__(self, fs: Any) -> None:
        self.fs = fs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fs, name)

    def is_folder(self, fd: int) -> bool:
        return self.fs.status(fd).mode & 0o040000 != 0


class NoFileSync(Skewed):
    def sync(self, fd: int) -> None:
        if self.is_folder(fd):
            self.fs.sync(fd)


class NoFolderSync(Skewed):
    def sync(self, fd: int) -> None:
        if not self.is_folder(fd):
            self.fs.sync(fd)


class SyncsTheFolderBeforeTheLink(Skewed):
    """The right calls in the wrong order."""

    def link(self, name: str, folder: int, new_name: str, new_folder: int) -> None:
        self.fs.sync(new_folder)
        self.fs.link(name, folder, new_name, new_folder)
        self.linked = new_folder

    def sync(self, fd: int) -> None:
        if fd != getattr(self, "linked", None):
            self.fs.sync(fd)


class RenamesInsteadOfLinking(Skewed):
    """Looks first whether the name is taken, as LocalStore does, then replaces it."""

    def link(self, name: str, folder: int, new_name: str, new_folder: int) -> None:
        self.fs.replace(name, folder, new_name, new_folder)


class SyncsAgainAfterAnError(Skewed):
    """The kernel has dropped the pages: the second fsync has nothing left to write."""

    def sync(self, fd: int) -> None:
        try:
            self.fs.sync(fd)
        except OSError:
            self.fs.sync(fd)


class IgnoresShortWrites(Skewed):
    def write(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.fs.write(fd, buffers, offset)
        return sum(view.nbytes for view in buffers)


class IgnoresFailedSyncs(Skewed):
    def sync(self, fd: int) -> None:
        try:
            self.fs.sync(fd)
        except OSError as error:
            if error.errno != errno.EIO:
                raise


class LeavesTemporaries(Skewed):
    def unlink(self, name: str, folder: int) -> None:
        pass


class ClosesNothing(Skewed):
    def close(self, fd: int) -> None:
        pass


class AcknowledgesBeforeTheSync(LocalStore):
    """Returns at once; syncs when it is called again, as a background thread would."""

    def put_new(self, key: str, parts: Sequence[Buffer]) -> bool:
        fs = self._fs
        late: list[Any] = getattr(self, "late", [])
        for node in late:
            fs._sync(node)  # type: ignore[attr-defined]
        self.late: list[Any] = []

        class Later(Skewed):
            late = self.late

            def sync(self, fd: int) -> None:
                self.late.append(self.fs._open[fd])

        self._fs = cast(Any, Later(fs))
        try:
            return super().put_new(key, parts)
        finally:
            self._fs = fs


class WritesToTheFinalName(LocalStore):
    def put_new(self, key: str, parts: Sequence[Buffer]) -> bool:
        *folders, name = key.split("/")
        with self._folders.open(folders, durable=True, create=True) as folder:
            try:
                fd = self._fs.create(name, folder)
            except FileExistsError:
                return False
            fill(self._fs, fd, parts)
            self._fs.sync(fd)
            self._fs.close(fd)
            self._fs.sync(folder)
        return True


class LinksThenSyncs(LocalStore):
    def put_new(self, key: str, parts: Sequence[Buffer]) -> bool:
        *folders, name = key.split("/")
        with (
            self._folders.open(folders, durable=True, create=True) as folder,
            self._temporary() as file,
        ):
            fill(self._fs, file.fd, parts)
            if not self._publish(file, name, folder):
                return False
            self._fs.sync(file.fd)
            self._fs.sync(folder)
        return True


class BelievesThatFoundFoldersAreSynced(LocalStore):
    """Syncs only the folders that it makes: one that a dead process made is lost."""

    def __init__(self, root: str, fs: Any) -> None:
        super().__init__(root, fs)
        found = self._folders._open_below

        def open_below(folder: int, name: str, *, durable: bool, create: bool) -> int:
            try:
                return found(folder, name, durable=False, create=False)
            except FileNotFoundError:
                return found(folder, name, durable=durable, create=create)

        self._folders._open_below = open_below  # type: ignore[method-assign]


class NeverSyncsNewFolders(LocalStore):
    def __init__(self, root: str, fs: Any) -> None:
        super().__init__(root, fs)
        below = self._folders._open_below
        self._folders._open_below = (  # type: ignore[method-assign]
            lambda folder, name, durable, create: below(folder, name, durable=False, create=create)
        )


class NeverSyncsAboveTheRoot(LocalStore):
    def __init__(self, root: str, fs: Any) -> None:
        super().__init__(root, fs)
        self._folders._sync_above = lambda root, made: None  # type: ignore[method-assign]


class SyncsAboveTheRootOnlyWhatItMade(LocalStore):
    def __init__(self, root: str, fs: Any) -> None:
        super().__init__(root, fs)
        sync = self._folders._sync_above
        self._folders._sync_above = (  # type: ignore[method-assign]
            lambda root, made: sync(root, made) if made else None
        )


class SettlesNothing(LocalStore):
    def settle(self, key: str) -> None:
        if key not in [info.key for info in self.list("")]:
            raise ObjectNotFound(key, self.address)


class SettlesTheFileOnly(LocalStore):
    def settle(self, key: str) -> None:
        *folders, name = key.split("/")
        with (
            self._reading(key),
            self._folders.open(folders) as folder,
            self._open_object(key, name, folder) as (fd, _),
        ):
            self._fs.sync(fd)


class SettlesTheFolderOnly(LocalStore):
    def settle(self, key: str) -> None:
        *folders, name = key.split("/")
        with (
            self._reading(key),
            self._folders.open(folders, durable=True) as folder,
            self._open_object(key, name, folder),
        ):
            self._fs.sync(folder)


# Each with the story that must notice it, so that none is caught by accident.
FILE_SYSTEM_BUGS: list[tuple[type[Skewed], Story]] = [
    (NoFileSync, power_fails_while_writing),
    (NoFolderSync, power_fails_while_writing),
    (SyncsTheFolderBeforeTheLink, power_fails_while_writing),
    (IgnoresShortWrites, power_fails_while_writing),
    (RenamesInsteadOfLinking, two_writers_race),
    (SyncsAgainAfterAnError, calls_fail_while_writing),
    (IgnoresFailedSyncs, calls_fail_while_writing),
    (LeavesTemporaries, errors_leave_nothing),
    (ClosesNothing, errors_leave_nothing),
]
STORE_BUGS: list[tuple[type[LocalStore], Story]] = [
    (AcknowledgesBeforeTheSync, power_fails_while_writing),
    (WritesToTheFinalName, power_fails_while_writing),
    (LinksThenSyncs, power_fails_while_writing),
    (NeverSyncsNewFolders, power_fails_while_writing),
    (NeverSyncsAboveTheRoot, power_fails_while_writing),
    (BelievesThatFoundFoldersAreSynced, process_dies_while_writing),
    (SyncsAboveTheRootOnlyWhatItMade, process_dies_while_writing),
    (SettlesNothing, settling),
    (SettlesTheFileOnly, settling),
    (SettlesTheFolderOnly, settling),
]


@pytest.mark.parametrize(("bug", "story"), FILE_SYSTEM_BUGS)
def test_wrong_calls_are_caught(bug: type[Skewed], story: Story) -> None:
    with pytest.raises(Violation):
        story(lambda fs: LocalStore(ROOT, cast(Any, bug(fs))))


@pytest.mark.parametrize(("bug", "story"), STORE_BUGS)
def test_wrong_stores_are_caught(bug: type[LocalStore], story: Story) -> None:
    with pytest.raises(Violation):
        story(lambda fs: bug(ROOT, fs))


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_the_way_they_are_built_is_no_bug(story: Story) -> None:
    story(lambda fs: LocalStore(ROOT, cast(Any, Skewed(fs))))
