"""LocalStore on real disks that are full or read-only, and in processes that are killed."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.core.digest import digest
from holdfast.errors import StoreFull, StoreReadOnly
from holdfast.stores.filesystem import OsFileSystem
from holdfast.stores.local import LocalStore
from tests.stores.contract import ANY, listed

KiB = 1024
KILLS = 20


def mount(*arguments: str) -> bool:
    """Whether mounting worked; in most containers it is not allowed."""
    try:
        return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0
    except OSError:
        return False


# -- full ------------------------------------------------------------------------------------


@pytest.fixture(params=["small disk", "size limit"])
def cramped(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder that takes one object of 600 KiB and none of 900 KiB after it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if request.param == "small disk" and mount("-t", "tmpfs", "-o", "size=1m", "none", str(disk)):
        try:
            yield disk
        finally:
            subprocess.run(["umount", str(disk)], check=True)
        return
    # The kernel then says EFBIG, not ENOSPC; a file of this process that is larger fails.
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700 * KiB, old[1]))
    try:
        yield disk
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize(
    "nbytes",
    [
        pytest.param(900 * KiB, id="while writing"),
        pytest.param(2048 * KiB, id="while reserving"),
    ],
)
def test_a_full_disk_leaves_nothing_visible(cramped: Path, nbytes: int) -> None:
    store = LocalStore(cramped / "run")
    first = os.urandom(600 * KiB)
    assert store.put_new("packs/a", [first])
    for _ in range(3):
        with pytest.raises(StoreFull) as caught:
            store.put_new("packs/b", [bytes(100 * KiB), bytes(nbytes - 100 * KiB)])
        assert "packs/b" in str(caught.value)
        assert caught.value.hint
    assert listed(store) == {"packs/a": 600 * KiB}
    assert list((cramped / "run/tmp").iterdir()) == []
    assert store.get("packs/a", max_bytes=ANY) == first
    # Space that is freed can be used.
    store.delete(["packs/a"])
    assert store.put_new("packs/b", [bytes(650 * KiB)])


# -- read-only ---------------------------------------------------------------------------------


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[LocalStore]:
    """A store with one object that cannot be written, by the best means we are allowed."""
    root = tmp_path / "run"
    LocalStore(root).put_new("log/1", [b"x"])
    if os.geteuid() != 0:
        folders = [root, root / "log", root / "tmp"]
        for folder in folders:
            folder.chmod(0o555)
        try:
            yield LocalStore(root)
        finally:
            for folder in folders:
                folder.chmod(0o755)
    elif mount("--bind", str(root), str(root)):
        try:
            assert mount("-o", "remount,ro,bind", str(root))
            yield LocalStore(root)
        finally:
            subprocess.run(["umount", str(root)], check=True)
    else:

        class ReadOnly(OsFileSystem):
            def create(self, name: str, folder: int) -> int:
                raise OSError(30, "Read-only file system")

            make_folder = unlink = create  # type: ignore[assignment]

        yield LocalStore(root, ReadOnly())


def test_a_read_only_store_can_be_read(read_only: LocalStore) -> None:
    assert listed(read_only) == {"log/1": 1}
    assert read_only.get("log/1", max_bytes=1) == b"x"
    for write in (
        lambda: read_only.put_new("log/2", [b"x"]),
        lambda: read_only.put_new("new/folder", [b"x"]),
        lambda: read_only.delete(["log/1"]),
        read_only.prepare_writing,
    ):
        with pytest.raises(StoreReadOnly) as caught:
            write()
        assert caught.value.hint
    assert listed(read_only) == {"log/1": 1}


# -- killed ------------------------------------------------------------------------------------

# Writes objects that end in their own digest, and says which are durable.
WRITER = """
import os, random, sys
from holdfast.core.digest import digest
from holdfast.stores.local import LocalStore

root, seed = sys.argv[1], int(sys.argv[2])
store, chance, block = LocalStore(root), random.Random(seed), os.urandom(1 << 20)
for n in range(10_000):
    parts = [block[chance.randrange(1 << 20) :] for _ in range(chance.randrange(4))]
    body = b"".join(parts)
    key = f"packs/{seed}-{n}"
    assert store.put_new(key, [*parts, digest(body).encode()])
    print(key, flush=True)
"""


def test_killed_while_writing(tmp_path: Path) -> None:
    root = tmp_path / "run"
    chance = random.Random(20)
    store = LocalStore(root)
    acknowledged: set[str] = set()
    debris = 0
    for kill in range(KILLS):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(root), str(kill)], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout
            first = writer.stdout.readline()
            time.sleep(chance.uniform(0, 0.04))
            writer.kill()
            said = first + writer.stdout.read()
            writer.wait()  # its pipe is closed a moment before it is dead
        # The last line may be cut by the kill.
        acknowledged |= {line.strip() for line in said.splitlines(True) if line.endswith("\n")}
        debris += store.remove_debris()
        assert list((root / "tmp").iterdir()) == []
        found = listed(store)
        assert acknowledged <= set(found)
        for key in set(found) - acknowledged:  # linked, and killed before it could say so
            acknowledged.add(key)
        for key in [key for key in found if key.startswith(f"packs/{kill}-")]:
            content = store.get(key, max_bytes=ANY)
            assert content[-64:].decode() == digest(content[:-64]), f"{key} is not whole"
    assert len(acknowledged) >= KILLS
    assert debris >= KILLS // 4, "hardly a kill met a write: the test shows nothing"


RACER = """
import sys
from holdfast.stores.local import LocalStore

store, name = LocalStore(sys.argv[1]), sys.argv[2]
sys.stdin.readline()
for n in range(60):
    if store.put_new(f"log/{n:03}", [name.encode()]):
        print(n)
"""


def test_of_many_processes_one_creates_each_object(tmp_path: Path) -> None:
    """Also the folders, which nobody made before."""
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(tmp_path / "new/run"), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in "abcd"
    ]
    for racer in racers:
        assert racer.stdin
        racer.stdin.write("go\n")
        racer.stdin.flush()
    won = {}
    for name, racer in zip("abcd", racers, strict=True):
        said, _ = racer.communicate(timeout=60)
        assert racer.returncode == 0
        for line in said.split():
            assert int(line) not in won
            won[int(line)] = name
    assert sorted(won) == list(range(60))
    store = LocalStore(tmp_path / "new/run")
    for n, name in won.items():
        assert store.get(f"log/{n:03}", max_bytes=ANY) == name.encode()
    assert list((tmp_path / "new/run/tmp").iterdir()) == []
