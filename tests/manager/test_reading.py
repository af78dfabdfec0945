"""What a restore reads, and how much memory that takes."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.core.group import Ranks
from holdfast.core.records import Chunk, Leaf
from holdfast.core.types import MiB
from holdfast.errors import StoreUnavailable
from holdfast.manager import reader
from holdfast.repo.repo import Repo
from holdfast.stores.faulty import Effect, Fault, FaultPlan, FaultyStore
from holdfast.stores.memory import MemoryStore


class Recording(MemoryStore):
    """Keeps what was read of packs: (offset, bytes)."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[tuple[int, int]] = []
        self.readers = super().parallel

    @property
    def parallel(self) -> int:
        return self.readers

    def read_into(self, key: str, offset: int, into: memoryview, *, shared: bool = False) -> None:
        self.reads.append((offset, into.nbytes))
        super().read_into(key, offset, into, shared=shared)


def numbers(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(count, np.float32)


def saved(state: dict[str, Any], store: Any = None) -> tuple[holdfast.CheckpointManager, Any]:
    store = Recording() if store is None else store
    ckpts = holdfast.CheckpointManager("memory://reading", store=store)
    ckpts.save(1, state).result()
    return ckpts, store


def test_one_leaf_of_many_is_read_alone() -> None:
    state = {f"t{i}": numbers(256, i) for i in range(500)}
    ckpts, store = saved(state)
    with ckpts:
        loaded = ckpts.load()
        assert store.reads == []
        assert np.array_equal(loaded["t250"], state["t250"])
        assert [nbytes for _, nbytes in store.reads] == [1024]


def test_small_leaves_are_read_together() -> None:
    state = {f"t{i}": numbers(256, i) for i in range(20_000)}
    ckpts, store = saved(state)
    live = {name: np.zeros_like(value) for name, value in state.items()}
    with ckpts:
        ckpts.restore(into=dict(live))
    assert all(np.array_equal(live[name], state[name]) for name in state)
    assert len(store.reads) < 13, "20 MiB"
    assert sum(nbytes for _, nbytes in store.reads) < 30 * MiB


def test_long_reads_are_whole_pages_in_the_order_of_the_pack() -> None:
    state = {f"t{i}": numbers(900_001, i) for i in range(12)}
    ckpts, store = saved(state)
    with ckpts:
        ckpts.restore(into={name: np.zeros_like(value) for name, value in state.items()})
        size = max(offset + nbytes for offset, nbytes in store.reads)
    long = [(offset, nbytes) for offset, nbytes in store.reads if nbytes >= MiB]
    assert len(long) == 12
    assert all(offset % 4096 == 0 for offset, _ in long)
    assert all((offset + nbytes) % 4096 == 0 or offset + nbytes == size for offset, nbytes in long)


class Part:
    """Takes what is read of a leaf: all of it, or a part that no other rank wants."""

    def __init__(self, part: Any = None) -> None:
        self.part = part

    def write(self, start: Any, shape: Any, data: memoryview) -> None: ...


@pytest.mark.parametrize("part", [None, ((0,), (900_001,))])
@pytest.mark.parametrize("rank", range(3))
def test_ranks_that_read_the_same_begin_apart(rank: int, part: Any) -> None:
    state = {f"t{i}": numbers(900_001, i) for i in range(12)}
    ckpts, store = saved(state)
    with ckpts:
        repo = Repo(store)
        record = repo.newest(1)[0]
        manifest = repo.manifest(record)
        ranks = Ranks(rank, 3)
        leaves = range(len(state))
        wanted = reader.wanted_for(manifest, [(n, Part(part)) for n in leaves], ranks)
        store.reads.clear()
        store.readers = 1  # else the first read is of whichever thread comes first
        reader.ChunkReader(repo, record, manifest, ranks).read(wanted)
        first, size = store.reads[0][0], manifest.packs[0].nbytes
    assert len(set(store.reads)) == len(store.reads)
    begins = 0 if part else rank / 3
    assert begins - 0.1 < first / size < begins + 0.1


def test_the_staging_blocks_are_few_and_no_longer_than_a_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []
    real = reader.new_block

    def block(nbytes: int) -> memoryview:
        made.append(nbytes)
        return real(nbytes)

    monkeypatch.setattr(reader, "new_block", block)
    state = {f"t{i}": numbers(5_000_000, i) for i in range(6)}
    ckpts, _ = saved(state)
    with ckpts:
        made.clear()
        ckpts.restore(into={name: np.zeros_like(value) for name, value in state.items()})
    # The random states and the loop are read with it.
    assert len(made) <= MemoryStore().parallel
    assert max(made) <= 8 * MiB + 2 * 4096


def test_the_first_error_ends_the_reading() -> None:
    store = FaultyStore(MemoryStore(), FaultPlan((Fault(Effect.FAIL, operation="read_into"),)))
    state = {f"t{i}": numbers(1_900_000, i) for i in range(12)}
    ckpts, _ = saved(state, store)
    with ckpts:
        store.calls.clear()
        with pytest.raises(StoreUnavailable):
            ckpts.restore(into={name: np.zeros_like(value) for name, value in state.items()})
    reads = [call for call in store.calls if call.operation == "read_into"]
    assert len(reads) <= 2 * MemoryStore().parallel


def test_the_garbage_collector_does_not_see_leaves_and_chunks() -> None:
    """With 20,000 of them its walks took half of the time of a restore."""
    chunk = Chunk((0,), (1,), 0, 0, 4, "")
    assert not gc.is_tracked(chunk)
    assert not gc.is_tracked(Leaf("w", "F32", (1,), (chunk,)))


# -- memory ------------------------------------------------------------------------------

_CHILD = """
import re, sys
import numpy as np
import holdfast

def peak():  # not ru_maxrss: that starts with what the parent process had at the fork
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

names = [f"t{i}" for i in range(32)]
with holdfast.CheckpointManager(sys.argv[1]) as ckpts:
    if sys.argv[2] == "save":
        ckpts.save(1, {name: np.full(1 << 21, i, np.float32) for i, name in enumerate(names)})
    else:
        live = {name: np.ones(1 << 21, np.float32) for name in names}
        before = peak()
        result = ckpts.restore(into=dict(live)) if sys.argv[2] == "restore" else ckpts.load().read()
        assert all(live[name][0] == i for i, name in enumerate(names)) or sys.argv[2] == "load"
        print(peak() - before)
"""


def grown(folder: Path, what: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(folder), what],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return int(done.stdout.split()[-1]) if done.stdout.strip() else 0


def test_a_restore_takes_no_more_memory_than_its_staging_blocks(tmp_path: Path) -> None:
    """256 MiB into arrays that are there. Beside the blocks there are threads' stacks and
    the manifest; a second state would be eight times what is allowed."""
    grown(tmp_path, "save")
    assert grown(tmp_path, "load") > 200 * MiB, "the meter sees a second state"
    assert grown(tmp_path, "restore") < MemoryStore().parallel * 8 * MiB + 16 * MiB
