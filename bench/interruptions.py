"""Months of interruptions in virtual time: how much of the time is training, by `every=`.

A process trains in steps; its saves stall it, slow it down, and are durable a while later. It is
interrupted without notice, is down for a while, and the next one goes on from the newest durable
checkpoint. When to save is decided by the library's own code (`holdfast.run.triggers` and what is
below it), which is given this module's clock. Nothing waits, and nothing is random but the
times of interruptions and the jitter of steps, which come from a seed: the same figures on every
machine, and every `every=` meets the same interruptions.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Literal

from holdfast.core.interval import AutoInterval
from holdfast.core.retention import parse_keep
from holdfast.core.schedule import parse_every
from holdfast.manager.history import EndEvent, SaveEvent, StartEvent
from holdfast.run.triggers import Triggers

DAY_S = 86400.0
HOUR_S = 3600.0
_JITTER = 0.03  # of a step's time; as of a training loop on a quiet machine
_JITTERS = 1009


@dataclass(frozen=True)
class World:
    """What happens to a run, and what its saves cost."""

    mtbf_s: float
    """Between two interruptions, on average."""
    arrivals: Literal["exponential", "weibull", "bursts"] = "exponential"
    restart_s: float = 180.0
    """From an interruption to the first step after it."""
    step_s: float = 10.0
    stall_s: float = 0.2
    """The loop stands still for each save."""
    slower_s: float = 0.3
    """Steps lose this beside it, while it is written."""
    takes_s: float = 5.0
    """From the call until it is durable."""
    dearer: float = 1.0
    """How many times as much a save costs in the second half."""
    days: float = 30.0

    @property
    def cost_s(self) -> float:
        """What a save costs the training, in the first half."""
        return self.stall_s + self.slower_s

    def interruptions(self, seed: int) -> Iterator[float]:
        """Their times, without end."""
        rng = random.Random(seed)
        now = 0.0
        if self.arrivals == "bursts":
            yield from self._bursts(rng)
            return
        # Shape 0.7: what Schroeder and Gibson (2006) found in a decade of failures of large
        # machines, where one failure is often followed by another.
        shape = 0.7 if self.arrivals == "weibull" else 1.0
        scale = self.mtbf_s / math.gamma(1 + 1 / shape)
        while True:
            now += rng.weibullvariate(scale, shape)
            yield now

    def _bursts(self, rng: random.Random) -> Iterator[float]:
        """Of five interruptions four come in bursts that take a twelfth of the time."""
        now = 0.0
        while True:
            for part, share in ((11 / 12, 1 / 5), (1 / 12, 4 / 5)):
                ends = now + rng.expovariate(1 / (part * DAY_S))
                mean_s = self.mtbf_s * part / share
                while (now := now + rng.expovariate(1 / mean_s)) < ends:
                    yield now
                now = ends


@dataclass(frozen=True)
class Outcome:
    """What became of a run."""

    goodput: float
    """The share of the time that went into steps which count."""
    interruptions: int
    saves: int
    interval_s: float
    """At the end: of `every="auto"`, else that of the schedule."""
    lines: tuple[str, ...]
    """What was said."""


class _Process:
    """One process of the run, from its start to an interruption or the end."""

    def __init__(
        self, world: World, triggers: Triggers, number: int, start_s: float, step: int
    ) -> None:
        self._world = world
        self._triggers = triggers
        self._number = number
        self.now_s = start_s
        self.step = step
        self.durable = step
        """Completed steps of the newest durable checkpoint."""
        self._saving: SaveEvent | None = None
        self._durable_s = 0.0
        self._drag = 0.0
        self.events: list[SaveEvent] = []

    def train(self, until_s: float, end_s: float, jitters: Sequence[float]) -> None:
        """Steps and saves until it is interrupted at `until_s`, or the time is over."""
        step_s, due = self._world.step_s, self._triggers.due
        until_s = min(until_s, end_s)
        while True:
            took_s = step_s * jitters[self.step % _JITTERS]
            if self._saving is not None:
                overlap_s = min(took_s, self._durable_s - self.now_s)
                took_s += self._drag * overlap_s
            if self.now_s + took_s > until_s:
                break
            self.now_s += took_s
            self.step += 1
            if self._saving is not None and self._durable_s <= self.now_s:
                self._triggers.spent(self._committed())
            if due(self.step, self.now_s, epoch_end=False, last=False) and not self._save(until_s):
                break
        if self._saving is not None and self._durable_s <= until_s:
            self._committed()
        self.now_s = until_s

    def _save(self, until_s: float) -> bool:
        """Whether it was begun in time."""
        waited_s = 0.0
        if self._saving is not None:
            waited_s = max(0.0, self._durable_s - self.now_s)
            if self.now_s + waited_s > until_s:
                return False
            self.now_s += waited_s
            self._triggers.spent(self._committed())
        world = self._world
        factor = world.dearer if self.now_s > world.days * DAY_S / 2 else 1.0
        self._drag = world.slower_s / world.takes_s
        self._saving = SaveEvent(
            time_s=self.now_s,
            step=self.step,
            waited_s=waited_s,
            capture_s=world.stall_s * factor,
            total_s=waited_s + world.takes_s * factor,
            epoch=self._number,
        )
        self._durable_s = self.now_s + world.takes_s * factor
        self.now_s += world.stall_s * factor
        if self.now_s > until_s:
            return False
        self._triggers.saved(self.step, self.now_s)
        return True

    def _committed(self) -> SaveEvent:
        event, self._saving = self._saving, None
        assert event is not None
        self.durable = event.step
        self.events.append(event)
        return event


def simulate(world: World, every: str, *, mtbf_s: float | None = None, seed: int = 0) -> Outcome:
    """A run of `world.days` with `every=`. `mtbf_s` is what is given to `every="auto"`."""
    rng = random.Random(seed)
    jitters = [max(0.5, rng.gauss(1, _JITTER)) for _ in range(_JITTERS)]
    end_s = world.days * DAY_S
    interruptions = world.interruptions(seed)
    next_s = next(interruptions)
    # A run reads its whole history, once. Here it would be read hundreds of times.
    told: deque[StartEvent | EndEvent] = deque(maxlen=200)
    recent: deque[SaveEvent] = deque(maxlen=20)
    lines: list[str] = []
    now_s, count, step, saves = 0.0, 0, 0, 0
    schedule = parse_every(every)
    auto = AutoInterval(mtbf_s)
    while now_s < end_s:
        # Another interruption may come while it is down.
        started_s = now_s + world.restart_s if count else now_s
        while next_s < started_s:
            started_s, next_s = next_s + world.restart_s, next(interruptions)
        if started_s >= end_s:
            break
        auto = AutoInterval(mtbf_s)
        triggers = Triggers(schedule, parse_keep(None), lambda: (), auto, lines.append)
        triggers.start(step or None, started_s)
        triggers.learn(partial(chain, told, recent))
        process = _Process(world, triggers, count, started_s, step)
        process.train(next_s, end_s, jitters)
        now_s = process.now_s
        told += [
            StartEvent(epoch=count, began_s=started_s, time_s=started_s, step=step),
            EndEvent(epoch=count, time_s=now_s, why="killed", step=process.step),
        ]
        recent.extend(process.events)
        saves += len(process.events)
        if now_s < end_s:
            count += 1
            step = process.durable
            next_s = next(interruptions)
        else:
            step = process.step
    interval_s = schedule.seconds if schedule.seconds is not None else auto.seconds
    return Outcome(step * world.step_s / end_s, count, saves, interval_s, tuple(lines))


def expected(world: World, interval_s: float) -> float:
    """The goodput that Daly's model expects for exponential arrivals: what is lost before a
    save is durable is a part of the restart."""
    lost_s = world.restart_s + world.takes_s
    mtbf_s = world.mtbf_s
    passes_s = mtbf_s * math.exp(lost_s / mtbf_s)
    return interval_s / (passes_s * math.expm1((interval_s + world.cost_s) / mtbf_s))
