"""Saves that read parameters and optimizer states in place while training goes on.

Each program is trained with a save at every few steps. What a checkpoint holds must be what
was there at its boundary, to the bit, whenever the save reads: before the optimizer's step,
after it, or half and half.
"""

from __future__ import annotations

import copy
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import holdfast
from holdfast.manager import overlap, packer, snapshot
from holdfast.manager.overlap import LiveLeaf, Overlap
from tests.support.exhaustive import EXHAUSTIVE
from tests.support.fake_cuda import cpu_tensors_on_a_device

WIDTH = 24


class Gate:
    """Lets saves read `parts` pieces in front of the barrier, and the rest behind it."""

    def __init__(self, parts: int | None) -> None:
        self.parts = parts
        self.left = 0
        self.in_place = 0
        self.drained_nbytes = 0
        self.open = False
        """For a save that somebody waits for."""
        self.behind = threading.Event()
        self.reached = threading.Event()


@pytest.fixture
def gate(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Gate:
    """When saves read, relative to the optimizer's step."""
    monkeypatch.setattr(snapshot, "SMALL_BYTES", 64)
    monkeypatch.setattr(packer, "SMALL_BYTES", 64)
    monkeypatch.setattr(overlap, "_READ_BYTES", 128)
    found = Gate(request.param)
    init, read, drain, close = (
        Overlap.__init__,
        Overlap._read_in_place,
        Overlap.drain,
        Overlap.close,
    )
    save = holdfast.CheckpointManager.save

    def saving(self: holdfast.CheckpointManager, *args: Any, **named: Any) -> Any:
        found.open = named["block"]
        found.behind.set()  # it waits for the one before
        return save(self, *args, **named)

    def begin(self: Overlap, *args: Any, **named: Any) -> None:
        init(self, *args, **named)
        found.left = 0 if found.parts is None else found.parts
        found.reached.clear()
        if not found.open:
            found.behind.clear()

    def reading(self: Overlap, leaf: LiveLeaf, offset: int, into: memoryview) -> bool:
        if found.parts is not None and not found.behind.is_set():
            if found.left == 0:
                found.reached.set()
                assert found.behind.wait(60)
            found.left -= 1
        done = read(self, leaf, offset, into)
        found.in_place += done
        return done

    def draining(self: Overlap) -> None:
        if not self._drained:
            # In the main thread, in front of a step: now the save is where it should be.
            found.reached.wait(60)
            drain(self)
            found.drained_nbytes += self.copied_nbytes
            found.behind.set()  # not for the barriers of other runs of this process

    def ending(self: Overlap) -> None:
        found.reached.set()
        found.behind.set()
        close(self)

    monkeypatch.setattr(holdfast.CheckpointManager, "save", saving)
    monkeypatch.setattr(Overlap, "__init__", begin)
    monkeypatch.setattr(Overlap, "_read_in_place", reading)
    monkeypatch.setattr(Overlap, "drain", draining)
    monkeypatch.setattr(Overlap, "close", ending)
    return found


class Program:
    """A training program: what is tracked, and one step of it."""

    def __init__(self, tracked: dict[str, Any], step: Callable[[int], None]) -> None:
        self.tracked = tracked
        self.step = step

    def now(self) -> Any:
        return {
            name: copy.deepcopy(value.state_dict() if hasattr(value, "state_dict") else value)
            for name, value in self.tracked.items()
        }


def net(*, norm: bool = False) -> nn.Sequential:
    middle: list[nn.Module] = [nn.BatchNorm1d(WIDTH)] if norm else []
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *middle, nn.Tanh(), nn.Linear(WIDTH, WIDTH))


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(torch.randn(8, WIDTH)).square().mean()


def simple(make: Callable[[Any], torch.optim.Optimizer], **options: Any) -> Program:
    model = net(**options)
    optimizer = make(model.parameters())

    def step(n: int) -> None:
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()

    return Program({"model": model, "optimizer": optimizer}, step)


def accumulation() -> Program:
    model: Any = net()
    optimizer = torch.optim.Adam(model.parameters())

    def step(n: int) -> None:
        loss_of(model).backward()
        if n % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()

    return Program({"model": model, "optimizer": optimizer}, step)


def two_optimizers() -> Program:
    """As in a GAN: one of the two is clipped through `.data`, which no version notices."""
    critic, generator = net(), net()
    first = torch.optim.RMSprop(critic.parameters(), lr=0.01)
    second = torch.optim.Adam(generator.parameters())

    def step(n: int) -> None:
        first.zero_grad()
        loss_of(critic).backward()
        first.step()
        for param in critic.parameters():
            param.data.clamp_(-0.05, 0.05)
        second.zero_grad()
        loss_of(generator).backward()
        second.step()

    return Program(
        {"critic": critic, "generator": generator, "first": first, "second": second}, step
    )


def averaged() -> Program:
    """Averages that are updated in front of the step, through `.data`: nobody protects them."""
    model: Any = net()
    average: Any = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(n: int) -> None:
        for mean, param in zip(average.parameters(), model.parameters(), strict=True):
            mean.data.mul_(0.9).add_(param.data, alpha=0.1)
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()

    return Program({"model": model, "average": average, "optimizer": optimizer}, step)


def frozen() -> Program:
    base, head = net(), net()
    base.requires_grad_(False)
    optimizer = torch.optim.Adam(head.parameters())

    def step(n: int) -> None:
        optimizer.zero_grad()
        loss_of(nn.Sequential(base, head)).backward()
        optimizer.step()

    return Program({"base": base, "head": head, "optimizer": optimizer}, step)


def closure() -> Program:
    model: Any = net()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)

    def step(n: int) -> None:
        x = torch.randn(8, WIDTH)

        def again() -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        optimizer.step(again)

    return Program({"model": model, "optimizer": optimizer}, step)


def tied() -> Program:
    model: Any = net()
    model[2].weight = model[0].weight
    optimizer = torch.optim.Adam(model.parameters())

    def step(n: int) -> None:
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()

    return Program({"model": model, "optimizer": optimizer}, step)


def by_hand() -> Program:
    """No optimizer: everything is copied at once."""
    model: Any = net()

    def step(n: int) -> None:
        loss_of(model).backward()
        with torch.no_grad():
            for param in model.parameters():
                param -= 0.1 * param.grad
                param.grad = None

    return Program({"model": model}, step)


PROGRAMS: dict[str, Callable[[], Program]] = {
    "adam": lambda: simple(torch.optim.Adam),
    "foreach": lambda: simple(lambda p: torch.optim.AdamW(p, foreach=True)),
    "fused": lambda: simple(lambda p: torch.optim.Adam(p, fused=True)),
    "batch norm": lambda: simple(torch.optim.Adam, norm=True),
    "accumulation": accumulation,
    "two optimizers": two_optimizers,
    "averaged": averaged,
    "frozen": frozen,
    "closure": closure,
    "tied": tied,
    "by hand": by_hand,
}
NOTHING_IN_PLACE = {"by hand"}


def train(
    program: Program, folder: Path, *, every: int = 2, steps: int = 9, settle: bool = False
) -> dict[int, Any]:
    """What was there at each boundary. `settle`: each body waits for the save before it."""
    there: dict[int, Any] = {}
    with holdfast.Run(folder, every=every, keep=None) as run:
        run.track(**program.tracked)
        for n in run.range(steps):
            program.step(n)
            if settle:
                run.manager.wait()
            there[n + 1] = program.now()
    return there


def check(folder: Path, there: dict[int, Any], steps: list[int]) -> None:
    with holdfast.CheckpointManager(folder) as manager:
        assert [info.step for info in manager.checkpoints()] == steps
        assert all(result.ok for result in manager.verify())
        for step in steps:
            loaded = manager.load(step)
            for name, value in there[step].items():
                same(loaded[name], value, f"{name} at step {step}")


def same(found: Any, expected: Any, where: str) -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(torch.as_tensor(found), expected), where
    elif isinstance(expected, dict):
        for key, value in expected.items():
            same(found[key], value, f"{where}: {key}")
    elif isinstance(expected, list | tuple):
        for index, value in enumerate(expected):
            same(found[index], value, f"{where}: {index}")
    else:
        assert found == expected, where


SAVED = [2, 4, 6, 8, 9]


@pytest.fixture
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the tensors seem to be."""
    if request.param == "host":
        yield request.param
        return
    with cpu_tensors_on_a_device(monkeypatch) as fake:
        yield request.param
    assert fake.enqueued_nbytes


GATES = {"before": None, "behind": 0, "half": 7}
# Each program with each gate in one of the places, the other way round for the next.
CASES = [
    pytest.param(name, gate, place, id=f"{name}-{when}-{place}")
    for row, name in enumerate(PROGRAMS)
    for column, (when, gate) in enumerate(GATES.items())
    for number, place in enumerate(("host", "device"))
    if EXHAUSTIVE or (row + column) % 2 == number
]


@pytest.mark.parametrize(("name", "gate", "place"), CASES, indirect=["gate", "place"])
def test_a_checkpoint_holds_what_was_there_at_its_boundary(
    name: str, gate: Gate, place: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    there = train(PROGRAMS[name](), tmp_path)
    with holdfast.CheckpointManager(tmp_path) as manager:
        steps = [info.step for info in manager.checkpoints()] if name == "accumulation" else SAVED
    check(tmp_path, there, steps)
    if name not in NOTHING_IN_PLACE:
        assert gate.in_place > 0
        assert (gate.drained_nbytes > 0) == (gate.parts is not None)


# -- torn reads ---------------------------------------------------------------------------


def edits(how: str) -> Program:
    """Something changes in front of the step that the save relies on."""
    model: Any = nn.Sequential(nn.Embedding(30, WIDTH, max_norm=0.1 if how == "forward" else None))
    model.append(nn.Linear(WIDTH, WIDTH))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    other = copy.deepcopy(model.state_dict())
    average: Any = net()
    average.requires_grad_(False)

    def step(n: int) -> None:
        if n == 8:
            if how == "load_state_dict":
                model.load_state_dict(other)
            elif how == "through .data":
                model[1].weight.data.mul_(0.5)
            elif how == "what never changed":
                average[0].weight.data.mul_(0.5)
            elif how == "by hand":
                with torch.no_grad():
                    model[1].weight.zero_()
        optimizer.zero_grad()
        model(torch.arange(30)).square().mean().backward()
        optimizer.step()

    return Program({"model": model, "average": average, "optimizer": optimizer}, step)


@pytest.mark.parametrize("gate", [0, 7], ids=["behind", "half"], indirect=True)
@pytest.mark.parametrize(
    "how", ["forward", "load_state_dict", "through .data", "by hand", "what never changed"]
)
def test_a_change_in_front_of_the_step_fails_that_save_alone(
    how: str, gate: Gate, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    with caplog.at_level(logging.ERROR):
        there = train(edits(how), tmp_path, every=4, steps=12, settle=True)
    torn = [record.message for record in caplog.records]
    assert len(torn) == 1, torn
    failed = 4 if how == "forward" else 8
    assert torn[0].startswith(f"the save of step {failed} failed:")
    assert "changed while it was being saved, before the optimizer's step" in torn[0]
    # It is made up for at the next boundary, and the leaf is copied from then on.
    check(tmp_path, there, sorted({4, 8, 12} - {failed} | {failed + 1}))


@pytest.mark.parametrize("gate", [0], ids=["behind"], indirect=True)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler itself
def test_a_compiled_step_is_no_barrier(gate: Gate, tmp_path: Path) -> None:
    """torch does not call hooks in it: nothing is read in place."""
    torch.manual_seed(0)
    program = simple(torch.optim.Adam)
    model, optimizer = program.tracked["model"], program.tracked["optimizer"]
    compiled = torch.compile(optimizer.step, backend="eager")

    def step(n: int) -> None:
        loss_of(model).backward()
        compiled()
        optimizer.zero_grad()

    check(tmp_path, train(Program(program.tracked, step), tmp_path), SAVED)
    assert gate.drained_nbytes == 0


def test_a_barrier_without_memory_fails_the_save_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(snapshot, "SMALL_BYTES", 64)
    reading = threading.Event()

    def slowly(self: Overlap, leaf: LiveLeaf, offset: int, into: memoryview) -> bool:
        assert reading.wait(60)
        return read(self, leaf, offset, into)

    def refuse(*request: Any) -> memoryview:
        raise MemoryError

    read, init, drain = Overlap._read_in_place, Overlap.__init__, Overlap.drain
    begun: list[Overlap] = []

    def begin(self: Overlap, leaves: Any, memory: Any, **named: Any) -> None:
        leaves = list(leaves)
        init(self, leaves, refuse if not caplog.records else memory, **named)
        begun.append(self)

    def draining(self: Overlap) -> None:
        drain(self)
        if self in begun:  # runs of other tests may be open, and see the same steps
            reading.set()

    monkeypatch.setattr(Overlap, "_read_in_place", slowly)
    monkeypatch.setattr(Overlap, "__init__", begin)
    monkeypatch.setattr(Overlap, "drain", draining)
    with caplog.at_level(logging.ERROR):
        there = train(simple(torch.optim.Adam), tmp_path)
    assert [record.message for record in caplog.records] == [
        "the save of step 2 failed: MemoryError()"
    ]
    check(tmp_path, there, [4, 6, 8, 9])


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # that is the test
@pytest.mark.parametrize("gate", [7], ids=["half"], indirect=True)
def test_a_forked_child_that_steps_an_optimizer_is_not_held_up(gate: Gate, tmp_path: Path) -> None:
    """The save belongs to the parent, and its thread is not there in the child."""
    program = simple(torch.optim.SGD)
    statuses: list[int] = []

    def step(n: int) -> None:
        if n in (2, 4):
            assert gate.reached.wait(60)  # the save is in the middle of its reads
            child = os.fork()
            if child == 0:
                signal.alarm(20)
                other = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
                other.step()
                os._exit(0)
            statuses.append(os.waitpid(child, 0)[1])
        program.step(n)

    check(tmp_path, train(Program(program.tracked, step), tmp_path), SAVED)
    assert statuses
    assert set(statuses) == {0}
