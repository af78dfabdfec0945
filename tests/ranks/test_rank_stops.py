"""Ranks that are asked to stop, or stand still for a while."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

import holdfast
from tests.ranks.jobs import Job


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = Job(tmp_path_factory.mktemp("whole") / "job", "ddp")
    assert job.finish(2) == 0, job.log().read_text()
    return job


@pytest.fixture
def hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As long as this file is there, no training comes to its end."""
    file = tmp_path / "hold"
    file.touch()
    monkeypatch.setenv("HOLD", str(file))
    return file


def in_training(job: Job) -> list[int]:
    """The ranks, once the first checkpoint is there."""
    ranks = job.ranks()
    until = time.monotonic() + 60
    while not list(Path(job.run, "manifests").glob("*.json")):
        assert time.monotonic() < until, job.log().read_text()
        time.sleep(0.01)
    return ranks


@pytest.mark.slow
@pytest.mark.parametrize("who", ["all", "rank 0", "rank 1"])
def test_a_stop_is_one_of_all_ranks(who: str, whole: Job, tmp_path: Path, hold: Path) -> None:
    """Whoever hears the signal: all save the same step, and end with the status that says so."""
    job = Job(tmp_path / "job", "ddp")
    process = job.start(2)
    ranks = in_training(job)
    for rank, pid in enumerate(ranks):
        if who in ("all", f"rank {rank}"):
            os.kill(pid, signal.SIGTERM)
    hold.unlink()
    assert job.end(process) == 75, job.log().read_text()
    with holdfast.CheckpointManager(job.run) as ckpts:
        newest = ckpts.checkpoints()[-1]
        assert newest.note == "preempted" or newest.step == 12
    assert job.finish(2) == 0, job.log().read_text()
    assert job.results(2) == whole.results(2)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_stands_still_holds_the_others_up_and_no_more(
    rank: int, whole: Job, tmp_path: Path, hold: Path
) -> None:
    job = Job(tmp_path / "job", "ddp", every="1")
    process = job.start(2)
    ranks = in_training(job)
    os.kill(ranks[rank], signal.SIGSTOP)
    hold.unlink()
    time.sleep(1.5)
    os.kill(ranks[rank], signal.SIGCONT)
    assert job.end(process) == 0, job.log().read_text()
    assert job.results(2) == whole.results(2)
    with holdfast.CheckpointManager(job.run) as ckpts:
        assert all(each.ok for each in ckpts.verify())


@pytest.mark.slow
def test_saves_by_the_clock_are_made_by_all_at_the_same_step(whole: Job, tmp_path: Path) -> None:
    job = Job(tmp_path / "job", "ddp", every="0.05s")
    assert job.finish(2) == 0, job.log().read_text()
    assert job.results(2) == whole.results(2)
    with holdfast.CheckpointManager(job.run) as ckpts:
        notes = [each.note for each in ckpts.checkpoints()]
        assert notes[-1] == "final"
        assert notes[0] == "every=0.05s"


@pytest.mark.slow
def test_the_first_rank_speaks_for_all(tmp_path: Path) -> None:
    job = Job(tmp_path / "job", "ddp", epochs=1)
    assert job.finish(2) == 0
    said = [line for line in job.lines() if re.search(r"no checkpoint|resumed", line)]
    assert said == [f"no checkpoint in {job.run}: starting at step 0"]
