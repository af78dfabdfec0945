"""Jobs of two nodes on a real Slurm: signals, its queue, ranks that die. `make slurm` runs them."""

from __future__ import annotations

import os
import re
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.jobs.job import Job
from holdfast.jobs.slurm import slurm_script
from tests.jobs.slurm_cluster import Slurm, slurm
from tests.ranks import jobs

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

_TRAIN = str(Path(jobs.__file__).with_name("train.py"))
_EPOCHS = 60
_PAGE = Path(__file__).resolve().parents[2] / "docs" / "clusters.md"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Slurm]:
    folder = tmp_path / "job"
    folder.mkdir()
    with slurm(folder) as found:
        yield found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> jobs.Job:
    job = jobs.Job(tmp_path_factory.mktemp("whole") / "job", "ddp", epochs=_EPOCHS)
    assert job.finish(2) == 0, job.log().read_text()
    return job


def words() -> list[str]:
    """The script and its arguments; its results lie beside its run."""
    return [_TRAIN, "run", "result", "ddp", str(_EPOCHS), "3", "0"]


def entries(cluster: Slurm) -> int:
    return max((int(path.stem) for path in cluster.folder.glob("run/log/*.json")), default=0)


def until_saved(cluster: Slurm, more: int) -> None:
    goal = entries(cluster) + more
    cluster.until(lambda: entries(cluster) >= goal)


def ranks(cluster: Slurm) -> list[int]:
    """The processes that train, on both nodes."""
    found: list[int] = []
    for one in Path("/proc").iterdir():
        try:
            parts = (one / "cmdline").read_bytes().split(b"\0")
            if one.name.isdigit() and b"python" in parts[0] and _TRAIN.encode() in parts[1:3]:
                found += [int(one.name)] if (one / "cwd").readlink() == cluster.folder else []
        except OSError:
            continue  # it has ended
    return found


def check(cluster: Slurm, script: str, whole: jobs.Job) -> None:
    """A signal, the queue, the death of a rank, and the end of a run that nobody disturbed."""
    number = cluster.submit(script)
    until_saved(cluster, 4)
    cluster.call("scancel", "--signal=USR1", number)  # what comes before the time limit
    cluster.until_queued_again(number)
    assert "SIGUSR1: saved step" in cluster.said()
    assert cluster.said().count(f"job {number} is in the queue again") == 1

    until_saved(cluster, 4)
    assert "resumed run at step" in cluster.said()
    os.kill(ranks(cluster)[-1], signal.SIGKILL)
    cluster.until(lambda: cluster.state(number) not in ("RUNNING", "COMPLETING"))
    assert cluster.state(number) == "COMPLETED", cluster.said()
    assert len(re.findall("resumed run at step", cluster.said())) >= 2
    job = jobs.Job(cluster.folder, "ddp")
    assert job.results(2) == whole.results(2)


def test_torchrun_on_two_nodes(cluster: Slurm, whole: jobs.Job) -> None:
    """The script of `holdfast init slurm`, as it is printed."""
    job = Job(("torchrun", *words()), name="train", nodes=2, time_s=600.0, run="run")
    check(cluster, slurm_script(job), whole)


def test_ranks_without_a_launcher(cluster: Slurm, whole: jobs.Job) -> None:
    """The script of the page."""
    [script] = re.findall(r"<!-- ranks -->\n```bash\n(.*?)```\n", _PAGE.read_text(), re.DOTALL)
    check(cluster, script.replace("train.py", shlex.join(words())), whole)


def test_a_job_that_is_cancelled_saves_and_stays_away(cluster: Slurm) -> None:
    job = Job(("torchrun", *words()), name="train", nodes=2, time_s=600.0, run="run")
    number = cluster.submit(slurm_script(job))
    until_saved(cluster, 4)
    cluster.call("scancel", number)
    cluster.until(lambda: cluster.state(number) == "CANCELLED")
    cluster.until(lambda: not ranks(cluster))
    assert "SIGTERM: saved step" in cluster.said()
    assert "in the queue again" not in cluster.said()
