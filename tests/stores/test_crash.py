"""LocalStore on a disk that loses power, and the disk itself."""

from __future__ import annotations

import errno

import pytest

from holdfast.errors import StoreUnavailable
from holdfast.stores.base import Store
from holdfast.stores.filesystem import FileSystem
from holdfast.stores.local import LocalStore
from tests.stores.contract import StoreContract, listed
from tests.stores.crash_checks import DATA, KEY, OLD, OLD_KEY, ROOT, STORIES, machine
from tests.support.crashfs import BLOCK_BYTES, CrashFileSystem


def make(fs: FileSystem) -> Store:
    return LocalStore(ROOT, fs)


class WithoutLinks(CrashFileSystem):
    """Where rename stands in for link."""

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
