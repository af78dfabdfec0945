"""Ranks whose run is in a bucket: killed, and stopped while they save."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import holdfast
from holdfast.stores.object import ObjectStore
from tests.ranks.jobs import Job
from tests.support.exhaustive import EXHAUSTIVE
from tests.support.servers.service import Place

_SIZE = 2
_EPOCHS = 3
_KILLS = 15 if EXHAUSTIVE else 1
"""Of each kind."""
WHOM: dict[str, Callable[[list[int]], list[int]]] = {
    "rank 0": lambda ranks: ranks[:1],
    "another rank": lambda ranks: ranks[1:],
    "all": lambda ranks: ranks,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """In a folder, and disturbed by nobody."""
    job = Job(tmp_path_factory.mktemp("whole") / "job", "ddp", epochs=_EPOCHS, every="2")
    assert job.finish(_SIZE) == 0, job.log().read_text()
    return job


def check(job: Job, whole: Job) -> None:
    """It has the same bits, and nothing of what ranks told one another is left."""
    assert job.results(_SIZE) == whole.results(_SIZE)
    with holdfast.CheckpointManager(job.run) as ckpts:
        assert all(each.ok for each in ckpts.verify())
        ckpts.gc()
    assert list(ObjectStore(job.run).list("fragments/")) == []


@pytest.mark.slow
def test_ranks_killed_on_s3(s3: Place, whole: Job, tmp_path: Path) -> None:
    """Rank 0, another one, all: while they train, and while they save."""
    rng = random.Random(5)
    job = Job(tmp_path / "job", "ddp", epochs=_EPOCHS, every="2", address=s3.address)
    kills, rounds = dict.fromkeys(WHOM, 0), 0
    while min(kills.values()) < _KILLS:
        whom = min(kills, key=lambda one: kills[one])
        before = job.steps()
        process = job.start(_SIZE)
        ranks = job.ranks()
        job.wait_saved(process, before)
        time.sleep(rng.uniform(0.0, 0.03))
        for rank in WHOM[whom](ranks):
            with suppress(ProcessLookupError):  # it came to its end before
                os.kill(rank, signal.SIGKILL)
        if job.end(process) != 0:
            kills[whom] += 1
            continue
        check(job, whole)
        rounds += 1
        address = s3.address.replace(s3.prefix, f"{s3.prefix}/{rounds}")
        job = Job(tmp_path / f"job{rounds}", "ddp", _EPOCHS, "2", address)
    assert job.finish(_SIZE) == 0, job.log().read_text()
    check(job, whole)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1] if EXHAUSTIVE else [1])
def test_a_rank_that_stands_still_while_it_saves_to_s3(
    rank: int, s3: Place, whole: Job, tmp_path: Path
) -> None:
    """Nothing of that save is seen. The others wait, and when it dies they end soon."""
    job = Job(tmp_path / "job", "ddp", epochs=_EPOCHS, every="1", address=s3.address)
    process = job.start(_SIZE)
    ranks = job.ranks()
    job.wait(job.steps)
    os.kill(ranks[rank], signal.SIGSTOP)
    time.sleep(0.5)
    seen = job.steps()
    time.sleep(0.5)
    assert job.steps() == seen
    with holdfast.CheckpointManager(job.run) as ckpts:
        assert all(each.ok for each in ckpts.verify())
    os.kill(ranks[rank], signal.SIGKILL)
    killed_s = time.monotonic()
    assert job.end(process) != 0
    assert time.monotonic() - killed_s < 15
    assert job.finish(_SIZE) == 0, job.log().read_text()
    check(job, whole)
