"""CUDA devices beside the program that uses them: streams of our own, and pinned memory.

The host only ever waits for an event on one of these streams: never for a device, nor for a
stream of the program. Memory is copied in streams that the caching allocator knows nothing
of, but whoever copies keeps the tensor and waits for the copy before it lets go of it, so
that `Tensor.record_stream` is not needed.

CI has no GPU: `python -m tests.gpu` checks all of this on one.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch

from holdfast.core.transfers import Transfer
from holdfast.errors import SaveFailed

logger = logging.getLogger("holdfast")


class _Source(Protocol):
    """What `CudaCopies` asks of the sources of which it is the transport."""

    @property
    def device(self) -> torch.device: ...

    def enqueue(self, offset: int, into: torch.Tensor) -> None:
        """Have the current stream fill `into`, bytes in the host's memory."""
        ...


# torch gives out 32 streams in turn, which are then shared with the program's: a new one for
# each save would soon wait for what the program does in it.
_streams: dict[tuple[str, torch.device], torch.cuda.Stream] = {}
_lock = threading.Lock()
_of_thread = threading.local()
_told = threading.Event()


def side_stream(purpose: str, device: torch.device) -> torch.cuda.Stream:
    """The stream of a device in which all copies of one purpose are made, in turn."""
    with _lock:
        stream = _streams.get((purpose, device))
        if stream is None:
            stream = _streams[purpose, device] = torch.cuda.Stream(device)
        return stream


def recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """What the stream has been asked to do so far."""
    event = torch.cuda.Event(blocking=True)  # else who waits for it keeps a core busy
    event.record(stream)
    return event


def host_memory(nbytes: int) -> torch.Tensor:
    """Fresh bytes, pinned if possible: a device copies to others only while the host waits.
    Raises MemoryError."""
    # Memory that is made in inference mode can only be written in that mode.
    with torch.inference_mode(False), _beside_captures():
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        except RuntimeError as error:
            _tell_once(nbytes, error)
        return torch.from_numpy(np.empty(nbytes, np.uint8))


def _tell_once(nbytes: int, error: RuntimeError) -> None:
    if not _told.is_set():
        _told.set()
        reason = str(error).partition("\n")[0]
        logger.warning(
            "no pinned memory of %d bytes, so copies from a GPU hold up the loop: %s",
            nbytes,
            reason,
        )


def thread_memory(nbytes: int) -> torch.Tensor:
    """So many bytes of the calling thread's, for a moment: the next call gives the same."""
    memory: torch.Tensor | None = getattr(_of_thread, "memory", None)
    if memory is None or memory.numel() < nbytes:
        memory = _of_thread.memory = host_memory(nbytes)
    return memory[:nbytes]


def capturing() -> bool:
    """Whether what the calling thread asks its device to do is not done, but recorded in a
    CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


# CU_STREAM_CAPTURE_MODE_THREAD_LOCAL of cuThreadExchangeStreamCaptureMode, CUDA driver API.
_THREAD_LOCAL = 1


@contextmanager
def _beside_captures() -> Iterator[None]:
    """Inside, the calling thread and a CUDA graph that another one captures do not disturb each
    other. In torch's default mode of capture, "global", one of our calls would otherwise end
    both: CUDA forbids threads to wait for a device unless their own mode says that they have
    nothing to do with what others capture."""
    if (exchange := _exchange_mode()) is None:
        yield
        return
    mode = ctypes.c_int(_THREAD_LOCAL)
    exchange(ctypes.byref(mode))  # what was there is in `mode` now
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))


@functools.cache
def _exchange_mode() -> Callable[..., int] | None:
    """The driver's function, which torch does not offer; None where there is none (ROCm)."""
    try:
        return ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode
    except (OSError, AttributeError):
        return None


@contextmanager
def failing_saves() -> Iterator[None]:
    """Whatever the device refuses fails the save, and not the training."""
    try:
        with _beside_captures():
            yield
    except RuntimeError as error:  # torch.AcceleratorError, OutOfMemoryError
        raise SaveFailed(
            f"tensors could not be copied from the GPU: {error}",
            hint="If the error is the program's own, its next call fails with it, too.",
        ) from error


class _Reached(Transfer):
    """See `Transfer`: over when events of some devices have come."""

    def __init__(self, events: dict[torch.device, torch.cuda.Event]) -> None:
        self._events = events

    def wait(self) -> None:
        with failing_saves():
            for event in self._events.values():
                event.synchronize()

    def hold_back(self) -> None:
        _refuse_capture()
        with failing_saves():
            for device, event in self._events.items():
                torch.cuda.current_stream(device).wait_event(event)


class CudaCopies:
    """The transport of CUDA tensors; implements core.transfers.Transport."""

    def memory(self, nbytes: int) -> memoryview:
        return host_memory(nbytes).numpy().data

    def reached(self, sources: Sequence[_Source]) -> Transfer:
        _refuse_capture()
        with failing_saves():
            events: dict[torch.device, torch.cuda.Event] = {}
            for device in {source.device for source in sources}:
                events[device] = recorded(torch.cuda.current_stream(device))
                # A barrier may be called with another stream than this one.
                side_stream("barrier", device).wait_event(events[device])
            return _Reached(events)

    def begin(
        self, sources: Sequence[_Source], offsets: Sequence[int], into: Sequence[memoryview]
    ) -> Transfer:
        _refuse_capture()
        by_device: defaultdict[torch.device, list[tuple[_Source, int, memoryview]]]
        by_device = defaultdict(list)
        for source, offset, room in zip(sources, offsets, into, strict=True):
            if room.nbytes:
                by_device[source.device].append((source, offset, room))
        with failing_saves():
            events: dict[torch.device, torch.cuda.Event] = {}
            try:
                for device, copies in by_device.items():
                    stream = side_stream("barrier", device)
                    stream.wait_stream(torch.cuda.current_stream(device))
                    with torch.cuda.stream(stream):
                        for source, offset, room in copies:
                            source.enqueue(offset, as_tensor(room))
                    events[device] = recorded(stream)
            except BaseException:
                # Nobody will wait for what was begun, and the memory is given to the next save.
                for device in by_device:
                    side_stream("barrier", device).synchronize()
                raise
            return _Reached(events)


def as_tensor(room: memoryview) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(room, np.uint8))


def _refuse_capture() -> None:
    if capturing():
        raise SaveFailed(
            "a CUDA graph is being captured, and a GPU's state cannot be copied meanwhile",
            hint="Capture graphs in front of the loop, or save when the capture has ended.",
        )
