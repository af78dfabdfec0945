"""Stop at every storage call of every operation; lose replies; let writes come late.

After each, a new process finds exactly the old or the new state and can go on.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest

from holdfast.errors import CommitUnknown, HoldfastError
from holdfast.repo import log
from holdfast.repo.fork import fork
from holdfast.repo.repo import Repo
from holdfast.repo.writer import Writer
from holdfast.stores.base import Store
from holdfast.stores.faulty import Died, Effect, Fault, FaultPlan, FaultyStore
from holdfast.stores.memory import MemoryStore
from tests.repo.support import check, dead, keep_last, live_packs, packs, process, save

Operation = Callable[[Store], object]


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_CREATE_BACKOFF_S", 0.0)


def open_writer(store: Store) -> Writer:
    return Writer.open(Repo(store), holder=process(), alive=dead)


def two_saves(store: Store) -> None:
    """Steps 1 and 2, the second reusing what the first wrote."""
    writer = open_writer(store)
    first = save(writer, 1)
    save(writer, 2, reuse=Repo(store).manifest(first))


def third_save(store: Store) -> None:
    """Reuse from 2, retire 1, then delete what it alone needed."""
    writer = open_writer(store)
    base = Repo(store).manifest(Repo(store).records()[-1])
    save(writer, 3, reuse=base, retire=keep_last(2))


def collect(store: Store) -> None:
    open_writer(store).collect()


def prune(store: Store) -> None:
    Repo(store).amend("prune", lambda records: records[-1:])


def tag(store: Store) -> None:
    repo = Repo(store)
    repo.edit_record("tag", repo.records()[0].id, tags=("gold",))


CASES: dict[str, tuple[Operation, Operation, tuple[list[int], ...]]] = {
    "first save": (lambda store: None, two_saves, ([], [1], [1, 2])),
    "save and retire": (two_saves, third_save, ([1, 2], [2, 3])),
    "prune": (two_saves, prune, ([1, 2], [2])),
    "tag": (two_saves, tag, ([1, 2],)),
    "gc": (two_saves, collect, ([1, 2],)),
}


def count_calls(before: Operation, operation: Operation) -> int:
    store = FaultyStore(prepared(before))
    operation(store)
    return len(store.calls)


def prepared(before: Operation) -> MemoryStore:
    store = MemoryStore("every-call")
    before(store)
    return store


@pytest.mark.parametrize("effect", [Effect.DIE_BEFORE, Effect.DIE_AFTER])
@pytest.mark.parametrize("case", CASES)
def test_dying_at_any_call_leaves_the_old_or_the_new_state(case: str, effect: Effect) -> None:
    before, operation, allowed = CASES[case]
    for number in range(1, count_calls(before, operation) + 1):
        store = FaultyStore(prepared(before), FaultPlan.at(number, effect))
        with pytest.raises(Died):
            operation(store)
        survivor = store.survivor()
        assert check(survivor) in allowed, f"call {number}: {store.calls[-1]}"
        goes_on(survivor)


@pytest.mark.parametrize("effect", [Effect.LOSE_REPLY, Effect.FAIL, Effect.DELAY])
@pytest.mark.parametrize("case", CASES)
def test_a_failing_call_never_loses_or_halves_anything(case: str, effect: Effect) -> None:
    before, operation, allowed = CASES[case]
    for number in range(1, count_calls(before, operation) + 1):
        store = FaultyStore(prepared(before), FaultPlan.at(number, effect))
        reported_done = True
        try:
            operation(store)
        except HoldfastError:
            reported_done = False
        survivor = store.survivor()
        found = check(survivor)
        where = f"call {number}: {store.calls[number - 1]}"
        assert found in allowed, where
        if reported_done:
            assert found == allowed[-1], where
        store.release()  # what was delayed arrives now
        assert check(survivor) in allowed, where
        goes_on(survivor)


def goes_on(store: Store) -> None:
    """A new process can save, collects every orphan, and keeps what was there."""
    before = check(store)
    writer = open_writer(store)
    save(writer, 90)
    writer.collect()
    assert check(store) == [*before, 90]
    assert packs(store) == live_packs(Repo(store).records())


@pytest.mark.parametrize("effect", [Effect.LOSE_REPLY, Effect.DELAY, Effect.FAIL])
def test_the_writer_itself_goes_on_after_an_unknown_commit(effect: Effect) -> None:
    """Every log put of a save fails for good; the next save of the same process is right."""
    inner = prepared(two_saves)
    fault = Fault(effect, operation="put_new", prefix="log/", nth=2, times=log._CREATE_ATTEMPTS)
    store = FaultyStore(inner, FaultPlan((fault,)))
    writer = open_writer(store)
    with suppress(CommitUnknown):
        save(writer, 3)
    writer.collect()  # must spare the packs of the save whose fate is unknown
    store.release()
    assert check(inner) in ([1, 2], [1, 2, 3])
    save(writer, 4)
    assert check(inner) in ([1, 2, 4], [1, 2, 3, 4])
    writer.collect()
    assert packs(inner) == live_packs(Repo(inner).records())


def test_a_lost_reply_is_recognised_as_success() -> None:
    inner = prepared(two_saves)
    fault = Fault(Effect.LOSE_REPLY, operation="put_new", prefix="log/", nth=2)
    store = FaultyStore(inner, FaultPlan((fault,)))
    save(open_writer(store), 3)
    assert check(inner) == [1, 2, 3]
    assert any(call.operation == "settle" and "log/" in call.key for call in store.calls)


@pytest.mark.parametrize("effect", [Effect.DIE_BEFORE, Effect.DIE_AFTER, Effect.LOSE_REPLY])
def test_a_fork_stopped_anywhere_leaves_both_runs_whole(effect: Effect) -> None:
    def start() -> tuple[MemoryStore, MemoryStore]:
        return prepared(two_saves), MemoryStore("child")

    def run(parent: Store, child: Store) -> None:
        repo = Repo(parent)
        fork(repo, repo.records()[0], Repo(child))

    parent, child = start()
    counted = FaultyStore(parent), FaultyStore(child)
    run(*counted)
    for side in (0, 1):
        for number in range(1, len(counted[side].calls) + 1):
            plain = start()
            stores: list[Store] = list(plain)
            stores[side] = FaultyStore(plain[side], FaultPlan.at(number, effect))
            with suppress(Died, HoldfastError):
                run(*stores)
            assert check(plain[0]) == [1, 2]
            # The parent loses nothing that the child shows, whatever it prunes.
            Repo(plain[0]).amend("prune", lambda records: [r for r in records if r.pins])
            assert forked_steps(plain[1], plain[0]) in ([], [1])


def forked_steps(child: Store, parent: Store) -> list[int]:
    """As `check`, for a child whose packs may lie in `parent`."""
    repo = Repo(child)
    repo._parents = {parent.address: parent}
    try:
        records = repo.records()
    except HoldfastError:
        return []
    for record in records:
        manifest = repo.manifest(record)
        for pack in manifest.packs:
            assert repo.pack_size(pack) == pack.nbytes
    return [record.step for record in records]


def test_a_fork_borrows_and_gives_back() -> None:
    parent, child = prepared(two_saves), MemoryStore("child")
    repo = Repo(parent)
    first, second = repo.records()
    before = packs(parent)
    record = fork(repo, second, Repo(child))
    assert forked_steps(child, parent) == [2]
    assert record.packs == {}
    assert record.borrowed == (parent.address,)
    assert packs(parent) == before
    assert packs(child) == set()
    with pytest.raises(HoldfastError, match="has checkpoints already"):
        fork(repo, first, Repo(child))
    # Another fork of the same checkpoint is told apart from this one.
    fork(repo, second, Repo(MemoryStore("other")))
    assert len(repo.records()[1].pins) == 2
