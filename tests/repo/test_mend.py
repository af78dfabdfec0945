"""Repair from another run, stopped anywhere."""

from __future__ import annotations

import pytest

from holdfast.errors import HoldfastError
from holdfast.repo import keys
from holdfast.repo.mend import mend_manifest, mend_packs
from holdfast.repo.repo import Repo
from holdfast.stores.base import Store
from holdfast.stores.faulty import Died, Effect, FaultPlan, FaultyStore
from holdfast.stores.memory import MemoryStore
from tests.repo.copies import copy_all, damage, large_run, made, only_pack, shared_pack
from tests.repo.support import check, keep_last, packs, save
from tests.repo.test_every_call import open_writer


def hurt() -> tuple[MemoryStore, MemoryStore]:
    """A run with a damaged pack, which two checkpoints share, and a lost manifest; its copy."""
    run, copy = made(1, 2, 3), MemoryStore("copy")
    copy_all(run, copy)
    first, second, _ = Repo(run).records()
    damage(run, only_pack(first), at=3)
    run.delete([keys.manifest_key(second.id)])
    return run, copy


def mend(run: Store, copy: Store) -> None:
    repo, other = Repo(run), Repo(copy)
    for record in repo.records():
        mend_manifest(repo, record, other)
    mend_packs(repo, repo.records()[0].packs, other)


def test_mended() -> None:
    run, copy = hurt()
    before = packs(copy)
    mend(run, copy)
    assert check(run) == [1, 2, 3]
    assert packs(run) == packs(copy) == before
    mend(run, copy)
    assert check(run) == [1, 2, 3]


@pytest.mark.parametrize(
    "effect", [Effect.DIE_BEFORE, Effect.DIE_AFTER, Effect.FAIL, Effect.LOSE_REPLY, Effect.DELAY]
)
@pytest.mark.parametrize("side", [0, 1])
def test_the_same_command_once_more_ends_what_was_stopped(side: int, effect: Effect) -> None:
    stores: list[Store] = list(hurt())
    counted = stores[side] = FaultyStore(stores[side])
    mend(stores[0], stores[1])
    for number in range(1, len(counted.calls) + 1):
        stores = list(hurt())
        faulty = stores[side] = FaultyStore(stores[side], FaultPlan.at(number, effect))
        try:
            mend(stores[0], stores[1])
        except (Died, HoldfastError):
            pass
        survivors = [s.survivor() if isinstance(s, FaultyStore) else s for s in stores]
        faulty.release()  # a late delete that came after the next try would undo that
        mend(*survivors)
        assert check(survivors[0]) == [1, 2, 3], faulty.calls[number - 1]
        assert check(survivors[1]) == [1, 2, 3], faulty.calls[number - 1]


def test_nothing_is_deleted_for_one_that_is_no_better() -> None:
    run, copy = hurt()
    key = only_pack(Repo(run).records()[0])
    damage(copy, key, at=5)
    before = run.get(key, max_bytes=1 << 20)
    [found] = mend_packs(Repo(run), [keys.pack_of(key)], Repo(copy))
    assert "is no better in memory://copy" in found.problem
    assert run.get(key, max_bytes=1 << 20) == before
    copy.delete([key])
    [found] = mend_packs(Repo(run), [keys.pack_of(key)], Repo(copy))
    assert "does not have it" in found.problem
    assert run.get(key, max_bytes=1 << 20) == before


@pytest.mark.parametrize("other", [0, 1])
def test_what_any_checkpoint_needs_must_be_right(other: int) -> None:
    """A pack must not mend one checkpoint and break another."""
    run, copy = large_run(), MemoryStore("copy")
    copy_all(run, copy)
    key, noise, small = shared_pack(run)
    # Both use the one, only the first uses the other.
    damage(run, key, (noise, small)[other])
    damage(copy, key, (small, noise)[other])
    before = run.get(key, max_bytes=1 << 20)
    [found] = mend_packs(Repo(run), [keys.pack_of(key)], Repo(copy))
    assert "is no better" in found.problem
    assert run.get(key, max_bytes=1 << 20) == before


def test_a_writer_goes_on_beside_it_and_retires_what_is_mended() -> None:
    run, copy = hurt()
    writer = open_writer(run)
    name = keys.pack_of(only_pack(Repo(run).records()[0]))

    def retire(call: object) -> None:
        if getattr(call, "operation", "") == "delete" and waiting:
            waiting.clear()
            save(writer, 4, retire=keep_last(1))

    waiting = [1]
    [found] = mend_packs(Repo(FaultyStore(run, on_call=retire)), [name], Repo(copy))
    assert found.problem == ""
    assert check(run) == [4]
    writer.collect()  # what was put back for nobody
    assert f"{name}.safetensors" not in packs(run)
