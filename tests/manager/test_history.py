"""What saves and restores have cost: kept line by line, and never a reason to fail."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import holdfast
from holdfast.errors import NoStore, RunClosed, RunHeld, SaveFailed, StoreFull
from holdfast.manager.history import (
    EndEvent,
    Event,
    History,
    NoticeEvent,
    RestoreEvent,
    SaveEvent,
    append_outside,
    summarize,
)
from holdfast.manager.listing import Listing
from holdfast.manager.pending import Pending
from holdfast.manager.saver import Saver
from holdfast.repo import keys
from holdfast.stores.base import Store
from holdfast.stores.faulty import Effect, Fault, FaultPlan, FaultyStore
from holdfast.stores.local import LocalStore
from holdfast.stores.memory import MemoryStore

SAVE = SaveEvent(
    time_s=1.5, step=3, id="ab" * 32, total_s=0.25, nbytes=1000, note="every=3", epoch=1
)
RESTORE = RestoreEvent(time_s=2.5, step=3, id="ab" * 32, total_s=0.5, nbytes=1000, epoch=1)


def manager(store: Store, **options: Any) -> holdfast.CheckpointManager:
    return holdfast.CheckpointManager(store.address, store=store, keep=None, **options)


def again(store: Store) -> Store:
    """The same objects for another process: a local store is used once."""
    return LocalStore(store.address) if isinstance(store, LocalStore) else store


def keys_of(store: Store) -> list[str]:
    return sorted(info.key for info in again(store).list(""))


def events_of(store: Store) -> list[Event]:
    """After the manager was closed: an event is added when its save is over, and known to be."""
    with Listing(store.address, store=again(store)) as run:
        return run.events()


def steps_of(store: Store) -> list[int]:
    return [event.step for event in History(store).read() if not isinstance(event, NoticeEvent)]


def writing(store: Store, epoch: int) -> History:
    history = History(store)
    history.begin(epoch)
    return history


def refusing(prefix: str, operation: str, times: int | None = None) -> FaultyStore:
    """A store whose disk is full for some keys."""
    fault = Fault(Effect.FAIL, operation=operation, prefix=prefix, times=times, error=StoreFull)
    return FaultyStore(MemoryStore(), FaultPlan((fault,)))


@pytest.fixture(params=["memory", "local"])
def store(request: pytest.FixtureRequest, tmp_path: Any) -> Store:
    return MemoryStore() if request.param == "memory" else LocalStore(tmp_path / "run")


# -- lines --------------------------------------------------------------------


def test_events_come_back_as_they_were_added(store: Store) -> None:
    history = writing(store, 1)
    assert history.read() == []
    history.add(SAVE)
    history.add(RESTORE)
    assert History(store).read() == [SAVE, RESTORE]
    assert store.get("events/000001.jsonl", max_bytes=10**6).count(b"\n") == 2


def test_writers_have_files_of_their_own(store: Store) -> None:
    """In the order of their epochs, whichever wrote last."""
    writers = {epoch: writing(store, epoch) for epoch in (1, 2, 1_000_000)}
    steps = [(2, 20), (1, 10), (2, 21), (1_000_000, 30), (1, 11)]
    for epoch, step in steps:
        writers[epoch].add(msgspec.structs.replace(SAVE, step=step))
    assert steps_of(store) == [10, 11, 20, 21, 30]


def test_other_objects_there_are_passed_over(store: Store) -> None:
    writing(store, 1).add(SAVE)
    for key in ("events/1.jsonl", "events/000001.json", "events/a/000002.jsonl"):
        store.append(key, msgspec.json.encode(RESTORE))
    assert History(store).read() == [SAVE]


ENCODED = msgspec.json.encode(SAVE)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\0" * 100,
        b"\xff\xfe" + ENCODED,
        b"null",
        b"[" * 100_000,
        ENCODED.replace(b"{", b'{"deep":' + b"[" * 100_000 + b"]" * 100_000 + b",", 1),
        ENCODED.replace(b"every", b"\xff"),
        ENCODED.replace(b'"save"', b'"prune"'),
        ENCODED.replace(b'"step":3', b'"step":"3"'),
        ENCODED.replace(b'"step":3', b'"step":-3'),
        ENCODED.replace(b'"step":3,', b""),
        ENCODED.replace(b"1000", b"1" * 5000),
        ENCODED.replace(b"1000", str(2**63).encode()),
        ENCODED.replace(b"0.25", b"1e300"),
        ENCODED.replace(b"0.25", b"1e400"),
        ENCODED.replace(b"0.25", b"NaN"),
        ENCODED.replace(b"0.25", b"-1.0"),
    ],
)
def test_a_line_that_says_nothing_hides_no_other(store: Store, line: bytes) -> None:
    assert line != ENCODED
    store.append(keys.events_key(1), ENCODED + b"\n" + line + b"\n" + msgspec.json.encode(RESTORE))
    assert History(store).read() == [SAVE, RESTORE]


def test_every_torn_end_is_left_out(store: Store) -> None:
    for length in range(len(ENCODED)):
        store.append(keys.events_key(length + 1), ENCODED + b"\n" + ENCODED[:length])
    epochs = range(1, len(ENCODED) + 1)
    assert History(store).read() == [msgspec.structs.replace(SAVE, epoch=n) for n in epochs]


def test_fields_of_a_later_version_do_not_hide_an_event(store: Store) -> None:
    store.append(keys.events_key(1), ENCODED.replace(b"{", b'{"energy_j":5.0,', 1))
    assert History(store).read() == [SAVE]


def test_events_that_cannot_be_read_are_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = MemoryStore()
    writing(store, 1).add(SAVE)
    for _ in range(10):
        writing(store, 2).add(RESTORE)
    monkeypatch.setattr("holdfast.manager.history._MAX_BYTES", 2 * len(ENCODED))
    assert History(store).read() == [SAVE]
    assert "events were left out" in caplog.text


# -- what is recorded ---------------------------------------------------------


def test_saves_are_recorded(store: Store) -> None:
    state = {"x": np.arange(1000.0), "s": "text"}
    with manager(store) as ckpts:
        first = ckpts.save(5, state, note="every=5")
        while not first.done():
            pass  # no wait that could be seen
        info = first.result()
        ckpts.save(6, state, block=True)
    one, two = events_of(store)
    assert isinstance(one, SaveEvent)
    assert isinstance(two, SaveEvent)
    assert one == first.stats
    assert (one.step, one.id, one.note, one.error) == (5, info.id, "every=5", "")
    assert one.nbytes >= 8000
    assert one.written_nbytes == info.new_bytes >= 8000
    assert two.written_nbytes < 8000
    assert one.stall_s == one.waited_s + one.capture_s + one.barrier_s < one.total_s
    assert (one.blocked, two.blocked) == (False, True)
    assert 0 < two.result_s < two.stall_s <= two.total_s, "it waited to the end"


def test_a_store_that_takes_no_events_fails_no_save() -> None:
    store = refusing(keys.EVENTS, "append")
    with manager(store) as ckpts:
        for step in (1, 2):
            ckpts.save(step, {"x": step}).result()
        restored = ckpts.restore()
        assert restored is not None
        assert restored.info.step == 2
    assert events_of(store) == []


def test_failed_saves_are_recorded_with_their_error() -> None:
    store = refusing(keys.PACKS, "put_new", times=1)
    with manager(store) as ckpts:
        with pytest.raises(StoreFull) as raised:
            ckpts.save(1, {"x": np.arange(10_000.0)}).result()
        ckpts.save(2, {"x": np.arange(10_000.0)}).result()
    failed, done = events_of(store)
    assert isinstance(failed, SaveEvent)
    assert isinstance(done, SaveEvent)
    assert (failed.step, failed.id, failed.error) == (1, "", raised.value.message)
    assert failed.nbytes >= 80_000
    assert failed.written_nbytes == 0
    assert (done.step, done.error) == (2, "")


WAITS = {
    "result": lambda ckpts, pending: pending.result(),
    "wait": lambda ckpts, pending: ckpts.wait(),
    "close": lambda ckpts, pending: ckpts.close(),
}


class Gate(MemoryStore):
    """Writes a pack no sooner than somebody waits for the save."""

    def __init__(self) -> None:
        super().__init__()
        self.opened = threading.Event()

    def put_new(self, key: str, *args: Any, **options: Any) -> Any:
        if key.startswith(keys.PACKS):
            assert self.opened.wait(60)
        return super().put_new(key, *args, **options)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate, hurry = Gate(), Saver.hurry

    def hurried(saver: Saver) -> None:
        busy = saver._job is not None
        hurry(saver)
        if busy:
            gate.opened.set()

    monkeypatch.setattr(Saver, "hurry", hurried)
    return gate


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
@pytest.mark.parametrize("fails", [False, True])
def test_what_the_thread_that_saved_waits_is_recorded(gate: Gate, wait: Any, fails: bool) -> None:
    fault = Fault(Effect.FAIL, operation="put_new", prefix=keys.MANIFESTS, error=StoreFull)
    store = FaultyStore(gate, FaultPlan((fault,) if fails else ()))
    with suppress(StoreFull, SaveFailed), manager(store) as ckpts:
        wait(ckpts, ckpts.save(1, {"x": np.arange(10_000.0)}))
    (event,) = events_of(gate)
    assert isinstance(event, SaveEvent)
    assert event.result_s > 0
    assert bool(event.error) == fails
    assert event.stall_s == pytest.approx(event.waited_s + event.capture_s + event.result_s)


def test_what_others_wait_is_not_recorded(gate: Gate) -> None:
    """A thread that uploads what is saved, or tells of it, holds up no training."""
    with manager(gate) as ckpts:
        pending = ckpts.save(1, {"x": np.arange(10_000.0)})
        with ThreadPoolExecutor() as others:
            found = [
                others.submit(wait, ckpts, pending) for wait in (WAITS["result"], WAITS["wait"])
            ]
            for future in found:
                future.result()
    (event,) = events_of(gate)
    assert isinstance(event, SaveEvent)
    assert event.result_s == 0


def test_a_wait_in_the_next_save_is_recorded_once(gate: Gate) -> None:
    with manager(gate) as ckpts:
        ckpts.save(1, {"x": np.arange(10_000.0)})
        second = ckpts.save(2, {"x": np.arange(10_000.0)})
        while not second.done():
            pass
    one, two = events_of(gate)
    assert isinstance(one, SaveEvent)
    assert isinstance(two, SaveEvent)
    assert one.result_s == two.result_s == 0
    assert two.waited_s > one.waited_s


def test_waits_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr("holdfast.manager.pending.time.perf_counter", lambda: now_s)
    pending = Pending(1)
    with pending.awaited():
        now_s = 2.0
        with pending.awaited():  # a signal's handler
            now_s = 3.0
        assert pending.result_s == 3.0
    now_s = 10.0
    with pytest.raises(SaveFailed), pending.awaited():
        now_s = 11.0
        raise SaveFailed("not done after 1 s")
    with ThreadPoolExecutor() as others:
        others.submit(pending.awaited().__enter__).result()
    now_s = 20.0
    assert pending.result_s == 4.0
    pending.failed(SaveFailed("failed"))
    with pending.awaited():
        now_s = 30.0
    assert pending.result_s == 4.0


def test_a_save_that_no_thread_can_carry_out_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    with manager(store) as ckpts:
        ckpts.acquire()
        monkeypatch.setattr(Saver, "_start", lambda *_, **__: False)
        ckpts.save(1, {"x": np.arange(1000.0)})
    (event,) = events_of(store)
    assert isinstance(event, SaveEvent)
    assert event.result_s > event.write_s


def test_restores_of_the_writer_are_recorded(store: Store) -> None:
    with manager(store) as ckpts:
        ckpts.save(1, {"x": np.arange(1000.0)}).result()
    with manager(again(store)) as ckpts:
        ckpts.acquire()
        restored = ckpts.restore()
        assert restored is not None
    save, restore = events_of(store)
    assert isinstance(save, SaveEvent)
    assert isinstance(restore, RestoreEvent)
    assert (restore.step, restore.id) == (1, restored.info.id)
    assert restore.nbytes == restored.info.nbytes
    assert restore.total_s > 0


@pytest.mark.parametrize("begin", ["save", "acquire", "gc"])
def test_a_restore_is_recorded_once_its_process_writes(store: Store, begin: str) -> None:
    state = {"x": np.arange(1000.0)}
    with manager(store) as ckpts:
        ckpts.save(1, state).result()
    with manager(again(store)) as ckpts:
        restored = ckpts.restore()
        assert len(ckpts.events()) == 1
        assert restored is not None
        ckpts.save(2, state).result() if begin == "save" else getattr(ckpts, begin)()
    _, restore, *saves = events_of(store)
    assert isinstance(restore, RestoreEvent)
    assert (restore.step, restore.id) == (1, restored.info.id)
    assert len(saves) == (begin == "save")


def test_who_only_looks_adds_nothing(store: Store) -> None:
    """Nor who changes a mark; and a store that another process writes is left as it is."""
    with manager(store) as ckpts:
        ckpts.save(1, {"x": 1}).result()
    before, objects = events_of(store), keys_of(store)
    with manager(again(store)) as other:
        for _ in range(200):
            assert other.restore() is not None
        assert other.load()["x"] == 1
    assert keys_of(store) == objects
    with manager(again(store)) as other:
        assert other.restore() is not None
        other.tag(1, "good")
    assert events_of(store) == before != []


def test_few_restores_are_kept_for_later() -> None:
    store = MemoryStore()
    history = History(store)
    for step in range(1000):
        history.add(msgspec.structs.replace(RESTORE, step=step))
    assert history.read() == []
    history.begin(7)
    steps = steps_of(store)
    assert steps == list(range(1000))[-len(steps) :]
    assert 10 < len(steps) < 1000


def test_a_writer_that_is_refused_records_no_restore(store: Store) -> None:
    with manager(store) as ckpts:
        ckpts.save(1, {"x": 1})
        ckpts.wait()
        before = keys_of(store)
        with manager(again(store)) as other:
            assert other.restore() is not None
            with pytest.raises(RunHeld):
                other.acquire()
            assert keys_of(store) == before


# -- by what watched over the process -------------------------------------------

KILLED = EndEvent(time_s=3.5, why="killed", signal=9)


def test_who_watched_adds_to_the_history_of_the_newest_writer(tmp_path: Path) -> None:
    address = str(tmp_path / "run")
    for step in (1, 2):
        with manager(LocalStore(address)) as ckpts:
            ckpts.save(step, {"x": step}, block=True)
            assert not append_outside(address, [KILLED]), "its writer is alive"
    # It died in the middle of a line.
    LocalStore(address).append(keys.events_key(2), ENCODED[:50])
    assert append_outside(address, [KILLED, RESTORE])
    found = History(LocalStore(address)).read()
    assert [(event.epoch, type(event).__name__) for event in found] == [
        (1, "SaveEvent"),
        (2, "SaveEvent"),
        (2, "EndEvent"),
        (2, "RestoreEvent"),
    ]
    assert found[2] == msgspec.structs.replace(KILLED, epoch=2)
    with manager(LocalStore(address)) as ckpts:
        assert ckpts.latest() is not None, "and the run is as it was"


def test_who_watched_changes_nothing_where_no_run_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for address in (tmp_path / "nothing", "s3://", "xyz://a"):
        assert not append_outside(address, [KILLED])
    assert list(tmp_path.iterdir()) == []
    with manager(LocalStore(tmp_path / "run")) as ckpts:
        ckpts.acquire()
    refused = FaultyStore(
        LocalStore(tmp_path / "run"),
        FaultPlan((Fault(Effect.FAIL, operation="append", error=StoreFull),)),
    )
    monkeypatch.setattr("holdfast.stores.open.open_store", lambda address: refused)
    assert not append_outside(tmp_path / "run", [KILLED])


# -- reading a run ------------------------------------------------------------


def test_a_run_without_events_is_no_error_and_no_run_is_one(store: Store) -> None:
    with Listing(store.address, store=store) as run, pytest.raises(NoStore):
        run.events()
    with manager(again(store)) as ckpts:
        ckpts.acquire()
        assert ckpts.events() == []
    with pytest.raises(RunClosed):
        ckpts.events()


# -- all of them --------------------------------------------------------------


def save(step: int, **fields: Any) -> SaveEvent:
    return SaveEvent(time_s=0.0, step=step, **fields)


def test_summary() -> None:
    events: list[Event] = [
        save(1, capture_s=0.1, total_s=2.0, nbytes=100, written_nbytes=100, write_s=1.0),
        save(2, capture_s=0.1, waited_s=0.2, total_s=4.0, nbytes=100, written_nbytes=10),
        save(3, barrier_s=0.2, total_s=99.0, nbytes=100, write_s=50.0, error="full"),
        save(4, result_s=3.0, total_s=3.0, blocked=True, nbytes=100, written_nbytes=0, write_s=0.5),
        RESTORE,
        RESTORE,
    ]
    found = summarize(events)
    assert (found.saves, found.failed, found.restores) == (4, 1, 2)
    assert found.median_stall_s == pytest.approx(0.25)
    assert found.largest_stall_s == 3.0
    assert found.median_total_s == 3.0
    assert (found.nbytes, found.written_nbytes, found.write_s) == (300, 110, 1.5)
    assert (found.restored_nbytes, found.restore_s) == (2000, 1.0)


def test_summary_of_nothing() -> None:
    found = summarize([])
    assert (found.saves, found.failed, found.restores) == (0, 0, 0)
    assert (found.median_stall_s, found.largest_stall_s, found.median_total_s) == (None,) * 3
    assert summarize([save(1, error="full")]).median_total_s is None
