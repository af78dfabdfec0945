"""`run.map` and `run.once` of whole programs that are killed, and in a bucket."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import holdfast
from holdfast.manager.results import Results
from tests.support.servers.service import Place

PROGRAM = """\
import multiprocessing, os, signal, sys, time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import holdfast

KILLED_AT = int(os.environ["KILLED_AT"])
NUMBER = getattr(signal, os.environ["SIGNAL"])


def square(n):
    if n == KILLED_AT:
        time.sleep(0.1)
        # Of a pool's worker the parent is killed, which alone stores.
        os.kill(os.getppid() if "spawn" in sys.argv else os.getpid(), NUMBER)
        time.sleep(60 if NUMBER == signal.SIGKILL else 0.2)
    with open("computed", "a") as file:
        file.write(f"{n}\\n")
    return n * n


def total(values):
    with open("computed", "a") as file:
        file.write("total\\n")
    return {"total": sum(values)}


if __name__ == "__main__":
    pool = None
    if "threads" in sys.argv:
        pool = ThreadPoolExecutor(2)
    if "spawn" in sys.argv:
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    with holdfast.Run("run") as run:
        squares = list(run.map(square, range(8), executor=pool))
        print(run.once(total)(squares)["total"])
"""


def started(folder: Path, kind: str, killed_at: int, name: str) -> subprocess.CompletedProcess[str]:
    (folder / "program.py").write_text(PROGRAM)
    return subprocess.run(
        [sys.executable, "program.py", kind],
        cwd=folder,
        env={**os.environ, "KILLED_AT": str(killed_at), "SIGNAL": name},
        capture_output=True,
        text=True,
        timeout=120,
    )


def computed(folder: Path) -> list[str]:
    lines = (folder / "computed").read_text().split()
    (folder / "computed").unlink()
    return lines


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("alone", "SIGKILL"),
        pytest.param("threads", "SIGKILL", marks=pytest.mark.slow),
        pytest.param("spawn", "SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_only_missing_items_are_computed_after_a_kill(tmp_path: Path, kind: str, name: str) -> None:
    first = started(tmp_path, kind, 4, name)
    assert first.returncode == (-signal.SIGKILL if name == "SIGKILL" else 75), first.stderr
    before = computed(tmp_path)
    assert before
    manager = holdfast.CheckpointManager(tmp_path / "run")
    results = Results.of(manager)
    assert results.verify() == []
    stored = manager.stored_results().count
    manager.close()
    second = started(tmp_path, kind, -1, name)
    assert (second.returncode, second.stdout) == (0, "140\n"), second.stderr
    after = computed(tmp_path)
    assert len(after) == 9 - stored, "eight items and the total"
    if name == "SIGTERM":
        assert stored >= 4
        assert "SIGTERM" in first.stderr
        assert "Traceback" not in first.stderr
    # What was stored is not computed again. (What was computed when the kill came may be.)
    assert {*before, *after} == {*map(str, range(8)), "total"}
    if kind == "alone":
        assert started(tmp_path, kind, -1, name).stdout == "140\n"
        assert not (tmp_path / "computed").exists()


def test_results_in_a_bucket(s3: Place) -> None:
    computed: list[int] = []

    def rows(n: int) -> np.ndarray:
        computed.append(n)
        return np.full((n, 200_000), float(n))  # 16 MB: comes in blocks

    for _ in range(2):
        run = holdfast.Run(s3.address, every=None, quiet=True)
        assert [array.shape[0] for array in run.map(rows, [1, 10], version=1)] == [1, 10]
        assert run.once(version=1)(rows)(10)[9, 199_999] == 10.0
        run.close()
    assert computed == [1, 10]
