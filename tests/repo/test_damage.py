"""A damaged or missing log: readers fall back loudly, a starting writer rebuilds it."""

from __future__ import annotations

import logging
from collections import Counter

import pytest

from holdfast.errors import CorruptionError, DamagedObject, HoldfastError
from holdfast.repo import keys
from holdfast.repo.log import KEEP_ENTRIES, PRUNED_TOGETHER, Log
from holdfast.repo.repo import Repo
from holdfast.repo.writer import Writer
from holdfast.stores.faulty import FaultyStore
from holdfast.stores.memory import MemoryStore
from tests.repo.support import check, dead, keep_last, live_packs, packs, process, save


def open_writer(store: MemoryStore) -> Writer:
    return Writer.open(Repo(store), holder=process(), alive=dead)


def three_saves() -> MemoryStore:
    store = MemoryStore("damage")
    writer = open_writer(store)
    for step in (1, 2, 3):
        save(writer, step, metrics={"loss": step / 10}, tags=(f"t{step}",))
    return store


def damage(store: MemoryStore, key: str, at: int) -> None:
    data = bytearray(store.get(key, max_bytes=1 << 30))
    data[at % len(data)] ^= 0x20
    store.delete([key])
    assert store.put_new(key, [bytes(data)])


def newest_entry(store: MemoryStore) -> str:
    return max(info.key for info in store.list(keys.LOG))


@pytest.mark.parametrize("at", [0, 5, 60, 200, -1])
def test_a_reader_falls_back_from_a_damaged_newest_entry(
    at: int, caplog: pytest.LogCaptureFixture
) -> None:
    store = three_saves()
    damage(store, newest_entry(store), at)
    with caplog.at_level(logging.ERROR):
        assert check(store) == [1, 2]
    assert "is damaged" in caplog.text


def test_a_writer_rebuilds_the_list_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    store = three_saves()
    damage(store, newest_entry(store), 100)
    with caplog.at_level(logging.ERROR):
        writer = open_writer(store)
    assert "rebuilt its list from 3 whole checkpoint(s)" in caplog.text
    assert check(store) == [1, 2, 3]
    records = Repo(store).records()
    assert [r.metrics for r in records] == [{"loss": 0.1}, {"loss": 0.2}, {}]
    assert [r.tags for r in records] == [("t1",), ("t2",), ()]
    save(writer, 4, retire=keep_last(2))
    assert check(store) == [3, 4]
    assert Repo(store).head().damage == ()  # type: ignore[union-attr]


def test_a_log_that_is_gone_is_rebuilt() -> None:
    store = three_saves()
    store.delete([info.key for info in store.list(keys.LOG)])
    with pytest.raises(CorruptionError, match="is missing, but not its checkpoints"):
        check(store)
    save(open_writer(store), 4)
    assert check(store) == [1, 2, 3, 4]


def test_a_log_with_no_usable_entry_is_an_error_to_read_and_rebuilt_to_write() -> None:
    store = three_saves()
    highest = newest_entry(store)
    for info in list(store.list(keys.LOG)):
        damage(store, info.key, 100)
    with pytest.raises(CorruptionError, match="no entry of the log"):
        check(store)
    save(open_writer(store), 4)
    assert check(store) == [1, 2, 3, 4]
    assert newest_entry(store) > highest


def test_an_old_writer_is_fenced_by_a_rebuilt_log() -> None:
    store = MemoryStore("damage")
    old = open_writer(store)
    save(old, 1)
    for info in list(store.list(keys.LOG)):
        damage(store, info.key, 100)
    new = open_writer(store)
    assert new.epoch > old.epoch
    with pytest.raises(HoldfastError, match=r"taken over|cannot be"):
        save(old, 2)
    assert check(store) == [1]


def test_what_is_not_whole_stays_out_of_a_rebuilt_list() -> None:
    store = three_saves()
    records = Repo(store).records()
    store.delete([keys.pack_key(next(iter(records[0].packs)))])
    damage(store, keys.manifest_key(records[1].id), 300)
    damage(store, newest_entry(store), 100)
    open_writer(store)
    assert check(store) == [3]


def test_guests_and_gc_refuse_a_damaged_log() -> None:
    store = three_saves()
    writer = open_writer(store)
    damage(store, newest_entry(store), 100)
    before = packs(store)
    with pytest.raises(DamagedObject, match="log"):
        Repo(store).amend("prune", lambda records: records[-1:])
    with pytest.raises(HoldfastError):
        writer.collect()
    assert packs(store) == before


def test_a_long_list_changed_by_guests_and_by_the_writer() -> None:
    store = MemoryStore("many")
    writer = open_writer(store)
    for step in range(1, 1001):
        save(writer, step)
    entry = newest_entry(store)
    assert len(store.get(entry, max_bytes=1 << 30)) < 100_000
    assert len(check(store)) == 1000
    # A guest's change of an old record is in the entry …
    repo = Repo(store)
    repo.edit_record("tag", repo.records()[3].id, tags=("old",))
    assert len(check(store)) == 1000
    # … and the writer's next save moves it into a segment again.
    save(writer, 1001, retire=lambda records: [records[500].id])
    assert len(store.get(newest_entry(store), max_bytes=1 << 30)) < 100_000
    steps = check(store)
    assert len(steps) == 1000
    assert 501 not in steps
    writer.collect()
    assert packs(store) == live_packs(Repo(store).records())
    listed = {ref.name for ref in Repo(store).head().entry.segments}  # type: ignore[union-attr]
    assert {info.key for info in store.list(keys.SEGMENTS)} == {keys.segment_key(n) for n in listed}


def test_old_log_entries_are_pruned() -> None:
    store = MemoryStore("pruned")
    writer = open_writer(store)
    for step in range(1, 2 * KEEP_ENTRIES):
        save(writer, step, retire=keep_last(2))
        numbers = sorted(keys.entry_number(info.key) or 0 for info in store.list(keys.LOG))
        assert len(numbers) < KEEP_ENTRIES + PRUNED_TOGETHER
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
        assert len(numbers) >= min(numbers[-1], KEEP_ENTRIES)
    assert numbers[0] > 1


def test_damage_of_the_log_is_told_once_and_briefly(caplog: pytest.LogCaptureFixture) -> None:
    store = three_saves()
    for info in list(store.list(keys.LOG))[-5:]:
        if not info.key.endswith("1.json"):
            damage(store, info.key, 100)
    repo = Repo(store)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            assert repo.records() == ()
    (record,) = caplog.records
    first, *lines = record.getMessage().splitlines()
    assert first == "the log of memory://damage is damaged; it is read as of entry 1:"
    assert lines == [
        "  log/000000000004.json: its digest does not match its content",
        "  log/000000000003.json: its digest does not match its content",
        "  log/000000000002.json: its digest does not match its content",
        "  The run's job rebuilds the list of checkpoints when it starts.",
    ]


def test_a_log_that_cannot_be_used_is_given_up_at_once() -> None:
    """Looking again helps where others commit meanwhile; here it is the same twice."""
    store = three_saves()
    count = len([*store.list(keys.LOG)])
    for info in list(store.list(keys.LOG)):
        damage(store, info.key, 100)
    counted = FaultyStore(store)
    with pytest.raises(CorruptionError, match="no entry of the log"):
        Log(counted).read()
    asked = Counter(call.operation for call in counted.calls)
    # Twice each entry, and what is damaged once more, for it may be so only on its way.
    assert asked == {"list": 3, "get": 4 * count}


def test_an_error_about_the_log_names_a_few_entries() -> None:
    store = three_saves()
    save(open_writer(store), 4)
    for info in list(store.list(keys.LOG)):
        damage(store, info.key, 100)
    with pytest.raises(CorruptionError, match="no entry of the log") as caught:
        Repo(store).records()
    lines = caught.value.message.splitlines()
    assert len(lines) == 5
    assert lines[-1] == "  and 3 more"
    assert all(len(line) <= 80 for line in lines)


def test_a_run_without_its_first_file_is_still_a_run(caplog: pytest.LogCaptureFixture) -> None:
    store = three_saves()
    run = Repo(store).info().run
    store.delete([keys.RUN_INFO])
    assert check(store) == [1, 2, 3]
    assert "holdfast.json is missing; going by its log" in caplog.text
    open_writer(store)  # puts it back
    caplog.clear()
    again = Repo(store)
    assert again.info().run == run
    assert again.info().created_s > 0
    assert caplog.text == ""


def test_checkpoints_alone_are_no_new_run() -> None:
    store = three_saves()
    store.delete([*(info.key for info in store.list(keys.LOG)), keys.RUN_INFO])
    with pytest.raises(CorruptionError, match="is missing, but not its checkpoints"):
        check(store)
    open_writer(store)
    assert check(store) == [1, 2, 3]


def test_a_first_file_that_cannot_be_read_is_never_replaced() -> None:
    """It may be of a later format, as its log then is."""
    store = three_saves()
    before = store.get(keys.RUN_INFO, max_bytes=1 << 20)
    damage(store, keys.RUN_INFO, 40)
    damaged = store.get(keys.RUN_INFO, max_bytes=1 << 20)
    open_writer(store)
    assert store.get(keys.RUN_INFO, max_bytes=1 << 20) == damaged != before
    for info in list(store.list(keys.LOG)):
        damage(store, info.key, 100)
    with pytest.raises(CorruptionError):
        open_writer(store)
    assert store.get(keys.RUN_INFO, max_bytes=1 << 20) == damaged
