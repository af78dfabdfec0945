"""Real processes for the matrix: killed with SIGKILL, or stopped with SIGTERM, at a place.

python processes.py REQUEST    # a JSON object; see `run`
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
from pathlib import Path
from typing import Any

from tests.support.nursery import Nursery, kill_group

END_S = 60
"""Workers and programs take seconds; whoever takes longer hangs."""


def run(
    nursery: Nursery,
    folder: Path,
    program: str,
    *,
    workers: int,
    attempt: int,
    end: tuple[str, int] | None = None,
    result: Path | None = None,
) -> int:
    """Run one process to its end; its exit code, negative for a signal. Its run is in
    `folder`/run, what it printed in `folder`/log.txt.

    `end`: the name of a signal that it gets, and at which place. `result`: where it
    writes the steps that it made, and what it holds at its end.
    """
    request = {
        "program": program,
        "address": str(folder / "run"),
        "workers": workers,
        "attempt": attempt,
        "end": end,
        "result": None if result is None else str(result),
    }
    cwd = folder / f"cwd{attempt}"
    cwd.mkdir(parents=True)
    process = nursery.start(Path(__file__), json.dumps(request), cwd=cwd, log=folder / "log.txt")
    code = process.wait()
    kill_group(process.pid)  # a killed program's workers would notice only after seconds
    return code


def read_result(path: Path) -> tuple[list[Any], dict[str, Any]]:
    """(steps, bits) that a process wrote at its end."""
    return pickle.loads(path.read_bytes())


def live(request: dict[str, Any]) -> None:
    """One program's process."""
    from tests.matrix.job import Job, seeded
    from tests.matrix.programs import PROGRAMS

    signal.alarm(END_S)
    end = request["end"]

    def ending(job: Job, number: int) -> None:
        if end is not None and number == end[1]:
            os.kill(os.getpid(), signal.Signals[end[0]])

    job = Job(request["address"], request["workers"], ending, request["attempt"])
    seeded(PROGRAMS[request["program"]], job)
    if request["result"] is not None:
        Path(request["result"]).write_bytes(pickle.dumps((job.steps, job.bits())))


if __name__ == "__main__":
    live(json.loads(sys.argv[1]))
