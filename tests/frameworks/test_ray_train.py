"""Ray Train itself: a worker killed, the driver killed, another number of workers.

The cluster is this machine, and outlives the drivers. A start of Ray's workers, and of the five
actors beside them, takes twenty seconds of a core: what nobody kills runs as Ray's local mode,
in which `torchrun` starts the processes (`make exhaustive`: under Ray, too).
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.examples.test_examples import ROOT, newest_entry, state
from tests.support.exhaustive import EXHAUSTIVE
from tests.support.launcher import LAUNCHER
from tests.support.nursery import kill_group, nurseries

_WAIT_S = 400.0
_SCRIPT = str(ROOT / "examples" / "ray_train_digits.py")
_SETTINGS = ["--epochs", "20", "--every", "10"]
_STEPS = 20 * 29
_QUIET = {
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "disabled",  # else it leaves a token in the home folder
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(_WAIT_S),
}


class Cluster:
    """Ray on this machine, and the drivers that use it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.environment = {**os.environ, **_QUIET, "HOME": str(folder)}
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"]
        command += ["--port", str(port), "--num-cpus", "2", "--include-dashboard", "false"]
        command += ["--object-store-memory", "80000000", "--temp-dir", str(folder)]
        with (folder / "node.log").open("w") as log:
            self._node = subprocess.Popen(
                command,
                env=self.environment,
                start_new_session=True,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.environment["RAY_ADDRESS"] = f"127.0.0.1:{port}"

    def close(self) -> None:
        kill_group(self._node.pid)
        self._node.wait()

    def driver(self, run: Path, workers: int = 2) -> subprocess.Popen[bytes]:
        given = ["--run", str(run), "--workers", str(workers), *_SETTINGS]
        with self.log(run).open("a") as log:
            return subprocess.Popen(
                [sys.executable, _SCRIPT, *given],
                env=self.environment,
                start_new_session=True,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def log(self, run: Path) -> Path:
        return run.with_suffix(".log")

    def finish(self, run: Path, workers: int = 2) -> None:
        with self.driver(run, workers) as driver:
            try:
                assert driver.wait(_WAIT_S) == 0, self.log(run).read_text()
            finally:
                kill_group(driver.pid)

    def locally(self, run: Path, workers: int = 2) -> None:
        """The same script to its end, in processes that `torchrun` would start."""
        given = [str(workers), str(run.with_suffix(".pids")), _SCRIPT]
        given += ["--run", str(run), "--workers", "0", *_SETTINGS]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LOCAL_WORLD_SIZE", str(workers))
            patch.setenv("HOME", self.environment["HOME"])
            process = nurseries()[0].start(LAUNCHER, *given, cwd=run.parent, log=self.log(run))
        assert process.wait(_WAIT_S) == 0, self.log(run).read_text()

    def until_saved(self, run: Path, entries: int) -> None:
        """Wait until it has added so many entries to the run's log."""
        goal = newest_entry(run) + entries
        until = time.monotonic() + _WAIT_S
        while newest_entry(run) < goal:
            assert time.monotonic() < until, self.log(run).read_text()
            time.sleep(0.005)


def workers() -> list[int]:
    """The processes that train: Ray names them."""
    found: list[int] = []
    for one in Path("/proc").iterdir():
        try:
            if one.name.isdigit() and b"ray::RayTrainWorker" in (one / "cmdline").read_bytes():
                found.append(int(one.name))
        except OSError:
            continue  # it has ended
    return sorted(found)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Sockets are in it: no long path.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        cluster = Cluster(Path(folder))
        try:
            yield cluster
        finally:
            cluster.close()


@pytest.mark.ray
@pytest.mark.timeout(1500)
def test_killed_and_started_again(cluster: Cluster, tmp_path: Path) -> None:
    alone, killed, fewer = (tmp_path / name for name in ("alone", "killed", "fewer"))
    finish = cluster.finish if EXHAUSTIVE else cluster.locally
    finish(alone)

    driver = cluster.driver(killed)
    cluster.until_saved(killed, 3)
    one, _ = workers()
    os.kill(one, signal.SIGKILL)
    cluster.until_saved(killed, 3)  # Ray has started both again
    driver.kill()
    driver.wait()
    while workers():  # it ends them, since they were the driver's
        time.sleep(0.1)
    shutil.copytree(killed, fewer)
    finish(killed)
    said = cluster.log(killed).read_text()
    first, second = (int(step) for step in re.findall(r"resumed \S+ at step (\d+)", said))
    assert 0 < first < second < _STEPS
    # A line for each start under Ray, though both workers train on threads.
    assert said.count("not on the main thread") == (3 if EXHAUSTIVE else 2)
    assert state(killed) == state(alone)

    finish(fewer, workers=1)
    said = cluster.log(fewer).read_text()
    assert "saved by 2 ranks, goes on with 1" in said
    assert "the number of ranks was 2, is 1, inside an epoch" in said
