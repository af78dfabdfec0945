"""A restore without a reference reads of a long list only what it needs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from holdfast import CheckpointManager
from holdfast.errors import CorruptionError, NoIntactCheckpoint
from holdfast.manager.info import Restored
from holdfast.repo import keys
from holdfast.stores.memory import MemoryStore

SEGMENTS = keys.SEGMENTS
MANY = 110  # more than the newest entry lists itself


class Reads(MemoryStore):
    """Notes which objects are read."""

    def __init__(self) -> None:
        super().__init__("long")
        self.keys: list[str] = []

    def get(self, key: str, *, max_bytes: int) -> bytes:
        self.keys.append(key)
        return super().get(key, max_bytes=max_bytes)

    def segments(self) -> list[str]:
        return [key for key in self.keys if key.startswith(SEGMENTS)]


@pytest.fixture
def store() -> Reads:
    store = Reads()
    with CheckpointManager("memory://long", store=store, keep=None) as manager:
        for step in range(1, MANY + 1):
            manager.save(step, {"step": step}, block=True)
    assert any(info.key.startswith(SEGMENTS) for info in store.list(""))
    store.keys.clear()
    return store


def damage(store: Reads, steps: range) -> None:
    with CheckpointManager("memory://long", store=store) as manager:
        ids = [info.id for info in manager.checkpoints() if info.step in steps]
    store.delete([keys.manifest_key(id) for id in ids])
    store.keys.clear()


RESTORES: dict[str, Callable[[CheckpointManager], Restored | None]] = {
    "restore": lambda manager: manager.restore(),
    "read_loop": lambda manager: manager.read_loop(),
}


@pytest.mark.parametrize("name", RESTORES)
def test_no_segment_is_read_for_the_newest(store: Reads, name: str) -> None:
    with CheckpointManager("memory://long", store=store) as manager:
        restored = RESTORES[name](manager)
    assert restored is not None
    assert restored.info.step == MANY
    assert store.segments() == []


def test_damage_is_passed_over_as_far_as_it_goes(store: Reads) -> None:
    damage(store, range(MANY - 1, MANY + 1))
    with CheckpointManager("memory://long", store=store) as manager:
        restored = manager.restore()
        assert restored is not None
        assert restored.info.step == MANY - 2
        assert len(restored.skipped) == 2
    assert store.segments() == []


def test_also_into_the_segments(store: Reads) -> None:
    damage(store, range(2, MANY + 1))
    with CheckpointManager("memory://long", store=store) as manager:
        restored = manager.restore()
        assert restored is not None
        assert restored.info.step == 1
    assert store.segments()
    damage(store, range(1, 2))
    with (
        CheckpointManager("memory://long", store=store) as manager,
        pytest.raises(NoIntactCheckpoint, match=f"none of the {MANY} checkpoint"),
    ):
        manager.restore()


def test_a_damaged_segment_is_in_nobodys_way(store: Reads) -> None:
    store.delete([info.key for info in store.list("") if info.key.startswith(SEGMENTS)])
    with CheckpointManager("memory://long", store=store) as manager:
        restored = manager.restore()
        assert restored is not None
        assert restored.info.step == MANY
        with pytest.raises(CorruptionError):
            manager.checkpoints()
