"""Real processes for the matrix: killed with SIGKILL, or stopped with SIGTERM, at a place.

Importing torch takes seconds, a program milliseconds. So a `Nursery` is an interpreter that
has imported everything and forks a process for each start. A forked child is a process of
its own, with a process group of its own: it saves in threads, its loader has workers, signals
come from the kernel, and at its end its exit functions run. Each nursery has its own hash
seed and working directory, and what one began another goes on with.

    python processes.py    # reads requests, one JSON object a line; prints wait statuses
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parent.parent.parent
END_S = 60
"""Workers and programs take seconds; whoever takes longer hangs."""


class Nursery:
    """Starts processes of programs in `folder`, one at a time. Close it."""

    def __init__(self, folder: Path, hash_seed: int) -> None:
        folder.mkdir(parents=True)
        self.log = folder / "log.txt"
        environment = {
            **os.environ,
            "PYTHONHASHSEED": str(hash_seed),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__))],
                cwd=folder,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def start(
        self,
        program: str,
        address: Path,
        *,
        workers: int,
        attempt: int,
        end: tuple[str, int] | None = None,
        result: Path | None = None,
    ) -> int:
        """Run one process to its end; its exit code, negative for a signal.

        `end`: the name of a signal that it gets, and at which place. `result`: where it
        writes the steps that it made, and what it holds at its end.
        """
        request = {
            "program": program,
            "address": str(address),
            "workers": workers,
            "attempt": attempt,
            "end": end,
            "result": None if result is None else str(result),
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, f"the nursery died:\n{self.tail()}"
        return int(answer)

    def tail(self) -> str:
        """The end of what the processes printed."""
        return self.log.read_text(errors="replace")[-3000:]

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(END_S)
        self._process.stdout.close()


def read_result(path: Path) -> tuple[list[Any], dict[str, Any]]:
    """(steps, bits) that a process wrote at its end."""
    return pickle.loads(path.read_bytes())


# -- in the nursery -----------------------------------------------------------------------


def serve() -> None:
    """Fork a process for each request, until there are no more."""
    import torch

    import tests.matrix.programs  # noqa: F401 -- so that each child has it
    from tests.matrix.job import Job

    torch.set_num_threads(1)
    Job("").parts()  # torch imports the larger half of itself with the first optimizer
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            leave(live, json.loads(line))
        _, status = os.waitpid(child, 0)
        kill_group(child)  # a killed program's workers would notice only after seconds
        print(os.waitstatus_to_exitcode(status), flush=True)


def leave(program: Callable[[Any], None], request: Any) -> NoReturn:
    """Run `program` and end as Python does, but for taking torch apart, which takes longer
    than all the rest."""
    status = 1
    try:
        program(request)
        status = 0
    except SystemExit as exit:
        status = exit.code if isinstance(exit.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        os._exit(status)


def kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def live(request: dict[str, Any]) -> None:
    """One program's process."""
    from tests.matrix.job import Job, seeded
    from tests.matrix.programs import PROGRAMS

    os.setpgid(0, 0)
    signal.alarm(END_S)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # requests are for the nursery
    os.dup2(2, 1)
    end = request["end"]

    def ending(job: Job, number: int) -> None:
        if end is not None and number == end[1]:
            os.kill(os.getpid(), signal.Signals[end[0]])

    job = Job(request["address"], request["workers"], ending, request["attempt"])
    seeded(PROGRAMS[request["program"]], job)
    if request["result"] is not None:
        Path(request["result"]).write_bytes(pickle.dumps((job.steps, job.bits())))


if __name__ == "__main__":
    serve()
