"""What the programs of the matrix are made of: one process's part of a small training, with
places where it may end and a record of all that a resume must not change."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import holdfast
from holdfast.core.rng import capture_rng
from tests.run.feed_checks import plain, seed_everything

SAMPLES, BATCH = 12, 4

# Kinds of places. INSIDE a loop a signal is answered with a save.
INSIDE = ("prologue", "body", "between", "tail")
OUTSIDE = ("before", "after")


class Augmented(Dataset[Any]):
    """Draws from all three global generators for each sample."""

    def __init__(self, samples: int = SAMPLES) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[torch.Tensor, float]:
        noise = random.random() + np.random.rand() + torch.rand(4)
        return torch.linspace(-1, 1, 4) * (index % 5) + noise, index / self.samples


class Plain(Augmented):
    """Data for an evaluation: it draws nothing."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, float]:
        return torch.linspace(0, 1, 4) * index, index / self.samples


@dataclass
class Job:
    """One process that runs a program. `ending(job, number)` is called at each place and may
    end the process there."""

    address: str
    workers: int = 0
    ending: Callable[[Job, int], None] = lambda job, number: None
    attempt: int = 1
    """0 in a process that will be started again."""
    kernel: dict[str, Any] = field(default_factory=dict)
    """Variables that a notebook would still have from the processes before."""

    places: list[str] = field(default_factory=list)
    """The kinds of those that were passed."""
    steps: list[Any] = field(default_factory=list)
    """Number, data and loss of each step of this process. Not tracked."""
    trace: list[Any] = field(default_factory=list)
    """What happened beside the steps. Tracked, so what runs twice must not be in it twice."""
    said: list[str] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    """At the end of the program."""
    runs: list[holdfast.Run] = field(default_factory=list)

    # -- for programs --

    def run(self, *, sub: str = "", **options: Any) -> holdfast.Run:
        """A quiet run that saves at each step unless told otherwise, and tracks the trace."""
        run = holdfast.Run(self.address + sub, **{"every": 1, "quiet": True, **options})
        self.runs.append(run)
        return run.track(trace=self.trace)

    def loader(self, dataset: Any = None, *, batch: int | None = BATCH, **options: Any) -> Any:
        """Shuffled, unless a sampler or a stream is given."""
        if not {"sampler", "batch_sampler", "shuffle"} & options.keys():
            options["shuffle"] = not isinstance(dataset, torch.utils.data.IterableDataset)
        data = Augmented() if dataset is None else dataset
        if "batch_sampler" not in options:
            options["batch_size"] = batch
        return DataLoader(data, num_workers=self.workers, **options)

    def parts(self, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        """A model that draws, its optimizer and a loader."""
        net = nn.Sequential(
            nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 1)
        )
        return net, torch.optim.Adam(net.parameters(), lr=0.02), self.loader(**options)

    def place(self, kind: str) -> None:
        assert kind in INSIDE or kind in OUTSIDE
        self.places.append(kind)
        self.ending(self, len(self.places) - 1)

    def note(self, *values: Any) -> None:
        """Add to the trace."""
        self.trace.append(plain(list(values)))

    def draw(self) -> list[float]:
        """A number of each global generator."""
        return [random.random(), float(np.random.rand()), torch.rand(()).item()]

    def saw(self, run: holdfast.Run, data: Any, loss: float = 0.0) -> None:
        self.steps.append([run.step, run.epoch, run.batch, plain(data), loss.hex()])

    def loss(self, net: nn.Module, batch: Any) -> torch.Tensor:
        x, y = batch
        noise = random.random() * np.random.rand()
        return nn.functional.mse_loss(net(x)[:, 0], y.float()) + noise * net(x).mean()

    def step(
        self, run: holdfast.Run, net: nn.Module, optimizer: torch.optim.Optimizer, batch: Any
    ) -> float:
        """The body of a plain loop, with places before, in and after the step."""
        self.place("body")
        optimizer.zero_grad()
        loss = self.loss(net, batch)
        loss.backward()
        self.place("body")
        optimizer.step()
        run.log(loss=loss)
        self.saw(run, batch, loss.item())
        self.place("body")
        return loss.item()

    def evaluate(self, net: nn.Module, batches: Any = None) -> float:
        """The loss over data that is not augmented, without dropout."""
        net.eval()
        x = torch.linspace(-1, 1, 20).reshape(5, 4)
        found = [(x, torch.ones(5))] if batches is None else batches
        with torch.no_grad():
            total = sum(nn.functional.mse_loss(net(x)[:, 0], y.float()).item() for x, y in found)
        net.train()
        return total

    def say(self, *words: Any) -> None:
        """Print, at the end of the program."""
        self.said.append(" ".join(map(str, words)))

    def end(self, run: holdfast.Run, **objects: Any) -> None:
        """The program's last line, with all that it holds."""
        self.place("after")
        self.say("steps", run.step, "epochs", run.epoch, sorted(run.metrics.items()))
        self.state = {**objects, "trace": list(self.trace), "random": capture_rng()}

    # -- for the checks --

    def put_away(self) -> None:
        """Close what a process that ends by itself would close."""
        for run in self.runs:
            run.close()

    def bits(self) -> dict[str, Any]:
        """The final state, leaf by leaf, and what was printed."""
        return {**dict(leaves(self.state, "")), "said": self.said}


def leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """`value` as paths and plain values whose == compares every bit."""
    match value:
        case torch.Generator():
            yield path, plain(value.get_state())
        case np.random.Generator():
            yield from leaves(value.bit_generator.state, path)
        case random.Random():
            yield path, value.getstate()
        case dict():
            yield f"{path}/keys", list(value)
            for key, item in value.items():
                yield from leaves(item, f"{path}/{key}")
        case list() | tuple():
            yield f"{path}/length", len(value)
            for index, item in enumerate(value):
                yield from leaves(item, f"{path}/{index}")
        case set():
            yield path, sorted(value)
        case float():
            yield path, value.hex()
        case _ if hasattr(value, "state_dict"):
            yield from leaves(dict(value.state_dict()), path)
        case _:
            yield path, plain(value)


Program = Callable[[Job], None]


def seeded(program: Program, job: Job) -> None:
    """A program's first lines: it seeds, as a script does in every process."""
    seed_everything(1)
    program(job)
