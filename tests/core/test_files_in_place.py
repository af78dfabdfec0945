"""Files that a save reads where they are, while its caller waits for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from holdfast import CheckpointManager
from holdfast.core import file_copies
from holdfast.core.tree import Directory, File
from holdfast.manager.snapshot import HeldLeaf, Snapshot

CONTENT = os.urandom(3 * 2**20 + 17)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "folder" / "f"
    made.parent.mkdir()
    made.write_bytes(CONTENT)
    return made


def no_copy(*arguments: Any) -> None:
    raise AssertionError("it is copied")


def meddle(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    """Let another program do something once, when the file's first block has been read."""
    real, left = file_copies.read_at, [change]

    def read_at(fd: int, offset: int, into: memoryview) -> int:
        count = real(fd, offset, into)
        if left:
            left.pop()()
        return count

    monkeypatch.setattr(file_copies, "read_at", read_at)


def test_it_is_read_without_a_copy(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with CheckpointManager(tmp_path / "run") as ckpts:
        with monkeypatch.context() as patch:
            patch.setattr(file_copies, "_copy_into", no_copy)
            patch.setattr(file_copies, "BytesSource", no_copy)
            ckpts.save(1, {"d": Directory(path.parent)}, block=True)
        os.truncate(path, 0)
        ckpts.save(2, {"d": Directory(path.parent)}, block=True)
        assert ckpts.load(1)["d"]["f"].read() == CONTENT
        assert ckpts.load(2)["d"]["f"].read() == b""
        assert len(os.listdir(path.parent)) == 1
    assert len(os.listdir("/proc/self/fd")) == before


def rewrite(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(CONTENT[::-1])


def cut(path: Path) -> None:
    os.truncate(path, 2**20)


def append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


@pytest.mark.parametrize("change", [rewrite, cut, append])
def test_a_file_that_changes_meanwhile_is_copied_and_whole(
    change: Callable[[Path], None], tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody needs to do anything: the save is made again, and stays the caller's only one."""
    with CheckpointManager(tmp_path / "run") as ckpts:
        meddle(monkeypatch, lambda: change(path))
        info = ckpts.save(1, {"f": File(path)}, note="n", tags=["t"], block=True).result()
        assert ckpts.load()["f"].read() == path.read_bytes()
        assert [each.id for each in ckpts.checkpoints()] == [info.id]
        assert (info.note, info.tags) == ("n", ("t",))
        # From now on it is copied first.
        monkeypatch.setattr(file_copies, "_FileInPlace", no_copy)
        ckpts.save(2, {"f": File(path)}, block=True)


def test_a_file_that_is_replaced_meanwhile_is_the_old_one(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace() -> None:
        (tmp_path / "new").write_bytes(b"new")
        os.replace(tmp_path / "new", path)

    with CheckpointManager(tmp_path / "run") as ckpts:
        meddle(monkeypatch, replace)
        ckpts.save(1, {"f": File(path)}, block=True)
        assert ckpts.load()["f"].read() in (CONTENT, b"new")


def test_a_save_that_is_left_early_does_not_see_what_comes_later(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle: the caller goes on, and may write."""
    real, left = Snapshot.read, [True]

    def read(self: Snapshot, leaf: HeldLeaf, offset: int, into: Sequence[memoryview]) -> None:
        if leaf.path == "f" and left:
            left.clear()
            ckpts.drain()  # as `save` does when an exception leaves it
            rewrite(path)
        real(self, leaf, offset, into)

    monkeypatch.setattr(Snapshot, "read", read)
    with CheckpointManager(tmp_path / "run") as ckpts:
        ckpts.save(1, {"f": File(path)}, block=True)
        assert not left
        assert ckpts.load()["f"].read() == CONTENT


def test_of_many_files_only_some_are_open(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_copies, "IN_PLACE_FILES", 3)
    for number in range(8):
        (path.parent / str(number)).write_bytes(CONTENT[number:])
    most: list[int] = []
    real = file_copies.FileCopies.take

    def take(self: Any, *arguments: Any) -> Any:
        taken = real(self, *arguments)
        most.append(len(os.listdir("/proc/self/fd")))
        return taken

    monkeypatch.setattr(file_copies.FileCopies, "take", take)
    with CheckpointManager(tmp_path / "run") as ckpts:
        ckpts.acquire()
        before = len(os.listdir("/proc/self/fd"))
        ckpts.save(1, {"d": Directory(path.parent)}, block=True)
        assert max(most) <= before + 3 + 2  # the one in hand, and the file that holds copies
        for number in range(8):
            assert ckpts.load()["d"][str(number)].read() == CONTENT[number:]
