"""Copies that are stopped at any moment: nothing half is seen, and the next one goes on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest

from holdfast.errors import (
    HoldfastError,
)
from holdfast.repo import keys, log, pack_copy
from holdfast.repo.replicate import Replicator
from holdfast.repo.repo import Repo
from holdfast.stores.base import Store
from holdfast.stores.faulty import Died, Effect, Fault, FaultPlan, FaultyStore
from holdfast.stores.memory import MemoryStore
from tests.repo.copies import (
    check_manager,
    copy_all,
    damage,
    large_run,
    made,
    only_pack,
    opened,
)
from tests.repo.support import check, keep_last, live_packs, packs, save
from tests.repo.test_every_call import open_writer


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_CREATE_BACKOFF_S", 0.0)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    """A run with packs of many blocks."""
    monkeypatch.setattr(pack_copy, "BLOCK_BYTES", 4096)
    return large_run()


Prepared = Callable[[], tuple[Store, Store]]


def fresh() -> tuple[Store, Store]:
    return made(1, 2), MemoryStore("target")


def half() -> tuple[Store, Store]:
    source, target = fresh()
    with opened(source, target) as copies:
        copies.copy(Repo(source).records()[0].id)
    return source, target


def retiring(source: Store, target: Store) -> None:
    with opened(source, target) as copies:
        for record in Repo(source).records():
            copies.copy(record.id, retire=keep_last(1))


CASES: dict[str, tuple[Prepared, Callable[[Store, Store], None], tuple[list[int], ...]]] = {
    "into nothing": (fresh, copy_all, ([], [1], [1, 2])),
    "one more": (half, copy_all, ([1], [1, 2])),
    "retiring": (half, retiring, ([1], [2])),
}


@pytest.mark.parametrize(
    "effect", [Effect.DIE_BEFORE, Effect.DIE_AFTER, Effect.LOSE_REPLY, Effect.FAIL, Effect.DELAY]
)
@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("case", CASES)
def test_a_copy_stopped_at_any_call_shows_nothing_half(
    case: str, side: str, effect: Effect
) -> None:
    prepare, operation, allowed = CASES[case]
    source, target = prepare()
    counted = FaultyStore(source if side == "source" else target)
    operation(counted if side == "source" else source, counted if side == "target" else target)
    for number in range(1, len(counted.calls) + 1):
        source, target = prepare()
        faulty = FaultyStore(source if side == "source" else target, FaultPlan.at(number, effect))
        done = True
        try:
            operation(
                faulty if side == "source" else source, faulty if side == "target" else target
            )
        except (Died, HoldfastError):
            done = False
        where = f"call {number}: {faulty.calls[number - 1]}"
        assert check(source) == [1, 2], where
        found = check(target)
        assert found in allowed, where
        if done:
            assert found == allowed[-1], where
        faulty.release()  # what was delayed arrives now
        assert check(target) in allowed, where
        # A new process goes on, and its job after it; nothing is left over.
        operation(source, target)
        assert check(target) == allowed[-1], where
        writer = open_writer(target)
        save(writer, 90)
        writer.collect()
        assert check(target) == [*allowed[-1], 90], where
        assert packs(target) == live_packs(Repo(target).records()), where


@pytest.mark.parametrize("effect", [Effect.DIE_BEFORE, Effect.DIE_AFTER, Effect.FAIL])
def test_a_large_copy_stopped_at_any_call_goes_on(large: MemoryStore, effect: Effect) -> None:
    """Blocks are written by several threads: calls come in no fixed order."""
    counted = FaultyStore(MemoryStore("target"))
    copy_all(large, counted)
    for number in range(1, len(counted.calls) + 1, 3):
        faulty = FaultyStore(MemoryStore("target"), FaultPlan.at(number, effect))
        with suppress(Died, HoldfastError):
            copy_all(large, faulty)
        target = faulty.survivor()
        for record in Repo(target).records():
            assert record in Repo(large).records()
            for name, nbytes in record.packs.items():
                assert target.size(keys.pack_key(name)) == nbytes
        copy_all(large, target)
        assert check_manager(target, large)


def test_an_interrupted_copy_is_resumed_without_reading_again() -> None:
    source, target = made(1, 2), MemoryStore("target")
    first = Repo(source).records()[0]
    faulty = FaultyStore(
        target, FaultPlan((Fault(Effect.DIE_BEFORE, operation="put_new", prefix="log/", nth=2),))
    )
    with pytest.raises(Died):
        copy_all(source, faulty)
    assert check(target) == []
    assert packs(target) == live_packs([first])
    counted, other = FaultyStore(source), FaultyStore(target)
    with opened(counted, other) as copies:
        assert copies.copy(first.id).packs == {}
    for store in (counted, other):
        assert not any(call.operation == "read_into" for call in store.calls)
    assert check(target) == [1]


def test_what_another_copy_left_is_compared_before_it_is_used() -> None:
    """The pack of the first came with the second, whose copy died before its entry."""
    source, target = made(1, 2), MemoryStore("target")
    first, second = Repo(source).records()
    faulty = FaultyStore(
        target, FaultPlan((Fault(Effect.DIE_BEFORE, operation="put_new", prefix="log/", nth=2),))
    )
    copies = opened(source, faulty)
    with pytest.raises(Died):
        copies.copy(second.id)
    damage(target, only_pack(first), at=4)
    with opened(source, target) as copies:
        assert set(copies.copy(first.id).packs) == set(first.packs)
    assert check(target) == [1]


def test_packs_that_a_prune_took_meanwhile_are_copied_again() -> None:
    """R7: what was live when the copy began may be gone when it commits."""
    source = made(1, 2)
    target = MemoryStore("target")
    first, second = Repo(source).records()
    with opened(source, target) as copies:
        copies.copy(first.id)

    def prune(call: object) -> None:
        entry = getattr(call, "key", "").startswith("log/")
        if entry and getattr(call, "operation", "") == "put_new" and started:
            started.clear()
            Repo(target).amend("prune", lambda records: [])

    started: list[int] = []
    copies = opened(source, FaultyStore(target, on_call=prune))
    started.append(1)
    copied = copies.copy(second.id)
    assert set(copied.packs) == set(second.packs)
    assert check(target) == [2]


def test_gc_of_the_same_process_spares_a_copy_that_is_under_way() -> None:
    source, target = made(1), MemoryStore("target")
    [record] = Repo(source).records()
    holder: list[Replicator] = []

    def collect(call: object) -> None:
        key = getattr(call, "key", "")
        if holder and getattr(call, "operation", "") == "put_new" and key.startswith("log/"):
            copies = holder.pop()
            assert copies.writer.collect() == []

    copies = opened(source, FaultyStore(target, on_call=collect))
    holder.append(copies)
    copies.copy(record.id)
    assert not holder
    assert check(target) == [1]


def test_a_lost_reply_to_the_entry_is_recognised() -> None:
    source, target = made(1), MemoryStore("target")
    [record] = Repo(source).records()
    fault = Fault(Effect.LOSE_REPLY, operation="put_new", prefix="log/", nth=2)
    with opened(source, FaultyStore(target, FaultPlan((fault,)))) as copies:
        assert copies.copy(record.id).added
    assert check(target) == [1]


def test_a_copy_of_unknown_fate_is_settled_by_the_next() -> None:
    source, target = made(1, 2), MemoryStore("target")
    first, second = Repo(source).records()
    fault = Fault(
        Effect.DELAY, operation="put_new", prefix="log/", nth=2, times=log._CREATE_ATTEMPTS
    )
    faulty = FaultyStore(target, FaultPlan((fault,)))
    copies = opened(source, faulty)
    with pytest.raises(HoldfastError):
        copies.copy(first.id)
    faulty.release()
    copies.copy(second.id)
    assert check(target) == [1, 2]
    copies.copy(first.id)
    assert check(target) == [1, 2]
