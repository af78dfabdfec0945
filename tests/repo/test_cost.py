"""What a commit costs: counted, so that it cannot creep up unnoticed."""

from __future__ import annotations

import itertools
import os
import stat
from collections import Counter
from pathlib import Path

from holdfast.manager.manager import CheckpointManager
from holdfast.repo.repo import Repo
from holdfast.repo.writer import Writer
from holdfast.stores.faulty import FaultyStore
from holdfast.stores.filesystem import OsFileSystem
from holdfast.stores.local import LocalStore
from holdfast.stores.memory import MemoryStore
from tests.repo.support import dead, keep_last, process, save


def test_a_small_save_costs_six_syncs(tmp_path: Path) -> None:
    """Pack, manifest and log entry: each the file and its folder."""
    counted: Counter[str] = Counter()

    class Counting(OsFileSystem):
        def sync(self, fd: int) -> None:
            counted["sync"] += 1
            super().sync(fd)

    store = LocalStore(tmp_path / "run", Counting())
    writer = Writer.open(Repo(store), holder=process(), alive=dead)
    for step in (1, 2, 3):
        save(writer, step)
    counted.clear()
    save(writer, 4, retire=keep_last(2))
    assert counted["sync"] == 6


def test_a_save_makes_few_requests() -> None:
    """Pack, manifest, log entry, and the two that show that it is now the newest."""
    inner = MemoryStore("requests")
    store = FaultyStore(inner)
    writer = Writer.open(Repo(store), holder=process(), alive=dead)
    save(writer, 1)
    before = len(store.calls)
    save(writer, 2)
    made = [(call.operation, call.key.split("/")[0]) for call in store.calls[before:]]
    assert made == [
        ("put_new", "packs"),
        ("put_new", "manifests"),
        ("put_new", "log"),
        ("get", "log"),
        ("list", "log"),
    ]


def test_a_small_save_through_the_manager_costs_the_same_six(tmp_path: Path) -> None:
    """A model of a megabyte: three files and their three folders, once each."""
    counted: Counter[str] = Counter()

    class Counting(OsFileSystem):
        def sync(self, fd: int) -> None:
            kind = "folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file"
            counted[kind] += 1
            super().sync(fd)

    def manager() -> CheckpointManager:
        store = LocalStore(tmp_path / "run", Counting())
        return CheckpointManager(tmp_path / "run", store=store, clock=itertools.count().__next__)

    state = {"trees": b"t" * 2**20, "round": 1}
    with manager() as ckpts:
        ckpts.save(0, state, block=True)
        counted.clear()
        for step in range(1, 6):
            ckpts.save(step, {"trees": bytes([step]) * 2**20, "round": step}, block=True)
    assert counted == {"file": 5 * 3 + 1, "folder": 5 * 3 + 1}  # and the entry that closes it
