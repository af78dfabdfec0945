"""The cases: one function per row of the tables, each in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench import plots
from bench.cases import (
    buckets,
    flows,
    frameworks,
    interruptions,
    large,
    loop,
    memory,
    ranks,
    restores,
    saves,
)
from bench.cases.common import Options
from bench.outcome import Outcome


@dataclass(frozen=True)
class Case:
    """A case and how long it takes, at the default sizes on a quiet machine of two cores."""

    run: Callable[[Options], Outcome]
    minutes: float
    about: str
    apart: bool = True
    """Whether it must be started in a process of its own; else it starts some itself."""
    draw: Callable[[Outcome, Path], None] = plots.draw


CASES = {
    "durable": Case(saves.durable, 2, "durable full saves"),
    "loop": Case(loop.asynchronous, 6, "stall of asynchronous saves, and the time lost to them"),
    "frozen": Case(saves.frozen, 2, "the next save where nine tenths are frozen"),
    "restore": Case(restores.restore, 2, "restores into a live model, cold and warm"),
    "memory": Case(memory.peaks, 2, "peak extra memory of saves and restores", apart=False),
    "small": Case(saves.small, 4, "20,000 tensors of 1 KiB"),
    "large": Case(large.per_gb, 6, "a 10 GB state, per GB beside a 1 GB one"),
    "bucket": Case(buckets.buckets, 5, "uploads and downloads, S3 on loopback"),
    "metaflow": Case(flows.flows, 8, "checkpoints in Metaflow's steps", apart=False),
    "frameworks": Case(
        frameworks.frameworks, 12, "saves in loops that frameworks own", apart=False
    ),
    "processes": Case(ranks.processes, 15, "two and four ranks beside DCP", apart=False),
    "scale": Case(ranks.scale, 3, "the commit of up to 1,024 simulated ranks", apart=False),
    "interruptions": Case(
        interruptions.interruptions,
        4,
        'months of interruptions, simulated: every="auto" and fixed intervals',
        draw=interruptions.draw,
    ),
}
