"""LocalStore on a disk that loses power, see `crash_checks`."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Any, cast

import pytest

from holdfast.core.types import Buffer
from holdfast.stores.base import BLOCK_ALIGNMENT, Store
from holdfast.stores.filesystem import FileSystem
from holdfast.stores.local import LocalStore
from tests.stores.contract import StoreContract
from tests.stores.crash_checks import ROOT, STORIES
from tests.support.crashfs import CrashFileSystem


def make(fs: FileSystem) -> Store:
    return LocalStore(ROOT, fs)


class WithoutLinks:
    """A file system where rename stands in for link."""

    def __init__(self, fs: FileSystem) -> None:
        self.fs = fs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fs, name)

    def link(self, name: str, folder: int, new_name: str, new_folder: int) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")


class InBlocks(LocalStore):
    """Writes every object block by block."""

    def put_new(self, key: str, parts: Sequence[Buffer]) -> bool:
        data = memoryview(b"".join(parts))
        made = self.create(key, at_most_bytes=len(data) + 10_000)
        try:
            for at in range(0, len(data), BLOCK_ALIGNMENT):
                made.write(at, data[at : at + BLOCK_ALIGNMENT])
            return made.publish(len(data))
        finally:
            made.discard()


class WithoutDirectWrites:
    """A file system that refuses direct writes when they come, or wants larger ones."""

    def __init__(self, fs: FileSystem) -> None:
        self.fs = fs
        self.on: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fs, name)

    def direct(self, fd: int, on: bool) -> None:
        self.fs.direct(fd, on)
        (self.on.add if on else self.on.discard)(fd)

    def write(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if fd in self.on:
            raise OSError(errno.EINVAL, "Invalid argument")
        return self.fs.write(fd, buffers, offset)


class TestLocalStoreInBlocks(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        self.fs = CrashFileSystem(max_write_bytes=70_001)
        return InBlocks(ROOT, self.fs)

    def reopen(self, store: Store) -> Store:
        [disk] = self.fs.crash_states(limit=1)
        return make(disk)


class TestLocalStoreOnASimulatedDisk(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        self.fs = CrashFileSystem(max_write_bytes=70_001)
        return make(self.fs)

    def reopen(self, store: Store) -> Store:
        [disk] = self.fs.crash_states(limit=1)  # whatever is durable
        return make(disk)


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_story(story) -> None:
    story(make)


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
def test_story_in_blocks(story, direct: bool) -> None:
    story(lambda fs: InBlocks(ROOT, fs if direct else cast(FileSystem, WithoutDirectWrites(fs))))


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_story_without_links(story) -> None:
    story(lambda fs: make(cast(FileSystem, WithoutLinks(fs))))
