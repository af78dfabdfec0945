"""CUDA's streams and events in threads, with tensors of the CPU.

The program's own stream is the host: what it asks for is done at once, and it is held up by
an event that it is told to wait for. Each other stream is a thread, which does what it is
asked to in order and waits only where it is told to. So what is ordered by nothing but luck
on a device comes out of order here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import pytest
import torch

from holdfast.torch import cuda, memory, tensors, together
from holdfast.torch.memory import CudaSource

_current = threading.local()


class Event:
    def __init__(self, *, blocking: bool) -> None:
        assert blocking, "a thread that waits would keep a core busy"
        self._over: threading.Event | None = None

    def record(self, stream: Stream) -> None:
        self._over = threading.Event()
        stream.ask(self._over.set)

    def synchronize(self) -> None:
        assert self._over is not None
        assert self._over.wait(60)


class Stream:
    """See torch.cuda.Stream."""

    def __init__(self, device: torch.device) -> None:
        self._asked: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def ask(self, what: Callable[[], object]) -> None:
        self._asked.put(what)

    def wait_event(self, event: Event) -> None:
        self.ask(event.synchronize)

    def wait_stream(self, stream: Stream) -> None:
        event = Event(blocking=True)
        event.record(stream)
        self.wait_event(event)

    def synchronize(self) -> None:
        event = Event(blocking=True)
        event.record(self)
        event.synchronize()

    def stop(self) -> None:
        self._asked.put(None)
        self._thread.join(60)
        assert not self._thread.is_alive()

    def _work(self) -> None:
        while (what := self._asked.get()) is not None:
            what()


class Host(Stream):
    """The program's stream."""

    def __init__(self) -> None:
        pass

    def ask(self, what: Callable[[], object]) -> None:
        what()


@contextmanager
def _stream(stream: Stream) -> Iterator[None]:
    _current.stream = stream
    try:
        yield
    finally:
        _current.stream = None


class FakeCuda:
    def __init__(self) -> None:
        self.enqueued_nbytes = 0
        self.before_copy: Callable[[], object] = lambda: None
        """Called by a stream in front of each copy."""


@contextmanager
def cpu_tensors_on_a_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """Saves take tensors of the CPU for those of a device."""
    fake, host = FakeCuda(), Host()
    enqueue = CudaSource.enqueue

    def enqueued(self: CudaSource, offset: int, into: torch.Tensor) -> None:
        fake.enqueued_nbytes += into.numel()
        _current.stream.ask(lambda: (fake.before_copy(), enqueue(self, offset, into)))

    def source(tensor: torch.Tensor) -> CudaSource:
        shape = memory.stored_shape(tensor.dtype, tensor.shape)
        return CudaSource(tensor, memory.stored_dtype(tensor.dtype), shape, tensor.nbytes)

    def no_bytes(tensor: torch.Tensor) -> None:
        """The host cannot look at them."""

    def current_stream(device: Any) -> Stream:
        return getattr(_current, "stream", None) or host

    streams: dict[Any, Any] = {}
    monkeypatch.setattr(cuda, "_streams", streams)
    monkeypatch.setattr(cuda, "host_memory", lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", _stream)
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setattr(CudaSource, "enqueue", enqueued)
    monkeypatch.setattr(memory, "_flat_bytes", no_bytes)
    monkeypatch.setattr(CudaSource, "_sample", no_bytes)
    monkeypatch.setattr(tensors, "source_of", source)
    monkeypatch.setattr(together, "TensorSource", CudaSource)
    yield fake
    for stream in streams.values():
        stream.stop()
