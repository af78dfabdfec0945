"""The simulated disk forgets what it should, and nothing else."""

from __future__ import annotations

import errno

import pytest

from holdfast.stores.faulty import Died
from tests.support.crashfs import BLOCK_BYTES, CrashFileSystem


def test_a_disk_forgets_what_is_not_synced() -> None:
    fs = CrashFileSystem()
    root = fs.open_folder("/")
    fd = fs.create("a", root)
    content = b"x" * BLOCK_BYTES + b"y" * BLOCK_BYTES
    fs.write(fd, [memoryview(content)], 0)
    fs.sync(root)
    left = {disk.files()["/a"] for disk in fs.crash_states(10_000)}
    zeros = bytes(BLOCK_BYTES)
    assert {b"", content, content[:BLOCK_BYTES], zeros + content[BLOCK_BYTES:]} <= left
    assert any(content[:512] + bytes(100) == found[:612] for found in left if found)  # torn
    fs.sync(fd)
    assert [disk.files() for disk in fs.crash_states()] == [{"/a": content}]
    fs.write(fd, [memoryview(b"new")], 0)
    left = {disk.files()["/a"] for disk in fs.crash_states(10_000)}
    assert {content, b"new" + content[3:]} <= left
    assert all(len(found or b"") == len(content) for found in left)


def test_names_are_lost_in_any_order() -> None:
    fs = CrashFileSystem()
    root = fs.open_folder("/")
    for name in "abc":
        fs.create(name, root)
    fs.unlink("a", root)
    left = {"".join(path[1:] for path in disk.files()) for disk in fs.crash_states()}
    assert left == {"", "a", "b", "c", "ab", "ac", "bc", "abc"}
    fs.sync(root)
    assert [set(disk.files()) for disk in fs.crash_states()] == [{"/b", "/c"}]


def test_a_synced_file_without_its_name_is_gone() -> None:
    fs = CrashFileSystem()
    root = fs.open_folder("/")
    fs.make_folder("d", root)
    folder = fs.open_folder("d", root)
    fs.sync(fs.create("a", folder))
    fs.sync(folder)
    assert {frozenset(disk.files()) for disk in fs.crash_states()} == {
        frozenset(),
        frozenset({"/d/", "/d/a"}),
    }


def test_a_file_keeps_all_its_names() -> None:
    fs = CrashFileSystem()
    root = fs.open_folder("/")
    fd = fs.create("a", root)
    fs.link("a", root, "b", root)
    fs.sync(root)
    fs.write(fd, [memoryview(b"x")], 0)
    for disk in fs.crash_states():
        assert disk.files()["/a"] == disk.files()["/b"]
        assert disk.status_of("/a").inode == disk.status_of("/b").inode


def test_after_a_failed_sync_no_later_one_helps() -> None:
    fs = CrashFileSystem(fail_at={4: errno.EIO})
    root = fs.open_folder("/")
    fd = fs.create("a", root)
    fs.write(fd, [memoryview(b"data")], 0)
    with pytest.raises(OSError, match="Input/output"):
        fs.sync(fd)
    fs.sync(fd)
    fs.sync(root)
    assert {b"", b"data"} <= {disk.files()["/a"] for disk in fs.crash_states()}


def test_crash_states_are_the_same_every_time() -> None:
    def states() -> list[dict[str, bytes | None]]:
        fs = CrashFileSystem()
        root = fs.open_folder("/")
        for name in "abcdefgh":
            fs.write(fs.create(name, root), [memoryview(bytes(20_000))], 0)
        return [disk.files() for disk in fs.crash_states(50)]

    first = states()
    assert len(first) == 50
    assert first == states()


def test_the_process_stops_at_a_call_and_stays_so() -> None:
    fs = CrashFileSystem(stop_at=2)
    root = fs.open_folder("/")
    for _ in range(2):
        with pytest.raises(Died):
            fs.create("a", root)
    fs.restart()
    assert fs.files() == {}
