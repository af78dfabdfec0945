"""Runs to copy, and what copies them, for tests."""

from __future__ import annotations

import numpy as np

import holdfast
from holdfast.core.records import Record
from holdfast.repo import keys
from holdfast.repo.replicate import Replicator
from holdfast.repo.repo import Repo
from holdfast.stores.base import Store
from holdfast.stores.memory import MemoryStore
from tests.repo.support import save
from tests.repo.test_every_call import open_writer


def gone(holder: object) -> bool:
    return False


def opened(source: Store, target: Store, **more: object) -> Replicator:
    """A new process's, which finds every older one dead."""
    return Replicator.open(Repo(source), Repo(target), take_over=True, alive=gone, **more)  # pyright: ignore[reportArgumentType]


def made(*steps: int, name: str = "source") -> MemoryStore:
    """A run whose later checkpoints reuse a chunk of the first."""
    store = MemoryStore(name)
    writer = open_writer(store)
    base = None
    for step in steps:
        record = save(writer, step, reuse=base, metrics={"loss": float(step)})
        base = base or Repo(store).manifest(record)
    return store


def copy_all(source: Store, target: Store) -> None:
    with opened(source, target) as copies:
        for record in Repo(source).records():
            copies.copy(record.id)


def damage(store: Store, key: str, at: int = 0) -> None:
    data = bytearray(store.get(key, max_bytes=1 << 30))
    data[at] ^= 1
    store.delete([key])
    assert store.put_new(key, [bytes(data)])


def only_pack(record: Record) -> str:
    [name] = record.packs
    return keys.pack_key(name)


def large_run() -> MemoryStore:
    """Two checkpoints; the second has compressed chunks, and of the first one's pack it uses
    `noise` but not `small`."""
    store = MemoryStore.named("large/source")
    store.delete([info.key for info in store.list("")])
    rng = np.random.default_rng(0)
    with holdfast.CheckpointManager("memory://large/source", keep=None) as run:
        noise = rng.integers(0, 256, 50_001, np.uint8)
        run.save(1, {"noise": noise, "small": np.arange(7)}).result()
    with holdfast.CheckpointManager("memory://large/source", keep=None, compress="zstd") as run:
        smooth = np.arange(30_000, dtype=np.float32)
        run.save(
            2, {"noise": noise, "smooth": smooth, "s": [np.ones(n) for n in range(9)]}
        ).result()
    return store


def shared_pack(store: Store) -> tuple[str, int, int]:
    """Of `large_run`: the key of the pack that both use, and where `noise` and `small` are."""
    leaves = {leaf.path: leaf for leaf in Repo(store).manifest(Repo(store).records()[0]).leaves}
    first, second = Repo(store).records()
    [shared] = first.packs
    assert shared in second.packs
    noise, small = (leaves[name].chunks[0].offset for name in ("noise", "small"))
    return keys.pack_key(shared), noise, small


def check_manager(target: Store, source: Store) -> bool:
    """Whether every checkpoint of the copy is intact and equal."""
    with (
        holdfast.CheckpointManager("a", store=target) as ours,
        holdfast.CheckpointManager("b", store=source) as theirs,
    ):
        assert all(found.ok for found in ours.verify())
        assert [c.id for c in ours.checkpoints()] == [c.id for c in theirs.checkpoints()]
    return True


def check_steps(target: Store) -> list[int]:
    """The steps that are listed, each of them intact."""
    with holdfast.CheckpointManager("a", store=target) as run:
        assert all(found.ok for found in run.verify())
        return [info.step for info in run.checkpoints()]
