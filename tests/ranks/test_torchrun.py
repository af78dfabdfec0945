"""The real torchrun: its restarts, its signals, its exit statuses."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import holdfast
from tests.ranks.jobs import Job
from tests.ranks.torchruns import Launched, torchrun
from tests.support.exhaustive import EXHAUSTIVE

_SIZE = 2
# So many steps that a signal comes in time.
_EPOCHS, _STEPS = 10, 60


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Nobody disturbs it, and it is not started by torchrun."""
    job = Job(tmp_path_factory.mktemp("whole") / "job", "ddp", epochs=_EPOCHS)
    assert job.finish(_SIZE) == 0, job.log().read_text()
    return job


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Callable[[], Launched]]:
    made: list[Launched] = []

    def make() -> Launched:
        job = Job(tmp_path / "job", "ddp", epochs=_EPOCHS)
        made.append(Launched(job))
        return made[0]

    yield make
    for one in made:
        one.close()


def check(job: Job, whole: Job) -> None:
    assert job.results(_SIZE) == whole.results(_SIZE)
    with holdfast.CheckpointManager(job.run) as ckpts:
        assert all(each.ok for each in ckpts.verify())
        assert ckpts.checkpoints()[-1].step == _STEPS


@pytest.mark.slow
def test_torchrun_starts_the_group_again_and_stops_it(
    launched: Callable[[], Launched], whole: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker is killed; later torchrun itself is asked to stop, and the ranks go on."""
    monkeypatch.setenv("WORKERS", "1")
    runs = launched()
    command = torchrun(_SIZE, "--max-restarts", "3")
    process = runs.start(*command)
    runs.job.wait(lambda: runs.saved() >= 3)
    runs.kill(1)
    killed_s = time.monotonic()
    runs.job.wait(lambda: len(runs.starts()) == 2 * _SIZE)
    # Not half a minute later, which is when torchrun kills what has not ended.
    assert time.monotonic() - killed_s < 25
    assert [count for count, _, _ in runs.starts()] == [0, 0, 1, 1]
    before = runs.saved()
    runs.job.wait(lambda: runs.saved() > before)
    process.terminate()
    assert runs.end(process) == 1  # what torchrun makes of its workers' 75
    log = runs.job.log().read_text()
    assert log.count("no checkpoint in") == log.count("resumed") == 1
    assert "saved step" in log
    with holdfast.CheckpointManager(runs.job.run) as ckpts:
        assert ckpts.checkpoints()[-1].note == "preempted", log
    if EXHAUSTIVE:
        assert runs.end(runs.start(*command)) == 0, runs.job.log().read_text()
        assert [count for count, _, _ in runs.starts()] == [0, 0, 1, 1, 0, 0]
    else:
        assert runs.job.finish(_SIZE) == 0, runs.job.log().read_text()
    check(runs.job, whole)


@pytest.mark.slow
def test_holdfast_run_before_torchrun(launched: Callable[[], Launched], tmp_path: Path) -> None:
    """A worker is killed, and with it torchrun ends: it is started again, and goes on. A SIGTERM
    passes through both, and the status is that of the training. It goes on on more ranks."""
    runs = launched()
    supervisor = [sys.executable, "-m", "holdfast", "run", "--max-backoff", "0.05s"]
    supervisor += ["--log-dir", str(runs.job.folder), "--"]
    process = runs.start(*supervisor, *torchrun(_SIZE))
    runs.job.wait(lambda: runs.saved() >= 3)
    runs.kill(0)
    runs.job.wait(lambda: len(runs.starts()) == 2 * _SIZE)
    before = runs.saved()
    runs.job.wait(lambda: runs.saved() > before)
    process.terminate()
    assert runs.end(process) == 75, runs.job.log().read_text()
    said = [line for line in runs.job.lines() if line.startswith("holdfast run: ")]
    assert any("attempt 1 ended with status 1" in line for line in said), said
    assert "SIGTERM had asked for it" in said[-1]
    same = Job(tmp_path / "same", "ddp", epochs=_EPOCHS)
    shutil.copytree(runs.job.run, same.run)
    more = _SIZE + 1
    if EXHAUSTIVE:
        assert runs.end(runs.start(*supervisor, *torchrun(more))) == 0, runs.job.log().read_text()
    else:
        assert runs.job.finish(more) == 0, runs.job.log().read_text()
    assert f"saved by {_SIZE} ranks, goes on with {more}" in runs.job.lines()
    assert same.finish(more) == 0, same.log().read_text()
    assert runs.job.results(more) == same.results(more)
