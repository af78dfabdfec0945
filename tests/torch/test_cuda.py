"""What of saves from CUDA devices can be tested without one.

Streams and events are faked (tests/support/fake_cuda.py); that the real ones do the same is
checked on a device, by `python -m tests.gpu`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast
from holdfast.errors import SaveFailed, StateError
from holdfast.manager import packer, snapshot
from holdfast.torch import cuda, memory, overlap
from holdfast.torch.memory import CudaSource, source_of, stored_dtype, stored_shape
from tests.support.fake_cuda import FakeCuda, cpu_tensors_on_a_device
from tests.torch.roundtrip import bits


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    monkeypatch.setattr(snapshot, "SMALL_BYTES", 64)
    monkeypatch.setattr(packer, "SMALL_BYTES", 64)
    with cpu_tensors_on_a_device(monkeypatch) as found:
        yield found


def cuda_source(tensor: torch.Tensor) -> CudaSource:
    shape = stored_shape(tensor.dtype, tensor.shape)
    return CudaSource(tensor, stored_dtype(tensor.dtype), shape, tensor.nbytes)


def test_where_a_tensor_is_says_how_it_is_read() -> None:
    assert type(source_of(torch.ones(2))) is memory.TensorSource
    assert cuda_source(torch.ones(2)).transport is CudaSource.transport


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(3, 5, 7),
        lambda: torch.randn(3, 5, 7).permute(2, 0, 1),
        lambda: torch.randn(4, 6, dtype=torch.float64)[:, ::2],
        lambda: torch.randn(4, 6).to(torch.bfloat16).t(),
        lambda: torch.randn(4, 6, dtype=torch.complex128).t(),
        lambda: torch.randn(1, 5).expand(4, 5),
        lambda: torch.randn(20)[3:11],
        lambda: torch.tensor(1.5),
        lambda: torch.empty(0, 3),
        lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        lambda: torch.tensor([True, False, True]),
    ],
)
def test_any_range_of_any_layout(
    make: Callable[[], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_GATHER_BYTES", 16)
    tensor = make()
    expected = bits(tensor)
    source = cuda_source(tensor)
    for first in range(0, len(expected) + 1, 3):
        for size in (0, 1, 16, 37, len(expected)):
            data = expected[first : first + size]
            into = torch.full((len(data) + 1,), 77, dtype=torch.uint8)
            source.enqueue(first, into[1:])
            assert bytes(into.tolist()) == b"M" + data


def test_memory_that_was_freed_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_flat_bytes", lambda tensor: None)  # has no view for NumPy
    tensor = torch.ones(100)
    source = cuda_source(tensor)
    source.enqueue(0, torch.empty(400, dtype=torch.uint8))
    tensor.untyped_storage().resize_(0)
    with pytest.raises(StateError, match="freed or resized"):
        source.enqueue(0, torch.empty(400, dtype=torch.uint8))


def test_without_pinned_memory_there_is_plain_memory_and_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: object, **named: object) -> torch.Tensor:
        assert named["pin_memory"] is True
        raise torch.OutOfMemoryError("CUDA error: out of memory\nmore words")

    monkeypatch.setattr(torch, "empty", refuse)
    monkeypatch.setattr(cuda, "_told", threading.Event())
    with torch.inference_mode():
        block = cuda.host_memory(100)
    block.fill_(3)  # outside of the mode, too
    assert cuda.CudaCopies().memory(5).nbytes == 5
    assert [record.message for record in caplog.records] == [
        "no pinned memory of 100 bytes, so copies from a GPU hold up the loop: "
        "CUDA error: out of memory"
    ]


def test_memory_of_a_thread_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_of_thread", threading.local())
    monkeypatch.setattr(cuda, "host_memory", lambda n: torch.empty(n, dtype=torch.uint8))
    first = cuda.thread_memory(100)
    assert first.numel() == 100
    assert cuda.thread_memory(60).data_ptr() == first.data_ptr()
    assert cuda.thread_memory(60).numel() == 60
    assert cuda.thread_memory(200).numel() == 200


def test_copies_that_cannot_all_be_begun_are_over_when_that_is_told(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the first would still be writing into memory that the next save was given."""
    copying, done = threading.Event(), threading.Event()
    fake.before_copy = lambda: (copying.set(), done.wait(60))
    whole = torch.ones(100)
    freed = torch.ones(100)
    sources = [cuda_source(whole), cuda_source(freed)]
    freed.untyped_storage().resize_(0)
    into = bytearray(800)
    errors: list[BaseException] = []

    def begin() -> None:
        try:
            room = memoryview(into)
            CudaSource.transport.begin(sources, [0, 0], [room[:400], room[400:]])
        except StateError as error:
            errors.append(error)

    enqueued = CudaSource.enqueue

    def enqueue(self: CudaSource, offset: int, block: torch.Tensor) -> None:
        self._check_memory()
        enqueued(self, offset, block)

    monkeypatch.setattr(CudaSource, "enqueue", enqueue)
    thread = threading.Thread(target=begin)
    thread.start()
    assert copying.wait(60)
    assert thread.is_alive()
    done.set()
    thread.join(60)
    assert len(errors) == 1
    assert bytes(into[:400]) == bits(whole)


def test_an_error_of_the_device_is_an_error_of_the_save(fake: FakeCuda) -> None:
    def lost() -> None:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    with pytest.raises(SaveFailed, match="unspecified launch failure"), cuda.failing_saves():
        lost()


# -- graphs -------------------------------------------------------------------------------


class Training:
    """A run with a save at each step, and what was there then."""

    def __init__(self, folder: Path) -> None:
        self.model = torch.nn.Linear(16, 16)
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.run = holdfast.Run(folder, every=1, keep=None)
        self.run.track(model=self.model, optimizer=self.optimizer)
        self.there: dict[int, torch.Tensor] = {}

    def steps(self, count: int, around: Callable[[int], bool] = lambda n: True) -> None:
        """`around` says of a step whether it is one."""
        with self.run:
            for n in self.run.range(count):
                self.optimizer.zero_grad()
                self.model(torch.randn(4, 16)).sum().backward()
                if around(n):
                    self.optimizer.step()
                self.there[n + 1] = self.model.weight.detach().clone()

    def check(self) -> list[int]:
        with holdfast.CheckpointManager(self.run.address) as manager:
            steps = [info.step for info in manager.checkpoints()]
            for step in steps:
                found = manager.load(step)["model"]["weight"]
                assert torch.equal(found, self.there[step])
        return steps


def test_a_captured_step_ends_trust_for_good(
    fake: FakeCuda,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What is captured is not done, and what is replayed calls no hook."""
    training = Training(tmp_path)
    capturing = threading.Event()
    monkeypatch.setattr(overlap, "capturing", capturing.is_set)
    monkeypatch.setattr(cuda, "capturing", capturing.is_set)
    in_place: list[bool] = []
    init = snapshot.Overlap.__init__

    def begin(self: snapshot.Overlap, leaves: Any, *args: Any, **named: Any) -> None:
        leaves = list(leaves)
        in_place.append(bool(leaves))
        init(self, leaves, *args, **named)

    monkeypatch.setattr(snapshot.Overlap, "__init__", begin)

    def around(n: int) -> bool:
        if n != 3:
            return True
        training.run.manager.wait()
        capturing.set()
        training.optimizer.step()  # the step is recorded; here it is made as well
        capturing.clear()
        return False

    with caplog.at_level(logging.ERROR):
        training.steps(7, around)
    assert training.check() == [1, 2, 3, 4, 5, 6, 7]
    # A save is read in place if the step before it was trusted. The last is waited for.
    assert in_place[:-1] == [True, True, True, False, False, False]
    assert not caplog.records


def test_a_save_that_a_capture_interrupts_fails(
    fake: FakeCuda,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Copies of the barrier would become a part of the graph."""
    training = Training(tmp_path)
    capturing, hold, go = threading.Event(), threading.Event(), threading.Event()
    monkeypatch.setattr(overlap, "capturing", capturing.is_set)
    monkeypatch.setattr(cuda, "capturing", capturing.is_set)

    def around(n: int) -> bool:
        if n == 2:
            training.run.manager.wait()
            hold.set()  # the save that comes next
        if n != 3:
            return True
        capturing.set()
        training.optimizer.step()
        capturing.clear()
        go.set()
        return False

    reach = snapshot.Overlap.reach

    def reaching(self: snapshot.Overlap) -> None:
        if hold.is_set():
            assert go.wait(60)
        reach(self)

    monkeypatch.setattr(snapshot.Overlap, "reach", reaching)
    with caplog.at_level(logging.ERROR):
        training.steps(7, around)
    assert training.check() == [1, 2, 4, 5, 6, 7]
    (line,) = caplog.records
    assert "a CUDA graph is being captured" in line.message


def test_an_optimizer_that_is_made_to_be_captured_is_not_trusted(
    fake: FakeCuda, tmp_path: Path
) -> None:
    training = Training(tmp_path)
    for group in training.optimizer.param_groups:
        group["capturable"] = True  # the CPU refuses it
    barrier = overlap.Barrier(lambda: None)
    barrier.watch({"optimizer": training.optimizer})
    barrier._before_step(training.optimizer, (), {})
    assert not barrier.protected()(source_of(training.model.weight.detach()))
    for group in training.optimizer.param_groups:
        group["capturable"] = False
    assert barrier.protected()(source_of(training.model.weight.detach()))
    barrier.close()
    training.run.close()
