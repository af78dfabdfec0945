"""Interrupts a feed everywhere and compares what follows with a run that was not."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from holdfast.core.rng import apply_rng, capture_rng
from holdfast.run.feed import Feed
from holdfast.run.iterables import open_feed
from tests.core.tree_harness import roundtrip

EPOCHS = 3

Prologue = Callable[[Any, int], None]


def nothing(loader: Any, epoch: int) -> None:
    """An epoch's prologue that does nothing."""


@dataclass
class Stop:
    """A place where a run may be killed: all that its checkpoint has of the data."""

    epoch: int
    feed: bytes
    rng: dict[str, object]
    steps_before: int


@dataclass
class History:
    steps: list[Any] = field(default_factory=list)
    stops: list[Stop] = field(default_factory=list)
    final_rng: Any = None


def plain(value: Any) -> Any:
    """Arrays and tensors as bytes, so that == compares every bit."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().contiguous().view(-1).view(torch.uint8)
        return ("tensor", str(value.dtype), tuple(value.shape), flat.numpy().tobytes())
    if isinstance(value, np.ndarray | np.generic):
        return ("array", value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def train_step() -> Any:
    """Draws as dropout and the like do, so that replays without it would drift."""
    return [random.random(), np.random.rand(), torch.rand(()).item()]


def record(make: Callable[[], Any], prologue: Prologue = nothing, *, seed: int = 1) -> History:
    """A run that is never interrupted."""
    seed_everything(seed)
    history = History()
    loader = make()
    feed = open_feed(loader)
    for epoch in range(EPOCHS):
        prologue(loader, epoch)
        feed.open(None)
        _rest_of_epoch(feed, epoch, history)
    feed.shutdown()
    history.final_rng = plain(capture_rng())
    return history


def resume(make: Callable[[], Any], stop: Stop, prologue: Prologue = nothing) -> History:
    """What a new process does from `stop` on."""
    seed_everything(99)
    train_step()
    history = History()
    loader = make()
    saved = roundtrip(pickle.loads(stop.feed))
    first = stop.epoch
    if saved["at"] == "end":
        # The run has restored everything, and the next epoch's prologue comes first.
        apply_rng(stop.rng)
        first += 1
    if first < EPOCHS:
        prologue(loader, first)
    feed = open_feed(loader)
    seed_now = capture_rng()
    feed.open(saved)
    if saved["at"] == "end":
        assert plain(capture_rng()) == plain(seed_now), "random states moved between epochs"
    else:
        apply_rng(stop.rng)
        _rest_of_epoch(feed, first, history)
        first += 1
        if first < EPOCHS:
            prologue(loader, first)
    for epoch in range(first, EPOCHS):
        if epoch > first:
            prologue(loader, epoch)
        feed.open(None)
        _rest_of_epoch(feed, epoch, history)
    feed.shutdown()
    history.final_rng = plain(capture_rng())
    return history


def _rest_of_epoch(feed: Feed, epoch: int, history: History) -> None:
    while True:
        _note(feed, epoch, history)
        try:
            item = feed.take()
        except StopIteration:
            break
        history.steps.append(plain([item, train_step()]))
    train_step()  # the tail
    _note(feed, epoch, history)


def _note(feed: Feed, epoch: int, history: History) -> None:
    state = pickle.dumps(feed.state())
    history.stops.append(Stop(epoch, state, capture_rng(), len(history.steps)))


def check_every_stop(
    make: Callable[[], Any],
    prologue: Prologue = nothing,
    *,
    only: Callable[[int], bool] = lambda number: True,
) -> History:
    """Interrupt at each boundary: everything after it must be as if nothing happened."""
    whole = record(make, prologue)
    for number, stop in enumerate(whole.stops):
        if not only(number):
            continue
        rest = resume(make, stop, prologue)
        where = f"stopped at boundary {number} (epoch {stop.epoch})"
        assert rest.steps == whole.steps[stop.steps_before :], where
        assert rest.final_rng == whole.final_rng, where
    return whole


def without_holdfast(
    make: Callable[[], Any], prologue: Prologue = nothing, *, seed: int = 1
) -> History:
    """The same loop over the bare loader."""
    seed_everything(seed)
    history = History()
    loader = make()
    for epoch in range(EPOCHS):
        prologue(loader, epoch)
        for item in loader:
            history.steps.append(plain([item, train_step()]))
        train_step()
    history.final_rng = plain(capture_rng())
    return history
