"""Saves of leaves that a device copies, which works through queues of its own.

The device here is two threads. What the program asks for is done in the order in which it
asks, and as late as a test likes; copies are made by another queue. Like the real ones, the
queues wait for each other only where they are told to.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.core import arrays
from holdfast.core.copying import copy_ranges
from holdfast.errors import SaveFailed, TornRead
from holdfast.manager import overlap, packer, snapshot
from holdfast.manager.overlap import LiveLeaf, Overlap
from holdfast.stores.memory import MemoryStore

SIZE = 4096
PART = 256


class Queue:
    """Does what it is asked to, in order, in a thread of its own."""

    def __init__(self) -> None:
        self._asked: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def ask(self, what: Callable[[], object]) -> None:
        self._asked.put(what)

    def finish(self) -> None:
        done = threading.Event()
        self.ask(done.set)
        assert done.wait(30)

    def stop(self) -> None:
        self._asked.put(None)
        self._thread.join(30)
        assert not self._thread.is_alive()

    def _work(self) -> None:
        while (what := self._asked.get()) is not None:
            what()


class FakeTransfer:
    def __init__(self, device: Device, over: threading.Event, *, fails: bool = False) -> None:
        self._device = device
        self._over = over
        self._fails = fails

    def wait(self) -> None:
        self._device.waited.set()
        assert self._over.wait(30)
        if self._fails:
            raise SaveFailed("the copy failed")

    def hold_back(self) -> None:
        self._device.held_back += 1
        if self._device.fails == "hold back":
            raise SaveFailed("the queue is gone")
        self._device.program.ask(lambda: self._over.wait(30))


class Device:
    """The transport of arrays on it."""

    def __init__(self) -> None:
        self.program = Queue()
        self.copies = Queue()
        self.arrays: list[np.ndarray] = []
        self.versions: dict[int, int] = {}
        self.fails = ""
        self.waited = threading.Event()
        """The host has begun to wait for something."""
        self.held_back = 0
        self.reads = 0
        """Parts that were read in place."""
        self.fetched_nbytes = 0
        self.gates: list[threading.Event] = []

    def array(self, value: int = 0) -> np.ndarray:
        array = np.full(SIZE, value, np.uint8)
        self.arrays.append(array)
        self.versions[id(array)] = 0
        return array

    def write(self, array: np.ndarray, value: int, *, unnoticed: bool = False) -> None:
        """Asked for by the program; done when its turn has come."""
        self.versions[id(array)] += not unnoticed
        self.program.ask(lambda: array.fill(value))

    def gate(self, queue: Queue) -> threading.Event:
        """Nothing that `queue` is asked for is done until this is set."""
        gate = threading.Event()
        self.gates.append(gate)
        queue.ask(lambda: gate.wait(30))
        return gate

    def stop(self) -> None:
        for gate in self.gates:
            gate.set()
        self.program.stop()
        self.copies.stop()

    # -- holdfast.core.transfers.Transport

    def memory(self, nbytes: int) -> memoryview:
        return memoryview(bytearray(nbytes))

    def reached(self, sources: Sequence[Any]) -> FakeTransfer:
        if self.fails == "reached":
            raise SaveFailed("the device is gone")
        over = threading.Event()
        self.program.ask(over.set)
        return FakeTransfer(self, over)

    def begin(
        self, sources: Sequence[Any], offsets: Sequence[int], into: Sequence[memoryview]
    ) -> FakeTransfer:
        if self.fails == "begin":
            raise SaveFailed("the device is gone")
        before, over = threading.Event(), threading.Event()
        self.program.ask(before.set)
        self.copies.ask(lambda: before.wait(30))
        for source, offset, room in zip(sources, offsets, into, strict=True):
            self.fetched_nbytes += room.nbytes
            self.copies.ask(lambda s=source, o=offset, r=room: copy_ranges([(s, o, r)]))
        self.copies.ask(over.set)
        return FakeTransfer(self, over, fails=self.fails == "copy")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    monkeypatch.setattr(snapshot, "SMALL_BYTES", 1024)
    monkeypatch.setattr(packer, "SMALL_BYTES", 1024)
    monkeypatch.setattr(overlap, "_READ_BYTES", PART)
    found = Device()
    plain = arrays.ArraySource

    class DeviceSource(plain):
        transport = found

        def mark(self) -> object:
            return found.versions[id(self._array)]

        def copy_range(self, offset: int, into: memoryview) -> None:
            found.reads += threading.current_thread().name == "holdfast-saver"
            super().copy_range(offset, into)

    def source(array: np.ndarray) -> arrays.ArraySource:
        return (DeviceSource if any(array is one for one in found.arrays) else plain)(array)

    monkeypatch.setattr(arrays, "ArraySource", source)
    yield found
    found.stop()


@pytest.fixture
def manager(device: Device) -> Iterator[holdfast.CheckpointManager]:
    store = MemoryStore()
    with holdfast.CheckpointManager(store.address, store=store, keep=None) as found:
        yield found
        found.wait()


def always(source: object, path: str) -> bool:
    return path.startswith("live")


def test_neither_a_save_nor_its_barrier_waits_for_the_device(
    device: Device, manager: holdfast.CheckpointManager
) -> None:
    live = device.array()
    kernels = device.gate(device.program)
    device.write(live, 1)  # the last step, not done yet
    pending = manager.save(1, {"live": live}, in_place=always)
    assert device.waited.wait(30)  # the save waits for the device, and not with a read
    device.waited.clear()
    copying = device.gate(device.copies)
    manager.drain()
    assert not kernels.is_set()
    device.write(live, 2)  # the next step
    kernels.set()
    copying.set()
    pending.result()
    device.program.finish()
    assert live.tolist() == [2] * SIZE
    assert manager.load(1)["live"].tolist() == [1] * SIZE
    assert device.fetched_nbytes == SIZE
    assert device.reads == 0


def test_the_device_is_held_back_until_the_copy_is_made(
    device: Device, manager: holdfast.CheckpointManager
) -> None:
    live = device.array(1)
    kernels, copying = device.gate(device.program), device.gate(device.copies)
    pending = manager.save(1, {"live": live}, in_place=always)
    manager.drain()
    device.write(live, 2)
    ran = threading.Event()
    device.program.ask(ran.set)
    kernels.set()
    assert not ran.wait(0.05)
    copying.set()
    pending.result()
    device.program.finish()
    assert manager.load(1)["live"].tolist() == [1] * SIZE


def test_nothing_is_read_before_the_device_has_reached_the_boundary(
    device: Device, manager: holdfast.CheckpointManager
) -> None:
    live = device.array()
    kernels = device.gate(device.program)
    device.write(live, 1)
    pending = manager.save(1, {"live": live}, in_place=always)
    assert device.waited.wait(30)
    assert device.reads == 0
    kernels.set()
    pending.result()
    assert manager.load(1)["live"].tolist() == [1] * SIZE
    assert device.reads == SIZE // PART
    assert device.fetched_nbytes == 0


def test_the_barrier_takes_only_what_is_left(
    device: Device, manager: holdfast.CheckpointManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = (np.arange(SIZE) % 251).astype(np.uint8)
    live = device.array()
    live[:] = expected = host[::-1].copy()
    half, behind = threading.Event(), threading.Event()
    read = Overlap._read_in_place

    def reading(self: Overlap, leaf: LiveLeaf, offset: int, into: memoryview) -> bool:
        if leaf.path == "live" and offset == SIZE // 2:
            half.set()
            assert behind.wait(30)
        return read(self, leaf, offset, into)

    monkeypatch.setattr(Overlap, "_read_in_place", reading)
    pending = manager.save(1, {"live": live, "live on the host": host}, in_place=always)
    assert half.wait(30)
    manager.drain()
    device.write(live, 2)
    host.fill(2)
    device.program.finish()
    behind.set()
    result = pending.result()
    saved = manager.load(1)
    assert np.array_equal(saved["live"], expected)
    assert np.array_equal(saved["live on the host"], expected[::-1])
    assert device.fetched_nbytes == SIZE // 2
    assert result.step == 1
    assert pending.stats is not None
    assert pending.stats.copied_nbytes >= SIZE // 2 + SIZE


def test_what_is_not_protected_is_there_when_the_save_returns(
    device: Device, manager: holdfast.CheckpointManager
) -> None:
    buffer, small = device.array(), device.array()[:100].copy()
    device.arrays.append(small)
    device.versions[id(small)] = 0
    kernels = device.gate(device.program)
    device.write(buffer, 1)
    device.write(small, 1)
    saving = threading.Thread(target=lambda: manager.save(1, {"a": small, "b": buffer}))
    saving.start()
    assert device.waited.wait(30)
    assert saving.is_alive()
    kernels.set()
    saving.join(30)
    assert not saving.is_alive()
    # Another queue than the one that was asked to wait may change it now.
    buffer.fill(2)
    small.fill(2)
    manager.wait()
    saved = manager.load(1)
    assert saved["a"].tolist() == [1] * 100
    assert saved["b"].tolist() == [1] * SIZE


@pytest.mark.parametrize(
    ("what", "way"),
    [
        ("begin", "at once"),
        ("copy", "at once"),
        ("reached", "in place"),
        ("begin", "in place"),
        ("copy", "in place"),
        ("hold back", "in place"),
    ],
)
def test_a_device_that_fails_fails_the_save_alone(
    what: str, way: str, device: Device, manager: holdfast.CheckpointManager
) -> None:
    state = {"live" if way == "in place" else "buffer": device.array(1)}
    device.fails = what
    kernels = device.gate(device.program) if way == "in place" else None
    pending = manager.save(1, state, in_place=always)
    manager.drain()
    if kernels is not None:
        kernels.set()
    with pytest.raises(SaveFailed):
        pending.result()
    device.fails = ""
    manager.save(2, state, in_place=always).result()
    (info,) = manager.checkpoints()
    assert info.step == 2
    assert all(result.ok for result in manager.verify())


def test_memory_is_used_again_only_when_the_device_is_done_with_it(
    device: Device, manager: holdfast.CheckpointManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The save has failed, but its copies are still on their way."""
    live = device.array(1)
    drained = threading.Event()

    def fail(self: packer.Packer, *args: Any) -> None:
        assert drained.wait(30)
        raise OSError("disk full")

    copying = device.gate(device.copies)
    with monkeypatch.context() as patch:
        patch.setattr(packer.Packer, "_take", fail)
        pending = manager.save(1, {"live": live}, in_place=always)
        assert device.waited.wait(30)
        manager.drain()
        device.waited.clear()
        drained.set()
        assert device.waited.wait(30)  # the end of the save waits for the copy
        assert not manager._memories._spare
        copying.set()
        with pytest.raises(SaveFailed, match="disk full"):
            pending.result()
    manager.save(2, {"live": live}, in_place=always).result()
    assert manager.load(2)["live"].tolist() == [1] * SIZE


@pytest.mark.parametrize("read", [True, False], ids=["read", "copied by the barrier"])
def test_a_change_that_is_asked_for_in_front_of_the_barrier_is_seen(
    read: bool, device: Device, manager: holdfast.CheckpointManager
) -> None:
    live = device.array(1)
    kernels = device.gate(device.program)
    pending = manager.save(1, {"live": live}, in_place=always)
    device.write(live, 2)
    if not read:
        manager.drain()
    kernels.set()
    with pytest.raises(TornRead):
        pending.result()
    # Copied at once from then on, and so without a barrier.
    pending = manager.save(2, {"live": live}, in_place=always)
    live.fill(3)
    pending.result()
    assert manager.load(2)["live"].tolist() == [2] * SIZE


def test_each_barrier_holds_back_its_own_queue_while_copies_are_made(
    device: Device, manager: holdfast.CheckpointManager
) -> None:
    live = device.array(1)
    copying = device.gate(device.copies)
    kernels = device.gate(device.program)
    pending = manager.save(1, {"live": live}, in_place=always)
    manager.drain()
    manager.drain()  # in front of another optimizer's step, in another stream
    assert device.held_back == 2
    kernels.set()
    copying.set()
    pending.result()
    manager.wait()
    manager.drain()
    assert device.held_back == 2


# -- leaves that seem unchanged, where nothing but a version tells -------------------------


def test_a_mark_alone_is_not_believed(device: Device, manager: holdfast.CheckpointManager) -> None:
    """A compiled step, or a replayed graph, changes tensors and no version."""
    weight = device.array()
    for step in range(1, 7):
        device.write(weight, step, unnoticed=True)
        manager.save(step, {"weight": weight}, in_place=always).result()
    assert [int(manager.load(step)["weight"][0]) for step in range(1, 7)] == [1, 2, 3, 4, 5, 6]
    assert device.reads == 0


def test_what_was_seen_not_to_change_is_not_copied(
    device: Device, manager: holdfast.CheckpointManager
) -> None:
    frozen = {name: device.array(ord(name)) for name in "abc"}
    fetched: list[int] = []
    for step in range(1, 5):
        manager.save(step, frozen, in_place=always).result()
        fetched.append(device.fetched_nbytes)
    assert fetched == [3 * SIZE, 6 * SIZE, 6 * SIZE, 6 * SIZE]
    # All of them change, and one save fails: not one for each.
    for array in frozen.values():
        device.write(array, 7, unnoticed=True)
    with pytest.raises(TornRead):
        manager.save(5, frozen, in_place=always).result()
    for step in range(6, 9):
        manager.save(step, frozen, in_place=always).result()
        assert [int(manager.load(step)[name][0]) for name in "abc"] == [7, 7, 7]
