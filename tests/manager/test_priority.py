"""A save that nobody waits for runs at low priority; one that somebody waits for does not."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from holdfast import CheckpointManager
from holdfast.core.types import Buffer
from holdfast.manager import packer
from holdfast.manager.overlap import Overlap
from holdfast.stores.memory import MemoryStore

pytestmark = pytest.mark.usefixtures("small_packs")

NORMAL = os.getpriority(os.PRIO_PROCESS, 0)
LOW = 19


@pytest.fixture
def small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packer, "PACK_BYTES", 100)


class Watched(MemoryStore):
    """Notes the priority of the thread that puts, and can hold up the first put."""

    def __init__(self) -> None:
        super().__init__("watched")
        self.seen: list[tuple[str, int]] = []
        self.reached = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def put_new(self, key: str, parts: Sequence[Buffer]) -> bool:
        if threading.current_thread().name == "holdfast-saver":
            nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
            self.seen.append((key.partition("/")[0], nice))
            self.reached.set()
            assert self.gate.wait(60)
        return super().put_new(key, parts)


@pytest.mark.parametrize("barrier", [False, True])
def test_what_is_read_in_place_is_read_at_normal_priority(
    barrier: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the barrier: what was not read by then is copied by the training's thread."""
    store = Watched()
    reads: list[tuple[bool, int]] = []
    reading, go_on = threading.Event(), threading.Event()
    read = Overlap._read_in_place

    def watched(self: Overlap, *args: Any) -> bool:
        live = read(self, *args)
        reads.append((live, os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
        reading.set()
        assert go_on.wait(60)
        return live

    monkeypatch.setattr(Overlap, "_read_in_place", watched)
    state = {name: np.full(100_000, n, np.uint8) for n, name in enumerate("abc")}
    with manager(store) as ckpts:
        pending = ckpts.save(1, state, in_place=lambda source, path: True)
        assert reading.wait(60)
        if barrier:
            ckpts.drain()
        go_on.set()
        while not pending.done():  # nobody waits for it
            time.sleep(0.005)
        assert np.array_equal(ckpts.load()["c"], state["c"])
    assert [live for live, _ in reads] == ([True, False, False] if barrier else [True] * 3)
    assert reads[0] == (True, NORMAL)
    assert all(nice == (NORMAL if live else LOW) for live, nice in reads)
    assert ("manifests", LOW) in store.seen, "what is left is not urgent"


def test_a_save_that_compresses_does_not_press(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Watched()
    reads: list[int] = []
    read = Overlap._read_in_place

    def watched(self: Overlap, *args: Any) -> bool:
        reads.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return read(self, *args)

    monkeypatch.setattr(Overlap, "_read_in_place", watched)
    state = {"a": np.zeros(100_000, np.uint8)}
    with CheckpointManager("memory://watched", store=store, keep=None, compress="zstd") as ckpts:
        pending = ckpts.save(1, state, in_place=lambda source, path: True)
        while not pending.done():  # nobody waits for it
            time.sleep(0.005)
    assert set(reads) == {LOW}


STATE = {"a": b"a" * 20_000, "b": b"b" * 20_000}  # two packs, and those of random states


@pytest.fixture
def store() -> Watched:
    return Watched()


def manager(store: Watched) -> CheckpointManager:
    return CheckpointManager("memory://watched", store=store, keep=None)


def check_order(kinds: Sequence[str]) -> None:
    packs = kinds[:-2]
    assert len(packs) >= 2
    assert list(kinds) == ["packs"] * len(packs) + ["manifests", "log"]


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_save_that_nobody_waits_for_yields_to_the_training(store: Watched) -> None:
    with manager(store) as ckpts:
        pending = ckpts.save(1, STATE)
        until(pending.done)
    check_order([kind for kind, _ in store.seen])
    assert {nice for _, nice in store.seen} == {LOW}


def test_a_blocking_save_runs_at_normal_priority(store: Watched) -> None:
    with manager(store) as ckpts:
        ckpts.save(1, STATE, block=True)
        check_order([kind for kind, _ in store.seen])
        assert {nice for _, nice in store.seen} == {NORMAL}
        store.seen.clear()
        until(ckpts.save(2, {"c": 1}).done)  # and later ones at low priority again
        assert {nice for _, nice in store.seen} == {LOW}


@pytest.mark.parametrize("how", ["result", "wait", "close", "save", "blocking save"])
def test_a_save_in_progress_goes_on_at_normal_priority_when_it_is_waited_for(
    how: str, store: Watched
) -> None:
    ckpts = manager(store)
    ckpts.acquire()
    store.gate.clear()
    pending = ckpts.save(1, STATE)
    assert store.reached.wait(60)
    wait = {
        "result": pending.result,
        "wait": ckpts.wait,
        "close": ckpts.close,
        "save": lambda: ckpts.save(2, {"c": 1}),
        "blocking save": lambda: ckpts.save(2, {"c": 1}, block=True),
    }[how]
    waiting = threading.Thread(target=wait)
    waiting.start()
    saver: Any = ckpts._saver
    until(lambda: saver._job.hurried)
    store.gate.set()
    waiting.join()
    ckpts.close()
    # The put that it was in ends where it began.
    first = store.seen[: store.seen.index(("log", NORMAL)) + 1]
    check_order([kind for kind, _ in first])
    assert [nice for _, nice in first] == [LOW] + [NORMAL] * (len(first) - 1)
    with manager(store) as again:
        steps = [1, 2] if how in ("save", "blocking save") else [1]
        assert [info.step for info in again.checkpoints()] == steps
        assert [result.ok for result in again.verify()] == [True] * len(steps)


def test_saves_keep_their_order_however_they_are_waited_for(store: Watched) -> None:
    with manager(store) as ckpts:
        for step in range(40):
            pending = ckpts.save(step, {"x": os.urandom(5000)}, block=step % 3 == 0)
            if step % 5 == 0:
                pending.result()
        ckpts.wait()
        assert [info.step for info in ckpts.checkpoints()] == list(range(40))
        assert all(result.ok for result in ckpts.verify())


def test_ctrl_c_while_waiting_leaves_the_save_alone(store: Watched) -> None:
    ckpts = manager(store)
    ckpts.acquire()
    store.gate.clear()
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        assert store.reached.wait(60)
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            ckpts.save(1, STATE, block=True)
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    store.gate.set()
    ckpts.wait()
    assert [info.step for info in ckpts.checkpoints()] == [1]
    ckpts.close()
    check_order([kind for kind, _ in store.seen])


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # that is the test
def test_a_forked_child_that_waits_does_not_touch_the_save(store: Watched) -> None:
    ckpts = manager(store)
    ckpts.acquire()
    store.gate.clear()
    pending = ckpts.save(1, STATE)
    assert store.reached.wait(60)
    child = os.fork()
    if child == 0:
        store.gate = threading.Event()  # the parent's may have been locked at that moment
        store.gate.set()
        ckpts.wait()
        ckpts.close()
        pending._hurry()
        os._exit(0 if threading.active_count() == 1 and not store.seen[1:] else 1)
    _, status = os.waitpid(child, 0)
    store.gate.set()
    assert pending.result().step == 1
    ckpts.close()
    assert status == 0
    check_order([kind for kind, _ in store.seen])


def test_a_save_is_made_by_its_caller_where_no_thread_can_be_started(
    store: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    with manager(store) as ckpts:
        ckpts.save(1, STATE).result()
        monkeypatch.setattr("_thread.start_new_thread", start)
        monkeypatch.setattr(threading.Thread, "start", start)
        assert ckpts.save(2, STATE).done()
        ckpts.save(3, STATE, block=True)
        assert [info.step for info in ckpts.checkpoints()] == [1, 2, 3]
