"""Several processes on one run: exactly one history, and the loser is told."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

import msgspec
import pytest

from holdfast.core.records import Record, RunInfo
from holdfast.errors import BaseLost, CommitUnknown, DamagedObject, Fenced, RunHeld
from holdfast.repo import keys
from holdfast.repo.head import Draft, Head
from holdfast.repo.layout import SEGMENT_RECORDS, TAIL_RECORDS
from holdfast.repo.log import ANCESTORS, KEEP_ENTRIES, PRUNED_TOGETHER, Log
from holdfast.repo.repo import Repo
from holdfast.repo.writer import Writer
from holdfast.stores.base import Store
from holdfast.stores.faulty import Call, Effect, Fault, FaultPlan, FaultyStore
from holdfast.stores.memory import MemoryStore
from tests.repo.support import check, dead, keep_last, process, save


def open_writer(store: MemoryStore | FaultyStore) -> Writer:
    return Writer.open(Repo(store), holder=process(), alive=dead)


def test_a_live_writer_is_refused_and_named() -> None:
    store = MemoryStore("held")
    holder = process()
    first = Writer.open(Repo(store), holder=holder, alive=dead)
    with pytest.raises(RunHeld, match=f"held by process {holder.pid} on {holder.host}"):
        Writer.open(Repo(store), holder=process(), alive=lambda other: True)
    # One that cannot be asked (another host) is fenced instead of waited for.
    second = Writer.open(Repo(store), holder=process(), alive=lambda other: None)
    with pytest.raises(Fenced, match="taken over by pid"):
        save(first, 1)
    second.close()
    third = Writer.open(Repo(store), holder=process(), alive=lambda other: True)
    assert third.epoch > second.epoch


def test_taking_over_is_possible_when_asked_for() -> None:
    store = MemoryStore("held")
    first = Writer.open(Repo(store), holder=process(), alive=dead)
    Writer.open(Repo(store), holder=process(), alive=lambda other: True, take_over=True)
    with pytest.raises(Fenced):
        save(first, 1)


def test_an_overtaken_writer_cannot_commit() -> None:
    store = MemoryStore("overtaken")
    old = open_writer(store)
    save(old, 1)
    work = old.begin()
    old.put_pack(work, b"", [b"in flight"])  # stopped in the middle of a save …
    new = open_writer(store)
    save(new, 2)
    with pytest.raises(Fenced):
        save(old, 3)  # … and continued
    with pytest.raises(Fenced):
        old.collect()
    save(new, 4)
    assert check(store) == [1, 2, 4]


def test_a_number_that_was_used_and_pruned_is_not_believed() -> None:
    """A writer sleeps while others add so many entries that its number is free again."""
    for later in (KEEP_ENTRIES + PRUNED_TOGETHER, KEEP_ENTRIES + ANCESTORS + 5):
        store = MemoryStore("pruned")
        old = open_writer(store)
        save(old, 1)
        new = open_writer(store)
        for step in range(2, later + 2):
            save(new, step, retire=keep_last(2))
        with pytest.raises((Fenced, CommitUnknown)):
            save(old, 99)
        assert 99 not in check(store)


def add_entries(log: Log, head: Head, count: int) -> Head:
    for _ in range(count):
        head, _ = log.commit(lambda head, records: Draft(records, "touch"), base=head, run="r")
    return head


def test_a_first_entry_is_no_base_for_ever() -> None:
    """A process that slept on entry 1 must not create the pruned number 2 again."""
    store = MemoryStore("first")
    slept, busy = Log(store), Log(store)
    first, _ = slept.commit(lambda head, records: Draft(records, "open"), base=None, run="r")
    newest = add_entries(busy, first, KEEP_ENTRIES + PRUNED_TOGETHER + 3)
    mine, _ = slept.commit(lambda head, records: Draft(records, "mine"), base=first, run="r")
    assert mine.number == newest.number + 1
    assert busy.read() == mine


def test_a_parent_that_came_back_late_is_not_believed() -> None:
    """The first of two puts of one entry lands after the entry was pruned; it is then the
    parent of what a process that slept on it creates."""
    store = MemoryStore("back")
    slept, busy = Log(store), Log(store)
    base, _ = slept.commit(lambda head, records: Draft(records, "open"), base=None, run="r")
    base = add_entries(slept, base, 2)
    late = store.get(f"log/{base.number:012}.json", max_bytes=1 << 20)
    newest = add_entries(busy, base, KEEP_ENTRIES + PRUNED_TOGETHER + 3)
    assert store.put_new(f"log/{base.number:012}.json", [late])
    try:
        mine, _ = slept.commit(lambda head, records: Draft(records, "mine"), base=base, run="r")
    except CommitUnknown:
        mine = None
    found = busy.read()
    assert found is not None
    assert found == (mine or newest)


def test_a_prune_beside_a_save_that_reuses() -> None:
    """A guest prunes the base between the save's packs and its entry."""
    store = MemoryStore("beside")
    writer = open_writer(store)
    save(writer, 1)
    base = Repo(store).manifest(save(writer, 2))
    save(writer, 3)

    def prune(call: Call) -> None:
        if call.operation == "put_new" and call.key.startswith("manifests/"):
            Repo(store).amend("prune", lambda records: records[-1:])

    beside = Writer(Repo(FaultyStore(store, on_call=prune)), writer.epoch, writer.head)
    with pytest.raises(BaseLost):
        save(beside, 4, reuse=base)
    assert check(store) == [3]
    save(writer, 5)
    assert check(store) == [3, 5]


def test_a_tag_beside_a_save_is_kept() -> None:
    store = MemoryStore("beside")
    writer = open_writer(store)
    first = save(writer, 1)

    def tag(call: Call) -> None:
        if call.operation == "put_new" and call.key.startswith("manifests/"):
            Repo(store).edit_record("tag", first.id, tags=("gold",))

    beside = Writer(Repo(FaultyStore(store, on_call=tag)), writer.epoch, writer.head)
    save(beside, 2)
    assert check(store) == [1, 2]
    assert Repo(store).records()[0].tags == ("gold",)


def test_a_take_over_beside_a_save_fences_it() -> None:
    store = MemoryStore("beside")
    writer = open_writer(store)
    save(writer, 1)

    def take_over(call: Call) -> None:
        if call.operation == "put_new" and call.key.startswith("log/"):
            open_writer(store)

    beside = Writer(Repo(FaultyStore(store, on_call=take_over)), writer.epoch, writer.head)
    with pytest.raises(Fenced):
        save(beside, 2)
    assert check(store) == [1]


def test_two_processes_never_interleave() -> None:
    """Two threads take the run over from each other; every acknowledged save is there."""
    store = MemoryStore("threads")
    acknowledged: list[tuple[int, str]] = []
    errors: list[Exception] = []
    start = threading.Barrier(2)

    def work(offset: int) -> None:
        start.wait()
        for round_ in range(30):
            try:
                writer = open_writer(store)
                for step in range(5):
                    record = save(writer, 1000 * round_ + 10 * step + offset)
                    acknowledged.append((record.step, record.id))
            except (Fenced, CommitUnknown):
                continue  # overtaken, or too busy a log to be certain: not acknowledged
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    check(store)
    listed = {record.id for record in Repo(store).records()}
    assert {id for _, id in acknowledged} <= listed
    assert len(acknowledged) > 30


def test_guests_and_a_writer_at_once_lose_nothing() -> None:
    store = MemoryStore("guests")
    writer = open_writer(store)
    first = save(writer, 1)

    def tag(name: str) -> None:
        for count in range(20):
            Repo(store).update_record(
                "tag", first.id, lambda r, n=f"{name}{count}": {"tags": (*r.tags, n)}
            )

    threads = [threading.Thread(target=tag, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for step in range(2, 30):
        save(writer, step)
    for thread in threads:
        thread.join()
    assert check(store) == list(range(1, 30))
    assert len(Repo(store).records()[0].tags) == 40


class Overtaken(FaultyStore):
    """Before a segment is read for the first time, `meanwhile` happens."""

    def __init__(self, inner: MemoryStore, meanwhile: Callable[[], object]) -> None:
        super().__init__(inner)
        self._meanwhile: Callable[[], object] | None = meanwhile

    def get(self, key: str, *, max_bytes: int) -> bytes:
        if key.startswith(keys.SEGMENTS) and self._meanwhile is not None:
            meanwhile, self._meanwhile = self._meanwhile, None
            meanwhile()
        return super().get(key, max_bytes=max_bytes)


def overtaken_by_a_prune() -> tuple[Overtaken, list[int]]:
    """A run whose segments a prune replaces as soon as a reader asks for one; what is left."""
    inner = MemoryStore("overtaken")
    writer = open_writer(inner)
    for step in range(2 * (TAIL_RECORDS + SEGMENT_RECORDS)):
        save(writer, step)

    def prune() -> None:
        before = {ref.name for ref in writer.head.entry.segments}
        head = writer.amend("prune", lambda records: records[::3])
        assert before
        assert not before & {ref.name for ref in head.entry.segments}

    steps = list(range(0, 2 * (TAIL_RECORDS + SEGMENT_RECORDS), 3))
    return Overtaken(inner, prune), steps


def test_a_reader_whose_segments_are_replaced_reads_the_newer_list() -> None:
    store, left = overtaken_by_a_prune()
    assert [record.step for record in Repo(store).records()] == left
    store, left = overtaken_by_a_prune()
    assert [r.step for r in Repo(store).newest(1000)] == left[::-1]


def test_a_guest_whose_segments_are_replaced_rebases() -> None:
    store, left = overtaken_by_a_prune()
    seen: list[int] = []

    def change(records: tuple[Record, ...]) -> tuple[Record, ...]:
        seen[:] = [record.step for record in records]
        return records

    Repo(store).amend("tag", change)
    assert seen == left


def test_a_segment_that_is_lost_is_damage() -> None:
    store, _ = overtaken_by_a_prune()
    inner = store.survivor()
    inner.delete([info.key for info in inner.list(keys.SEGMENTS)])
    with pytest.raises(DamagedObject, match="it is missing"):
        Repo(inner).records()
    assert Repo(inner).newest(1)[0].step == 2 * (TAIL_RECORDS + SEGMENT_RECORDS) - 1


def test_a_change_that_lands_late_has_its_segments() -> None:
    """gc leaves what a change of unknown fate has written."""
    inner = MemoryStore("late")
    writer = open_writer(inner)
    steps = list(range(TAIL_RECORDS + SEGMENT_RECORDS))
    for step in steps:
        save(writer, step)
    # The entry that opens the run arrives, those after it only later.
    late = Fault(Effect.DELAY, operation="put_new", prefix=keys.LOG, nth=2, times=None)
    store = FaultyStore(inner, FaultPlan((late,)))
    writer = open_writer(store)

    def tag_the_first(records: tuple[Record, ...]) -> list[Record]:
        return [msgspec.structs.replace(records[0], tags=("old",)), *records[1:]]

    with pytest.raises(CommitUnknown):
        writer.amend("tag", tag_the_first)
    written = {call.key for call in store.calls if call.operation == "put_new"}
    assert any(key.startswith(keys.SEGMENTS) for key in written)
    writer.collect()
    store.release()
    assert check(inner) == steps
    assert Repo(inner).records()[0].tags == ("old",)


def test_a_change_that_is_given_up_protects_nothing() -> None:
    writer = open_writer(MemoryStore("given up"))
    save(writer, 1)

    def give_up(records: tuple[Record, ...]) -> tuple[Record, ...]:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        writer.amend("tag", give_up)
    assert not writer._in_flight


@pytest.mark.parametrize("made", [False, True], ids=["nothing is there", "its first file is"])
def test_two_processes_begin_a_run_at_once(made: bool) -> None:
    """One begins between two calls of the other, any two: one has the run, the other one is
    told that it is held, and nothing is lost."""
    number, calls = 0, 1
    while number < calls:
        number += 1
        inner = MemoryStore("begin")
        if made:
            Repo(inner).put_info(RunInfo(run="0123456789abcdef", created_s=1.0))
        writers: list[Writer] = []

        def begin(store: Store, writers: list[Writer] = writers) -> None:
            writers.append(Writer.open(Repo(store), holder=process(), alive=lambda holder: True))
            save(writers[0], 1)

        def on_call(call: Call, at: int = number, inner: Store = inner) -> None:
            if call.number == at:
                with suppress(RunHeld):
                    begin(inner)

        store = FaultyStore(inner, on_call=on_call)
        with suppress(RunHeld):
            begin(store)
        (writer,) = writers
        save(writer, 2)
        assert check(inner) == [1, 2], f"before call {number}: {store.calls[number - 1]}"
        calls = len(store.calls)
    assert number > 10
