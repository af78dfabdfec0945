"""Programs for the rules of loaders, and of generators that are shared or tracked."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, Sampler, WeightedRandomSampler, get_worker_info

from tests.matrix.job import Augmented, Job


def _generators() -> dict[str, Any]:
    return {
        "python": random.Random(5),
        "numpy": np.random.default_rng(6),
        "torch": torch.Generator().manual_seed(7),
    }


def _draw(own: dict[str, Any]) -> list[float]:
    drawn = torch.rand((), generator=own["torch"]).item()
    return [own["python"].random(), own["numpy"].random(), drawn]


def _two_loaders(job: Job, mode: Any) -> None:
    net, optimizer, short = job.parts(dataset=Augmented(8))
    long = job.loader(Augmented(12), generator=torch.Generator().manual_seed(3))
    run = job.run().track(net=net, optimizer=optimizer)
    for _ in run.epochs(2):
        job.place("prologue")
        for a, b in run.batches(short, long, mode=mode):
            job.step(run, net, optimizer, a)
            job.note(a, b)
        job.note(job.draw())
        job.place("tail")
    job.end(run, net=net, optimizer=optimizer)


def _train(job: Job, loader: Callable[[int], Any], epochs: int = 2, **tracked: Any) -> None:
    """A plain loop over the loader of each epoch."""
    net, optimizer, _ = job.parts()
    run = job.run().track(net=net, optimizer=optimizer, **tracked)
    for epoch in run.epochs(epochs):
        job.place("prologue")
        for batch in run.batches(loader(epoch)):
            job.step(run, net, optimizer, batch)
        job.note(job.draw())
        job.place("tail")
    job.end(run, net=net, optimizer=optimizer, tracked=tracked)


class Shuffling(Sampler[int]):
    """Keeps its order in an attribute, and shuffles it with a generator of its own."""

    def __init__(self) -> None:
        self.order = list(range(12))
        self.rng = random.Random(2)
        self.epochs = 0

    def __iter__(self) -> Iterator[int]:
        self.epochs += 1
        self.rng.shuffle(self.order)
        return iter(list(self.order))

    def __len__(self) -> int:
        return len(self.order)


class Stream(IterableDataset[Any]):
    """A shuffle buffer, in each worker over its part."""

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        buffer = list(range(first, 16, step))
        while buffer:
            number = buffer.pop(random.randrange(len(buffer)))
            yield torch.rand(4) + number / 16, np.random.rand()


def rule_03_tracked_generators(job: Job) -> None:
    """Rule 3: a prologue that draws from tracked generators of Python, NumPy and torch."""
    net, optimizer, data = job.parts()
    own: dict[str, Any] = _generators()
    run = job.run().track(net=net, optimizer=optimizer, own=own)
    for _ in run.epochs(2):
        job.place("prologue")
        drawn = _draw(own)
        job.place("prologue")
        for batch in run.batches(data):
            job.step(run, net, optimizer, batch)
            job.note(drawn, _draw(own))
        job.note(drawn, _draw(own))
        job.place("tail")
    job.end(run, net=net, optimizer=optimizer, own=own)


def rule_13_two_loaders_min(job: Job) -> None:
    """Rule 13: the loop ends with the shorter of two loaders."""
    _two_loaders(job, "min")


def rule_13_two_loaders_cycle(job: Job) -> None:
    """Rule 13: the shorter of two loaders starts again in mid-epoch."""
    _two_loaders(job, "cycle")


def rule_26_another_loader_per_epoch(job: Job) -> None:
    """Rule 26: the batch size, and with it the number of steps, grows from epoch to epoch."""
    dataset = Augmented()
    _train(job, lambda epoch: job.loader(dataset, batch=(3, 4, 6)[epoch]), epochs=3)


def rule_27_a_sampler_of_the_users(job: Job) -> None:
    """Rule 27: a sampler that keeps its order and its generator in attributes."""
    data = job.loader(sampler=Shuffling())
    _train(job, lambda epoch: data, epochs=3)


def rule_27_a_stream(job: Job) -> None:
    """Rule 27: an `IterableDataset` with a shuffle buffer."""
    data = job.loader(Stream())
    _train(job, lambda epoch: data)


def rule_27_persistent_workers(job: Job) -> None:
    """Rule 27: a loader with a generator of its own, whose workers live on."""
    data = job.loader(
        generator=torch.Generator().manual_seed(8), persistent_workers=job.workers > 0
    )
    _train(job, lambda epoch: data, epochs=3)


def rule_27_tracked_generators(job: Job) -> None:
    """Rule 27: a generator that the sampler shares with bodies and tails is tracked."""
    net, optimizer, _ = job.parts()
    own = _generators()
    sampler = WeightedRandomSampler([1.0, 2.0] * 6, 12, generator=own["torch"])
    data = job.loader(sampler=sampler)
    run = job.run().track(net=net, optimizer=optimizer, own=own)
    for _ in run.epochs(2):
        job.place("prologue")
        for batch in run.batches(data):
            job.step(run, net, optimizer, batch)
            job.note(_draw(own))
        job.note("tail", _draw(own))
        job.place("tail")
    job.end(run, net=net, optimizer=optimizer, own=own)
