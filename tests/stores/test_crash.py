"""LocalStore on a disk that loses power, see `crash_checks`."""

from __future__ import annotations

import errno
from typing import Any, cast

import pytest

from holdfast.stores.base import Store
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
def test_story_without_links(story) -> None:
    story(lambda fs: make(cast(FileSystem, WithoutLinks(fs))))
