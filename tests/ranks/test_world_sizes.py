"""Trainings that go on with another number of ranks, and are killed on the way."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import holdfast
from tests.ranks.jobs import Job
from tests.support.exhaustive import EXHAUSTIVE

# Ranks, and the step in which they are asked to stop: they do after the next one, inside an epoch,
# with no save in between.
_HISTORY = ((4, 6), (2, 12), (4, 0))
_EPOCHS = 7
_KILLS = (12, 12, 12) if EXHAUSTIVE else (0, 1, 0)
"""In each part of it."""


def job_in(folder: Path, kind: str) -> Job:
    return Job(folder, kind, epochs=_EPOCHS)


def stopped_at(job: Job) -> int:
    return job.stop + 2


def is_over(job: Job) -> bool:
    """Whether the part of the history that `job` is in has come to its end."""
    return bool(job.stop) and max(job.steps(), default=0) >= stopped_at(job)


def train_on(job: Job, size: int, kills: int, rng: random.Random) -> int:
    """Bring this part of the history to its end, through so many kills at most. How many came in
    time."""
    in_time = 0
    for _ in range(kills):
        if is_over(job):
            return in_time
        status = job.killed(size, rng, saved=not EXHAUSTIVE or rng.random() < 0.5)
        if status == (75 if job.stop else 0):
            return in_time
        in_time += 1
    if not is_over(job):
        assert job.finish(size) == (75 if job.stop else 0), job.log().read_text()
    return in_time


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"] if EXHAUSTIVE else ["fsdp"])
def test_kills_change_nothing_in_a_history_of_world_sizes(kind: str, tmp_path: Path) -> None:
    """4 ranks, then 2, then 4: bit for bit as where they were only stopped at the same steps."""
    whole = job_in(tmp_path / "whole", kind)
    rng = random.Random(kind)
    for size, whole.stop in _HISTORY:
        train_on(whole, size, 0, rng)
        if whole.stop:
            assert whole.steps()[-1] == stopped_at(whole)
    told = [line for line in whole.lines() if "goes on with" in line]
    assert told == ["saved by 4 ranks, goes on with 2", "saved by 2 ranks, goes on with 4"]
    rounds = 4 if EXHAUSTIVE else 1
    kills = 0
    for round_ in range(rounds):
        killed = job_in(tmp_path / f"killed{round_}", kind)
        for (size, killed.stop), most in zip(_HISTORY, _KILLS, strict=True):
            kills += train_on(killed, size, most, rng)
        assert killed.results(4) == whole.results(4)
        with holdfast.CheckpointManager(killed.run) as ckpts:
            assert all(each.ok for each in ckpts.verify())
    assert kills >= rounds
