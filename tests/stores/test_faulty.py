"""The wrapper that injects faults does what its plan says, and nothing else."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from holdfast.errors import ObjectNotFound, StoreFull, StoreUnavailable
from holdfast.stores.base import BadKey, Store
from holdfast.stores.faulty import Call, Died, Effect, Fault, FaultPlan, FaultyStore
from holdfast.stores.local import LocalStore
from holdfast.stores.memory import MemoryStore
from tests.stores.contract import ANY, StoreContract, listed


class TestFaultyStoreOverMemory(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return FaultyStore(MemoryStore())


class TestFaultyStoreOverAFolder(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        never = Fault(Effect.DIE_BEFORE, operation="put_new", prefix="no/such/key")
        return FaultyStore(LocalStore(tmp_path), FaultPlan((never,)))


def faulty(*faults: Fault) -> FaultyStore:
    inner = MemoryStore()
    inner.put_new("log/1", [b"one"])
    return FaultyStore(inner, FaultPlan(faults))


# -- the plan ------------------------------------------------------------------------------


def effects(plan: FaultPlan, calls: list[Call]) -> list[Effect | None]:
    met: tuple[int, ...] = (0,) * len(plan.faults)
    happened = []
    for call in calls:
        met, fault = plan.decide(met, call)
        happened.append(fault.effect if fault else None)
    return happened


CALLS = [
    Call(1, "list", "log/"),
    Call(2, "put_new", "packs/a"),
    Call(3, "put_new", "log/2"),
    Call(4, "get", "log/2"),
    Call(5, "put_new", "log/3"),
    Call(6, "put_new", "log/4"),
]
F = Effect.FAIL


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault(F, call=4), [None, None, None, F, None, None]),
        (Fault(F), [F, None, None, None, None, None]),
        (Fault(F, nth=3), [None, None, F, None, None, None]),
        (Fault(F, nth=3, times=2), [None, None, F, F, None, None]),
        (Fault(F, nth=5, times=None), [None, None, None, None, F, F]),
        (Fault(F, operation="put_new", times=None), [None, F, F, None, F, F]),
        (Fault(F, operation="put_new", prefix="log/", nth=2), [None, None, None, None, F, None]),
        (Fault(F, prefix="packs/", times=None), [None, F, None, None, None, None]),
        (Fault(F, call=4, operation="put_new"), [None] * 6),
    ],
)
def test_which_calls_a_fault_meets(fault: Fault, expected: list[Effect | None]) -> None:
    assert effects(FaultPlan((fault,)), CALLS) == expected


def test_of_several_faults_the_first_wins_and_all_are_counted() -> None:
    plan = FaultPlan(
        (
            Fault(Effect.FAIL, operation="put_new"),
            Fault(Effect.LOSE_REPLY, prefix="packs/"),
            Fault(Effect.DIE_AFTER, operation="put_new", nth=2),
        )
    )
    assert effects(plan, CALLS) == [None, Effect.FAIL, Effect.DIE_AFTER, None, None, None]


def test_at() -> None:
    assert effects(FaultPlan.at(2, Effect.DELAY), CALLS)[1] is Effect.DELAY


# -- the effects ---------------------------------------------------------------------------


def test_die_before() -> None:
    store = faulty(Fault(Effect.DIE_BEFORE, operation="put_new"))
    with pytest.raises(Died):
        store.put_new("log/2", [b"two"])
    assert listed(store.survivor()) == {"log/1": 3}


def test_die_after() -> None:
    store = faulty(Fault(Effect.DIE_AFTER, operation="put_new"))
    with pytest.raises(Died):
        store.put_new("log/2", [b"two"])
    assert listed(store.survivor()) == {"log/1": 3, "log/2": 3}


def test_dying_is_stronger_than_the_error_of_the_call() -> None:
    store = faulty(Fault(Effect.DIE_AFTER, operation="get"))
    with pytest.raises(Died):
        store.get("absent", max_bytes=1)


def test_the_dead_make_no_calls() -> None:
    store = faulty(Fault(Effect.DIE_BEFORE, operation="size"))
    with pytest.raises(Died):
        store.size("log/1")
    calls: list[Callable[[], object]] = [
        lambda: store.put_new("a", [b"x"]),
        lambda: store.get("log/1", max_bytes=ANY),
        lambda: store.read_into("log/1", 0, memoryview(bytearray(1))),
        lambda: store.size("log/1"),
        lambda: store.list(""),
        lambda: store.delete(["log/1"]),
        lambda: store.settle("log/1"),
        store.prepare_writing,
        store.remove_debris,
        store.close,
    ]
    for call in calls:
        with pytest.raises(Died):
            call()
    assert len(store.calls) == 1
    assert listed(store.survivor()) == {"log/1": 3}


def test_died_is_not_handled_as_an_error() -> None:
    assert not issubclass(Died, Exception)


def test_fail() -> None:
    store = faulty(Fault(Effect.FAIL, operation="put_new"))
    with pytest.raises(StoreUnavailable, match="call 1: put_new 'a'"):
        store.put_new("a", [b"x"])
    assert listed(store.survivor()) == {"log/1": 3}
    assert store.put_new("a", [b"x"])


def test_fail_with_another_error() -> None:
    store = faulty(Fault(Effect.FAIL, operation="put_new", error=StoreFull))
    with pytest.raises(StoreFull):
        store.put_new("a", [b"x"])


def test_lose_the_reply() -> None:
    store = faulty(Fault(Effect.LOSE_REPLY, operation="put_new"))
    with pytest.raises(StoreUnavailable):
        store.put_new("a", [b"x"])
    assert store.put_new("a", [b"x"]) is False
    assert store.get("a", max_bytes=1) == b"x"


def test_a_lost_reply_hides_errors_too() -> None:
    store = faulty(Fault(Effect.LOSE_REPLY, operation="get"))
    with pytest.raises(StoreUnavailable):
        store.get("absent", max_bytes=1)


def test_a_delayed_put_lands_later() -> None:
    store = faulty(Fault(Effect.DELAY, operation="put_new"))
    data = bytearray(b"late")
    with pytest.raises(StoreUnavailable):
        store.put_new("log/2", [data, b"!"])
    data[:] = b"xxxx"
    with pytest.raises(ObjectNotFound):
        store.get("log/2", max_bytes=ANY)
    assert store.release() == 1
    assert store.get("log/2", max_bytes=ANY) == b"late!"
    assert store.release() == 0


def test_a_delayed_put_loses_against_what_came_meanwhile() -> None:
    store = faulty(Fault(Effect.DELAY, operation="put_new"))
    with pytest.raises(StoreUnavailable):
        store.put_new("log/2", [b"late"])
    assert store.put_new("log/2", [b"meanwhile"])
    store.release()
    assert store.get("log/2", max_bytes=ANY) == b"meanwhile"


def test_a_delayed_delete_and_its_arrival_after_death() -> None:
    store = faulty(
        Fault(Effect.DELAY, operation="delete"), Fault(Effect.DIE_BEFORE, operation="get")
    )
    with pytest.raises(StoreUnavailable):
        store.delete(["log/1"])
    with pytest.raises(Died):
        store.get("log/1", max_bytes=ANY)
    assert listed(store.survivor()) == {"log/1": 3}
    assert store.release() == 1
    assert listed(store.survivor()) == {}


def test_delaying_a_read_is_failing_it() -> None:
    store = faulty(Fault(Effect.DELAY, operation="get"))
    with pytest.raises(StoreUnavailable):
        store.get("log/1", max_bytes=ANY)
    assert store.release() == 0


@pytest.mark.parametrize(("bit", "expected"), [(0, b"nne"), (15, b"o\xeee"), (24, b"nne")])
def test_damaged_reads(bit: int, expected: bytes) -> None:
    store = faulty(Fault(Effect.DAMAGE, bit=bit, times=2))
    assert store.get("log/1", max_bytes=ANY) == expected
    into = bytearray(3)
    store.read_into("log/1", 0, memoryview(into))
    assert into == expected
    assert store.get("log/1", max_bytes=ANY) == b"one"


def test_damage_needs_bytes() -> None:
    store = faulty(Fault(Effect.DAMAGE, times=None))
    store.put_new("empty", [])
    assert store.get("empty", max_bytes=0) == b""
    store.read_into("empty", 0, memoryview(bytearray()))
    assert store.size("log/1") == 3


def test_stale_listings() -> None:
    store = faulty(
        Fault(Effect.STALE, operation="list", nth=1, age=1),
        Fault(Effect.STALE, operation="list", nth=2, age=2),
        Fault(Effect.STALE, operation="list", nth=3, age=99),
    )
    store.put_new("log/2", [b"2"])
    store.delete(["log/1"])
    store.put_new("packs/a", [b"a"])
    assert set(listed(store)) == {"log/2"}
    assert set(listed(store)) == {"log/1", "log/2"}
    assert listed(store, "packs/") == {}
    assert set(listed(store)) == {"log/2", "packs/a"}


def test_a_stale_listing_keeps_to_its_prefix() -> None:
    store = faulty(Fault(Effect.STALE, operation="list"))
    store.delete(["log/1"])
    assert listed(store, "packs/") == {}


# -- counting ------------------------------------------------------------------------------


def test_calls_are_counted_in_order() -> None:
    store = faulty()
    store.put_new("a", [b"x"])
    list(store.list("log/"))
    store.delete(["a", "b"])
    store.close()
    assert store.calls == [
        Call(1, "put_new", "a"),
        Call(2, "list", "log/"),
        Call(3, "delete", "a"),
        Call(4, "delete", "b"),
        Call(5, "close", ""),
    ]


def test_a_delete_can_be_cut_in_the_middle() -> None:
    store = faulty(Fault(Effect.DIE_BEFORE, operation="delete", nth=2))
    store.put_new("a", [b"x"])
    with pytest.raises(Died):
        store.delete(["log/1", "a"])
    assert set(listed(store.survivor())) == {"a"}


def test_bad_keys_are_refused_as_by_the_store() -> None:
    store = faulty()
    with pytest.raises(BadKey):
        store.delete(["log/1", "../x"])
    assert listed(store.survivor()) == {"log/1": 3}


def test_calls_from_many_threads_have_their_own_numbers() -> None:
    store = FaultyStore(MemoryStore(), FaultPlan((Fault(Effect.FAIL, nth=50),)))
    failed: list[int] = []

    def work() -> None:
        for n in range(25):
            try:
                store.put_new(f"{threading.get_ident()}/{n}", [b"x"])
            except StoreUnavailable:
                failed.append(n)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(call.number for call in store.calls) == list(range(1, 201))
    assert len(failed) == 1


def test_something_can_happen_between_two_calls() -> None:
    inner = MemoryStore()

    def rival(call: Call) -> None:
        if call.operation == "put_new":
            inner.put_new(call.key, [b"rival"])

    store = FaultyStore(inner, on_call=rival)
    assert store.put_new("log/1", [b"ours"]) is False
    assert store.get("log/1", max_bytes=ANY) == b"rival"


def test_every_call_of_a_commit_can_be_the_last() -> None:
    """The pattern of the crash tests further up, at its smallest."""

    def commit(store: Store) -> None:
        store.prepare_writing()
        store.put_new("packs/a", [b"data"])
        store.put_new("log/1", [b"packs/a"])
        store.delete(["old"])

    whole = FaultyStore(MemoryStore())
    commit(whole)
    seen = set()
    for effect in (Effect.DIE_BEFORE, Effect.DIE_AFTER):
        for number in range(1, len(whole.calls) + 1):
            store = FaultyStore(MemoryStore(), FaultPlan.at(number, effect))
            with suppress(Died):
                commit(store)
            left = frozenset(listed(store.survivor()))
            assert "log/1" not in left or "packs/a" in left
            seen.add(left)
    assert seen == {frozenset(), frozenset({"packs/a"}), frozenset({"packs/a", "log/1"})}
