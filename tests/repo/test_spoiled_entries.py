"""Log entries that the store created with other bytes than it was sent (R15)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import pytest

from holdfast.core.types import Buffer
from holdfast.errors import CommitUnknown, CorruptionError, DamagedObject, Fenced, StoredWrong
from holdfast.repo import keys, log
from holdfast.repo.head import Draft
from holdfast.repo.log import KEEP_ENTRIES, PRUNED_TOGETHER, Log
from holdfast.repo.repo import Repo
from holdfast.repo.writer import Writer
from holdfast.stores.base import Store
from holdfast.stores.faulty import Call, Died, Effect, Fault, FaultPlan, FaultyStore
from holdfast.stores.memory import MemoryStore
from tests.repo.support import check, dead, keep_last, live_packs, packs, process, save


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_CREATE_BACKOFF_S", 0.0)


def open_writer(store: Store) -> Writer:
    return Writer.open(Repo(store), holder=process(), alive=dead)


def spoil(nth: int = 1, times: int | None = 1, bit: int = 9) -> FaultPlan:
    """The nth entry that is sent arrives with another bit."""
    fault = Fault(Effect.SPOIL, operation="put_new", prefix=keys.LOG, nth=nth, times=times, bit=bit)
    return FaultPlan((fault,))


def numbers(store: Store) -> list[int]:
    return sorted(keys.entry_number(info.key) or 0 for info in store.list(keys.LOG))


def test_whatever_is_committed_goes_to_the_next_number(caplog: pytest.LogCaptureFixture) -> None:
    """The opening, saves, a prune and the closing: of each the entry arrives wrong once."""
    for nth in range(1, 6):
        for bit in (9, 600, 3001, -1):
            inner = MemoryStore("spoiled")
            store = FaultyStore(inner, spoil(nth, bit=bit))
            writer = open_writer(store)
            save(writer, 1)
            save(writer, 2, retire=keep_last(1))
            assert check(inner) == [2]
            writer.amend("tag", lambda records: records)
            assert not writer.collect()
            writer.close()
            assert packs(inner) == live_packs(Repo(inner).records())
            assert numbers(inner) == [1, 2, 3, 4, 5, 6]
            with caplog.at_level(logging.ERROR):
                save(open_writer(inner), 3)
            assert check(inner) == [2, 3]
    assert "is damaged" not in caplog.text
    assert "rebuilt its list" not in caplog.text


def test_a_guest_goes_on_as_well() -> None:
    inner = MemoryStore("guest")
    writer = open_writer(inner)
    save(writer, 1)
    repo = Repo(FaultyStore(inner, spoil()))
    repo.edit_record("tag", repo.records()[0].id, tags=("gold",))
    with pytest.raises(CommitUnknown):  # the writer cannot tell whose the wrong entry is
        save(writer, 2)
    save(writer, 3)  # on top of the guest's
    assert [record.tags for record in Repo(inner).records()] == [("gold",), ()]
    assert check(inner) == [1, 3]


def test_a_store_that_spoils_everything_is_told_and_goes_on_once_it_is_mended() -> None:
    """Also over more numbers than the log keeps entries: the parent stays all the while."""
    inner = MemoryStore("spoils")
    writer = open_writer(inner)
    save(writer, 1)
    rounds = (KEEP_ENTRIES + PRUNED_TOGETHER) // log._CREATE_ATTEMPTS + 1
    # Each sends four new ones, after it has asked for those that are known.
    puts = sum(log._CREATE_ATTEMPTS * (before + 1) for before in range(rounds))
    store = FaultyStore(inner, spoil(nth=2, times=puts))
    writer = open_writer(store)
    for step in range(rounds):
        with pytest.raises(CommitUnknown, match=r"in a row of the log of .* did not arrive"):
            save(writer, 100 + step)
        assert check(inner) == [1]
    assert len(numbers(inner)) == 3 + log._CREATE_ATTEMPTS * rounds
    for step in range(2, 2 + 2 * PRUNED_TOGETHER):
        save(writer, step)
        assert check(inner) == [*range(1, step + 1)]
        head = Repo(inner).head()
        assert head is not None
        assert head.damage == ()
    assert min(numbers(inner)) > 1
    writer.collect()
    assert packs(inner) == live_packs(Repo(inner).records())


# -- two writers ---------------------------------------------------------------------------


def beside(inner: Store, plan: FaultPlan, number: int, act: Callable[[], object]) -> FaultyStore:
    """Before the put of entry `number` comes `act`, once."""
    acted: list[bool] = []

    def on_call(call: Call) -> None:
        put = call.operation == "put_new" and call.key == keys.entry_key(number)
        if put and not acted:
            acted.append(True)
            act()

    return FaultyStore(inner, plan, on_call=on_call)


def test_of_two_that_leave_a_number_out_one_gets_the_next(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Another process opens the run when it holds the wrong entry only, and repairs it."""
    inner = MemoryStore("two")
    others: list[Writer] = []
    store = beside(inner, spoil(nth=3), 4, lambda: others.append(open_writer(inner)))
    writer = open_writer(store)
    save(writer, 1)
    with caplog.at_level(logging.ERROR), pytest.raises(Fenced):
        save(writer, 2)
    assert "rebuilt its list from 2 whole" in caplog.text  # what was whole but for its entry
    (other,) = others
    save(other, 3)
    assert check(inner) == [1, 2, 3]
    with pytest.raises(Fenced):
        save(writer, 4)
    other.collect()
    assert check(inner) == [1, 2, 3]


def test_a_repair_that_comes_late_continues_what_was_committed() -> None:
    """It has seen the wrong entry, and wants the number that the writer takes before it."""
    inner = MemoryStore("late repair")
    sent: list[bytes] = []

    class Stops(FaultyStore):
        """Its process is gone when entry 4 is on its way."""

        def put_new(self, key: str, parts: Sequence[Buffer]) -> bool:
            if key == keys.entry_key(4):
                sent.append(b"".join(parts))
                raise Died
            return super().put_new(key, parts)

    writer = open_writer(Stops(inner, spoil(nth=3)))
    save(writer, 1)
    with pytest.raises(Died):
        save(writer, 2)
    late = beside(inner, FaultPlan(), 4, lambda: inner.put_new(keys.entry_key(4), sent))
    other = open_writer(late)
    assert len(sent) == 1
    assert check(inner) == [1, 2]
    found = Repo(inner).head()
    assert found is not None
    assert (found.number, found.entry.rebuilt, found.damage) == (5, False, ())
    save(other, 3)
    assert check(inner) == [1, 2, 3]


def test_a_reader_that_sees_the_wrong_entry_reads_the_one_before() -> None:
    inner = MemoryStore("reader")
    seen: list[list[int]] = []
    store = beside(inner, spoil(nth=3), 4, lambda: seen.append(check(inner)))
    writer = open_writer(store)
    save(writer, 1)
    save(writer, 2)
    assert seen == [[1]]
    assert check(inner) == [1, 2]


def test_a_guest_refuses_beside_the_wrong_entry_and_loses_nothing() -> None:
    inner = MemoryStore("guest beside")
    guest = Repo(inner)

    def tag() -> None:
        base = guest.head()
        assert base is not None
        with pytest.raises(DamagedObject, match="its list must be rebuilt"):
            guest.edit_record("tag", guest.records()[0].id, tags=("gold",))

    store = beside(inner, spoil(nth=3), 4, tag)
    writer = open_writer(store)
    save(writer, 1)
    save(writer, 2)
    guest.edit_record("tag", guest.records()[0].id, tags=("gold",))
    save(writer, 3)
    assert [record.tags for record in Repo(inner).records()] == [("gold",), (), ()]


# -- what is not left out --------------------------------------------------------------------


def damage(store: Store, key: str) -> None:
    data = bytearray(store.get(key, max_bytes=1 << 30))
    data[200] ^= 0x20
    store.delete([key])
    assert store.put_new(key, [bytes(data)])


def test_an_entry_of_another_is_never_left_out() -> None:
    """It may have been acknowledged, and gone bad since: a start repairs that, loudly."""
    store = MemoryStore("rot")
    writer = open_writer(store)
    first = save(writer, 1)
    Repo(store).edit_record("tag", first.id, tags=("gold",))
    damage(store, keys.entry_key(3))
    with pytest.raises(CommitUnknown, match="cannot be read back"):
        save(writer, 2)
    assert numbers(store) == [1, 2, 3]
    with pytest.raises(CommitUnknown):
        save(writer, 2)
    assert numbers(store) == [1, 2, 3]
    save(open_writer(store), 3)
    assert check(store)[-1] == 3


def test_what_only_reads_show_is_no_reason_to_leave_a_number_out() -> None:
    """The store says that it holds it wrong, and gives other bytes each time it is read."""

    class Unsteady(FaultyStore):
        reads = 0

        def get(self, key: str, *, max_bytes: int) -> bytes:
            data = bytearray(super().get(key, max_bytes=max_bytes))
            if key == keys.entry_key(3) and self.unsteady:
                self.reads += 1
                data[100 + self.reads] ^= 1
            return bytes(data)

        def put_new(self, key: str, parts: Sequence[Buffer]) -> bool:
            created = super().put_new(key, parts)
            if key == keys.entry_key(3) and created:
                raise StoredWrong("so it seems")
            return created

        unsteady = True

    inner = MemoryStore("unsteady")
    store = Unsteady(inner)
    writer = open_writer(store)
    save(writer, 1)
    with pytest.raises(CommitUnknown):
        save(writer, 2)
    assert numbers(inner) == [1, 2, 3]
    store.unsteady = False
    save(writer, 3)
    assert check(inner) == [1, 2, 3]  # it was whole all the time


def test_an_entry_that_is_whole_after_all_counts() -> None:
    class Doubtful(FaultyStore):
        def put_new(self, key: str, parts: Sequence[Buffer]) -> bool:
            created = super().put_new(key, parts)
            if key.startswith(keys.LOG):
                raise StoredWrong("so it seems")
            return created

    inner = MemoryStore("doubtful")
    writer = open_writer(Doubtful(inner))
    save(writer, 1)
    save(writer, 2)
    assert numbers(inner) == [1, 2, 3]
    assert check(inner) == [1, 2]


def test_what_was_sent_before_is_not_lost_with_what_was_sent_last() -> None:
    """A first try lands late, counts, and is pruned; the second finds the number free, and
    arrives wrong; the number after it was another's. The first may have been committed."""
    inner = MemoryStore("before")
    slept = Log(inner)
    base, _ = slept.commit(lambda head, records: Draft(records, "open"), base=None, run="r")

    def land_and_go_on() -> None:
        assert store.release() == 1
        busy = Log(inner)
        head = busy.read()
        assert head is not None
        assert head.entry.action == "mine"
        for _ in range(KEEP_ENTRIES + PRUNED_TOGETHER):
            head, _ = busy.commit(lambda head, records: Draft(records, "touch"), base=head, run="r")
        assert numbers(inner)[0] > 3

    tries: list[Call] = []

    def on_call(call: Call) -> None:
        if call.operation == "put_new":
            tries.append(call)
            if len(tries) == 2:
                land_and_go_on()

    delayed = Fault(Effect.DELAY, operation="put_new", prefix=keys.LOG)
    spoiled = Fault(Effect.SPOIL, operation="put_new", prefix=keys.LOG, nth=2)
    store = FaultyStore(inner, FaultPlan((delayed, spoiled)), on_call=on_call)
    late = Log(store)
    with pytest.raises(CommitUnknown, match="moved too far"):
        late.commit(lambda head, records: Draft(records, "mine"), base=base, run="r")
    assert [call.key for call in tries] == [keys.entry_key(n) for n in (2, 2, 3)]


def test_one_wrong_reading_of_an_entry_is_no_damage(caplog: pytest.LogCaptureFixture) -> None:
    """Bytes can change on their way: it is read again before it counts as damaged."""
    inner = MemoryStore("reading")
    save(open_writer(inner), 1)
    for nth in range(1, 4):
        fault = Fault(Effect.DAMAGE, operation="get", prefix=keys.LOG, nth=nth, bit=2000)
        with caplog.at_level(logging.ERROR):
            assert check(FaultyStore(inner, FaultPlan((fault,)))) == [1]
    assert caplog.text == ""
    twice = Fault(Effect.DAMAGE, operation="get", prefix=keys.LOG, times=None, bit=2000)
    with pytest.raises(CorruptionError):
        check(FaultyStore(inner, FaultPlan((twice,))))
