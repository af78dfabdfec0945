"""The examples, killed with SIGKILL and started again, end as if left alone."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import holdfast
from holdfast.manager.nodes import leaf_indexes
from tests.support.exhaustive import EXHAUSTIVE

ROOT = Path(__file__).resolve().parent.parent.parent


class Example:
    """One of the scripts, with settings that make it short and its saves frequent."""

    def __init__(self, script: str, *arguments: str, warnings: str = "error") -> None:
        self._command = [sys.executable, str(ROOT / "examples" / script), *arguments, "--run"]
        self._warnings = warnings
        self._hash_seed = 0

    def start(self, run: Path, cwd: Path) -> subprocess.Popen[str]:
        # As after a restart elsewhere: another folder, another order of sets.
        self._hash_seed += 1
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONHASHSEED": str(self._hash_seed),
            "PYTHONWARNINGS": self._warnings,
        }
        cwd.mkdir(exist_ok=True)
        return subprocess.Popen(
            [*self._command, str(run)],
            cwd=cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, run: Path, cwd: Path) -> str:
        with self.start(run, cwd) as process:
            output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        return output

    def kill_after(self, run: Path, cwd: Path, entries: int, delay_s: float) -> bool:
        """SIGKILL it a while after it added log entries; False if it ended before."""
        with self.start(run, cwd) as process:
            watchdog = threading.Timer(120, process.kill)
            watchdog.start()
            try:
                goal = newest_entry(run) + entries
                while process.poll() is None and newest_entry(run) < goal:
                    time.sleep(0.002)
                time.sleep(delay_s)
                process.kill()
                output, _ = process.communicate()
            finally:
                watchdog.cancel()
                process.kill()
        assert process.returncode in (0, -9), output
        return process.returncode == -9

    def finish_and_leave(self, run: Path, cwd: Path, entries: int, left: Path) -> str:
        """As `finish`, and into `left` what a SIGKILL after so many log entries would leave: it
        is stopped and copied. A start less, where one takes seconds."""
        with self.start(run, cwd) as process:
            try:
                wait_for_entries(run, entries, process)
                process.send_signal(signal.SIGSTOP)
                # A thread that deletes old packs may still run when the call returns.
                os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
                shutil.copytree(run, left)
                process.send_signal(signal.SIGCONT)
                output, _ = process.communicate(timeout=120)
            finally:
                process.kill()
        assert process.returncode == 0, output
        return output


def wait_for_entries(run: Path, entries: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while newest_entry(run) < entries:
        assert process.poll() is None, "it ended before"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def newest_entry(run: Path) -> int:
    return max((int(path.stem) for path in run.glob("log/*.json")), default=0)


def last_line(output: str) -> str:
    return output.strip().splitlines()[-1]


DIGITS = Example("torch_digits.py", "--epochs", "4", "--every", "10")
TOUR = Example("generic.py", "--sweeps", "150", "--every", "10")
MANUAL = Example("char_transformer.py", "--epochs", "2", "--every", "5", "--characters", "30000")
SUMS = Example("transformers_sums.py", "--steps", "40", "--every", "3")
TREES = Example("xgboost_digits.py", "--rounds", "30", "--every", "3")
# What Keras does to arrays of NumPy 2 is deprecated.
KERAS = Example(
    "keras_digits.py", "--epochs", "3", "--every", "5", warnings="error,ignore::DeprecationWarning"
)
ARRAYS = Example("jax_digits.py", "--epochs", "8", "--every", "10")
PASSES = Example("sklearn_digits.py", "--epochs", "8", "--every", "10")
NETWORK = Example("lightning_digits.py", "--epochs", "3", "--every", "20")

# When it is killed: so many entries of the log after its start. Once, or stopped and copied there,
# where a start is slow.
QUICK = {
    "torch_digits": (DIGITS, [4]),
    "generic": (TOUR, [3, 4]),
    "char_transformer": (MANUAL, [4]),
    "xgboost_digits": (TREES, [3, 4]),
    "jax_digits": (ARRAYS, [4]),
    "sklearn_digits": (PASSES, [4]),
}
SLOW = {  # to import these takes seconds
    "transformers_sums": (SUMS, [4]),
    "lightning_digits": (NETWORK, [4]),
    "keras_digits": (KERAS, [4]),
}


@pytest.mark.parametrize(
    ("example", "times"),
    [
        *(pytest.param(*value, id=name) for name, value in QUICK.items()),
        *(pytest.param(*value, id=name, marks=pytest.mark.slow) for name, value in SLOW.items()),
    ],
)
def test_killed_and_resumed(example: Example, times: list[int], tmp_path: Path) -> None:
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    if len(times) == 1 and not EXHAUSTIVE:
        whole = example.finish_and_leave(alone, tmp_path / "a", times[0], killed)
        times = []
    else:
        whole = example.finish(alone, tmp_path / "a")

    random_delay = random.Random(7)
    kills = sum(
        example.kill_after(killed, tmp_path / f"b{n}", entries, random_delay.uniform(0, 0.05))
        for n, entries in enumerate(times)
    )
    assert kills == len(times)
    output = example.finish(killed, tmp_path / "c")

    assert "resumed" in output
    assert last_line(output) == last_line(whole)
    assert state(alone) == state(killed)


def test_a_run_that_lost_its_folder_goes_on_from_its_mirror(tmp_path: Path) -> None:
    expected = last_line(TOUR.finish(tmp_path / "alone", tmp_path / "a"))
    run, mirror = tmp_path / "run", tmp_path / "mirror"
    example = Example("generic.py", "--sweeps", "150", "--every", "10", "--mirror", str(mirror))
    with example.start(run, tmp_path / "b") as process:
        wait_for_entries(mirror, 4, process)
        process.kill()
    shutil.rmtree(run)
    output = example.finish(run, tmp_path / "c")
    assert f"resumed {run}" in output
    assert f"(from {mirror}, verified" in output
    assert last_line(output) == expected


def state(run: Path) -> tuple[Any, ...]:
    """The newest checkpoint's values, and the digests of its bytes, which prove themselves."""
    with holdfast.CheckpointManager(run) as manager:
        assert all(result.ok for result in manager.verify())
        manifest = manager.manifest()
    used = set(leaf_indexes(manifest.tree))
    leaves = [leaf for index, leaf in enumerate(manifest.leaves) if index in used]
    return manifest.tree, [
        (leaf.path, leaf.dtype, leaf.shape, [chunk.digest for chunk in leaf.chunks])
        for leaf in leaves
    ]


def test_a_finished_example_trains_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = TOUR.finish(run, tmp_path / "a")
    checkpoints = [c.id for c in holdfast.CheckpointManager(run).checkpoints()]
    second = TOUR.finish(run, tmp_path / "b")
    assert last_line(first) == last_line(second)
    assert [c.id for c in holdfast.CheckpointManager(run).checkpoints()] == checkpoints
