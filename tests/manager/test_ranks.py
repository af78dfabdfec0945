"""Ranks that save together: whatever ends one of them, the checkpoint is whole or absent."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

import holdfast
from holdfast.core import process
from holdfast.core.records import Holder, Manifest
from holdfast.errors import GroupError, NoIntactCheckpoint, SaveFailed, UnsupportedValue
from holdfast.manager.manager import CheckpointManager
from holdfast.repo.keys import outcome_key
from holdfast.repo.repo import Repo
from holdfast.repo.together import Leader
from holdfast.repo.writer import Writer
from holdfast.stores.faulty import Died, Effect, Fault, FaultPlan, FaultyStore
from holdfast.stores.memory import MemoryStore
from tests.support.jobs import fresh_address
from tests.support.thread_ranks import ThreadGroup, all_ranks, run_ranks, waiting

SIZE = 3


def state_of(rank: int, step: int) -> dict[str, Any]:
    return {
        "own": np.full(70_000, 100 * rank + step),
        "small": np.full(3, rank),
        "plain": {"step": step, "rank": rank, "every": [step] * rank},
    }


def empty() -> dict[str, Any]:
    return {"own": np.zeros(70_000, int), "small": np.zeros(3, int), "plain": {}}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    arrays = all(np.array_equal(one[name], other[name]) for name in ("own", "small"))
    return arrays and one["plain"] == other["plain"]


def save_steps(
    group: ThreadGroup, store: Any, steps: range, *, more: Callable[[int], Any] = lambda step: None
) -> None:
    with CheckpointManager("", store=store, group=group, keep="last=2") as ckpts:
        for step in steps:
            ckpts.save(step, state_of(group.ranks.rank, step)).result()
            more(step)


def go_on(group: ThreadGroup, store: Any) -> int:
    """The step that all ranks go on from; each has its own state of it. -1: from nothing."""
    with CheckpointManager("", store=store, group=group) as ckpts:
        ckpts.acquire()
        live = empty()
        restored = ckpts.restore(live)
        if restored is None:
            return -1
        step = restored.info.step
        assert same(live, state_of(group.ranks.rank, step))
        ckpts.save(step + 1, state_of(group.ranks.rank, step + 1)).result()
        return step


def flip_byte(store: MemoryStore, key: str, at: int) -> None:
    data = bytearray(store.get(key, max_bytes=1 << 30))
    data[at] ^= 1
    store.delete([key])
    store.put_new(key, [data])


def manifest_of(store: Any) -> Manifest:
    repo = Repo(store)
    return repo.manifest(repo.newest(1)[0])


def test_each_rank_gets_its_own_back() -> None:
    store = MemoryStore("here")
    all_ranks(SIZE, lambda group: save_steps(group, store, range(4)))
    assert all_ranks(SIZE, lambda group: go_on(group, store)) == [3] * SIZE
    manifest = manifest_of(store)
    assert manifest.world_size == SIZE
    assert [other.rank for other in manifest.others or ()] == [1, 2]


def test_one_process_reads_what_rank_0_has_saved() -> None:
    store = MemoryStore("here")
    all_ranks(SIZE, lambda group: save_steps(group, store, range(2)))
    with CheckpointManager("", store=store) as ckpts:
        live = empty()
        ckpts.restore(live)
        assert same(live, state_of(0, 1))
        assert all(each.ok for each in ckpts.verify())


def test_a_rank_that_was_not_there_gets_what_rank_0_had() -> None:
    store = MemoryStore("here")
    all_ranks(2, lambda group: save_steps(group, store, range(2)))

    def restored(group: ThreadGroup) -> dict[str, Any]:
        with CheckpointManager("", store=store, group=group) as ckpts:
            live = empty()
            found = ckpts.restore(live)
            assert found is not None
            assert found.world_size == 2
            return live

    states = all_ranks(3, restored)
    for rank, as_rank in enumerate((0, 1, 0)):
        assert same(states[rank], state_of(as_rank, 1))


def test_machines_of_one_name_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank on another one is slow, and not a process of this one that is gone."""
    real = process.current()

    def current() -> Holder:
        return msgspec.structs.replace(real, boot=f"boot {threading.get_ident()}")

    monkeypatch.setattr(process, "current", current)
    store = MemoryStore("here")

    def save(group: ThreadGroup) -> None:
        with CheckpointManager("", store=store, group=group) as ckpts:
            ckpts.acquire()
            time.sleep(2.5 * group.ranks.rank)  # they look who is there after a second
            ckpts.save(1, state_of(group.ranks.rank, 1)).result()

    all_ranks(2, save)
    assert all_ranks(2, lambda group: go_on(group, store)) == [1, 1]


def test_what_does_not_change_is_written_once() -> None:
    store = MemoryStore("here")
    sizes: list[int] = []

    def save(group: ThreadGroup) -> None:
        with CheckpointManager("", store=store, group=group, keep=None) as ckpts:
            for step in range(3):
                state = {**state_of(group.ranks.rank, 0), "plain": {"step": step}}
                info = ckpts.save(step, state).result()
                if group.ranks.rank == 0:
                    sizes.append(info.new_bytes)

    all_ranks(SIZE, save)
    assert sizes[0] > SIZE * 70_000 * 8
    assert sizes[1:] == [0, 0]


def test_a_restart_refers_to_what_its_rank_has_stored() -> None:
    store = MemoryStore("here")
    all_ranks(SIZE, lambda group: save_steps(group, store, range(1)))

    def again(group: ThreadGroup) -> int:
        with CheckpointManager("", store=store, group=group) as ckpts:
            live = empty()
            ckpts.restore(live)
            return ckpts.save(5, live).result().new_bytes

    assert all_ranks(SIZE, again) == [0] * SIZE


# -- ends ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("effect", [Effect.DIE_BEFORE, Effect.DIE_AFTER])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_may_end_at_any_call(rank: int, effect: Effect) -> None:
    number = 1
    while ends_at(rank, number, effect):
        number += 1
    assert number > 10


def ends_at(rank: int, number: int, effect: Effect) -> bool:
    """False if the rank never comes to that call."""
    store = MemoryStore("here")
    all_ranks(2, lambda group: save_steps(group, store, range(1)))
    faulty = FaultyStore(store, FaultPlan.at(number, effect))
    stores = [faulty if one == rank else store for one in range(2)]
    with waiting(0.05):
        results = run_ranks(
            2, lambda group: save_steps(group, stores[group.ranks.rank], range(1, 3))
        )
    steps = all_ranks(2, lambda group: go_on(group, store))
    assert steps[0] == steps[1] >= 0
    assert_tidy(store)
    return any(isinstance(result, BaseException) for result in results)


def assert_tidy(store: MemoryStore) -> None:
    """Nothing is left that no checkpoint needs, but for what the last save has told."""
    repo = Repo(store)
    live = {f"packs/{name}.safetensors" for record in repo.records() for name in record.packs}
    found = {info.key for info in store.list("packs/")}
    assert found == live
    assert len(list(store.list("fragments/"))) <= 1


@pytest.mark.parametrize("effect", [Effect.FAIL, Effect.LOSE_REPLY])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_call_may_fail(rank: int, effect: Effect) -> None:
    """Then all ranks have saved, or none has; and all know it."""
    saved = [done for number in range(1, 40, 7) for done in fails_at(rank, number, effect)]
    assert True in saved


def fails_at(rank: int, number: int, effect: Effect) -> list[bool]:
    """Which of three saves were made, as all ranks tell it."""
    store = MemoryStore("here")
    all_ranks(2, lambda group: save_steps(group, store, range(1)))
    faulty = FaultyStore(store, FaultPlan.at(number, effect))
    stores = [faulty if one == rank else store for one in range(2)]

    def save(group: ThreadGroup) -> list[bool]:
        done: list[bool] = []
        with CheckpointManager("", store=stores[group.ranks.rank], group=group) as ckpts:
            for step in (1, 2, 3):
                try:
                    ckpts.save(step, state_of(group.ranks.rank, step)).result()
                    done.append(True)
                except holdfast.errors.HoldfastError:
                    done.append(False)
        return done

    with waiting(0.5):
        results = run_ranks(2, save)
    steps = all_ranks(2, lambda group: go_on(group, store))
    assert steps[0] == steps[1] >= 0
    lists = [result for result in results if isinstance(result, list)]
    if len(lists) == 2:  # else it could not become the run's writer, or close it
        assert lists[0] == lists[1]
    return [each for done in lists for each in done]


def test_a_full_disk_of_one_rank_is_a_failed_save_of_all() -> None:
    store = MemoryStore("here")

    def save(group: ThreadGroup) -> list[str]:
        own = store
        if group.ranks.rank == 1:
            full = Fault(Effect.FAIL, operation="put_new", prefix="packs/", nth=1)
            own = FaultyStore(store, FaultPlan((full,)))
        found: list[str] = []
        with CheckpointManager("", store=own, group=group) as ckpts:
            for step in (1, 2):
                try:
                    ckpts.save(step, state_of(group.ranks.rank, step)).result()
                    found.append("")
                except holdfast.errors.HoldfastError as error:
                    found.append(error.message)
        return found

    results = all_ranks(SIZE, save)
    assert [result[1] for result in results] == [""] * SIZE
    assert "rank 1: " in results[0][0]
    assert results[0][0] == results[2][0]


def test_a_rank_that_does_not_come_is_named() -> None:
    store = MemoryStore("here")

    def save(group: ThreadGroup) -> str:
        with CheckpointManager("", store=store, group=group) as ckpts:
            ckpts.save(1, state_of(group.ranks.rank, 1)).result()
            if group.ranks.rank == 2:
                return ""
            with pytest.raises(SaveFailed, match="1 of 3 ranks have not written") as failed:
                ckpts.save(2, state_of(group.ranks.rank, 2)).result()
            with pytest.raises(SaveFailed):
                ckpts.close()
            return str(failed.value)

    with waiting(2.0):
        messages = all_ranks(SIZE, save)
    assert "step 2 within 2.00 s: 2" in messages[0]
    assert messages[0] == messages[1]
    assert all_ranks(SIZE, lambda group: go_on(group, store)) == [1] * SIZE


def test_what_one_rank_cannot_save_fails_at_once_on_all() -> None:
    store = MemoryStore("here")

    def save(group: ThreadGroup) -> str:
        with CheckpointManager("", store=store, group=group) as ckpts:
            state: dict[str, Any] = state_of(group.ranks.rank, 1)
            if group.ranks.rank == 1:
                with pytest.raises(UnsupportedValue):
                    ckpts.save(1, {**state, "odd": object()})
            else:
                with pytest.raises(SaveFailed, match=r"rank 1: .*odd"):
                    ckpts.save(1, state).result()
            return ckpts.save(2, state).result().id

    ids = all_ranks(SIZE, save)
    assert len(set(ids)) == 1


def test_ranks_that_are_not_in_step_are_told() -> None:
    store = MemoryStore("here")

    def save(group: ThreadGroup) -> None:
        with CheckpointManager("", store=store, group=group) as ckpts:
            with pytest.raises(SaveFailed, match="saves step 1, and rank 0 of 2 step 0"):
                ckpts.save(group.ranks.rank, {"a": 1}).result()
            ckpts.save(2, {"a": 1}).result()

    all_ranks(2, save)


def test_an_outcome_stays_until_all_have_read_it() -> None:
    """A save that fails at once on rank 0 says nothing of where the others are."""
    store = MemoryStore("here")
    repo = Repo(store)
    leader = Leader(repo, Writer.open(repo), "seed", 2)
    saves = [leader.begin(number) for number in range(2)]
    for save in saves:
        leader.abandon(save, SaveFailed("the disk is full"))
    outcomes = {outcome_key(leader.epoch, save.nonce) for save in saves}
    assert {info.key for info in store.list("fragments/")} == outcomes
    leader.settled()
    assert not list(store.list("fragments/"))


# -- damage ----------------------------------------------------------------------------


def test_damage_that_one_rank_meets_sends_all_to_the_one_before(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = MemoryStore("here")
    all_ranks(SIZE, lambda group: save_steps(group, store, range(3)))
    manifest = manifest_of(store)
    [mine] = [leaf for leaf in manifest.leaves if leaf.path == "@2/own"]
    pack = manifest.packs[mine.chunks[0].pack].name
    flip_byte(store, f"packs/{pack}.safetensors", mine.chunks[0].offset + 5)
    with caplog.at_level(logging.ERROR):
        assert all_ranks(SIZE, lambda group: go_on(group, store)) == [1] * SIZE
    assert "rank 2: " in caplog.text


def test_no_intact_one_is_an_error_on_all() -> None:
    store = MemoryStore("here")
    all_ranks(2, lambda group: save_steps(group, store, range(1)))
    manifest = manifest_of(store)
    for pack in manifest.packs:
        flip_byte(store, f"packs/{pack.name}.safetensors", pack.nbytes - 3)
    results = run_ranks(2, lambda group: go_on(group, store))
    assert [type(result) for result in results] == [NoIntactCheckpoint] * 2


def test_ranks_that_see_different_stores_are_refused() -> None:
    stores = [MemoryStore("one"), MemoryStore("other")]
    results = run_ranks(2, lambda group: save_steps(group, stores[group.ranks.rank], range(1)))
    assert [type(result) for result in results] == [GroupError] * 2
    assert "another place" in str(results[0])


def test_a_run_that_is_held_is_refused_on_all_ranks() -> None:
    store = MemoryStore("here")
    with CheckpointManager("", store=store) as holder:
        holder.save(0, {"a": 1}).result()
        results = run_ranks(2, lambda group: save_steps(group, store, range(1)))
    assert [type(result).__name__ for result in results] == ["RunHeld", "GroupError"]


def test_edits_are_made_once() -> None:
    address = fresh_address()

    def edit(group: ThreadGroup) -> list[str]:
        with CheckpointManager(address, group=group) as ckpts:
            ckpts.save(1, {"a": 1}).result()
            info = ckpts.log_metrics(1, {"loss": 0.5})
            assert info.metrics == {"loss": 0.5}
            ckpts.tag(1, "good")
            assert ckpts.gc() == [] or group.ranks.rank == 0
        return []

    all_ranks(2, edit)
    with CheckpointManager(address) as ckpts:
        assert ckpts.info("good").metrics == {"loss": 0.5}
        actions = [action for action in log_actions(address) if action in ("tag", "metrics")]
        assert sorted(actions) == ["metrics", "tag"]


def log_actions(address: str) -> list[str]:
    from holdfast.core.records import Entry
    from holdfast.core.sealed import unseal
    from holdfast.stores.open import open_store

    store = open_store(address)
    keys = sorted(info.key for info in store.list("log/"))
    return [unseal(store.get(key, max_bytes=1 << 20), Entry, key)[1].action for key in keys]


def test_died_is_no_error() -> None:
    """What the tests above use to end a rank must not be handled anywhere."""
    assert not issubclass(Died, Exception)
