"""Runs that are interrupted at random, alone and under `holdfast run`, end with equal bits."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kill.driver import differing
from tests.kill.interruptions import Job, adopt_orphans, interrupt_all


@pytest.fixture
def orphans_adopted() -> Iterator[None]:
    adopt_orphans()
    yield
    adopt_orphans(False)


@pytest.mark.slow
@pytest.mark.parametrize("supervised", [False, True], ids=["alone", "supervised"])
def test_interrupted_at_random(tmp_path: Path, supervised: bool, orphans_adopted: None) -> None:
    """`python -m tests.kill.interruptions --number 200` goes on with it."""
    chance = random.Random(supervised)
    wanted = Job(tmp_path / "whole").finish()
    interrupted = runs = 0
    while interrupted < 8:
        job = Job(tmp_path / f"run{runs}", supervised=supervised)
        interrupt_all(job, chance, 5)
        assert differing(job.finish(), wanted) == [], job.interruptions
        interrupted, runs = interrupted + job.interruptions.total(), runs + 1
