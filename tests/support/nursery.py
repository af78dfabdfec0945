"""Processes that need not import torch, which takes a second and a half of a core.

A `Nursery` is an interpreter that has imported it and forks a process for each start. Such a
process is one of its own, with a process group of its own: it saves in threads, its loader has
workers, signals come from the kernel, and at its end its exit functions run. Each nursery has its
own hash seed, and what a process of one began a process of another can go on with.

    python nursery.py MODULE    # imports it, and reads requests, one JSON object a line
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parent.parent.parent


class Nursery:
    """Starts processes of scripts, one at a time. Close it."""

    def __init__(self, hash_seed: int, preload: str = "tests.support.preloaded") -> None:
        """`preload`: the module whose imports its processes need not make."""
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), preload],
            env={
                **os.environ,
                "PYTHONHASHSEED": str(hash_seed),
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # `select` does not see what a buffer holds
        )

    def start(self, script: Path, *args: str, cwd: Path, log: Path) -> Forked:
        """`python script args` in the folder `cwd`, with this process's environment but for the
        hash seed; what it prints is added to `log`."""
        request = {
            "argv": [str(script), *args],
            "cwd": str(cwd),
            "log": str(log),
            "environment": dict(os.environ),
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        return Forked(self, self.read())

    def read(self, timeout_s: float | None = None) -> int:
        """The next number that it prints: a process, or how that has ended."""
        assert self._process.stdout is not None
        waiting = select.poll()  # `select` takes no descriptor above 1023
        waiting.register(self._process.stdout, select.POLLIN)
        if not waiting.poll(None if timeout_s is None else timeout_s * 1000):
            raise subprocess.TimeoutExpired("a process of the nursery", timeout_s or 0)
        line = self._process.stdout.readline()
        assert line, "the nursery died"
        return int(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


@functools.cache
def nurseries() -> tuple[Nursery, Nursery]:
    """Two with different hash seeds, until this process ends."""
    both = Nursery(1), Nursery(2)
    for nursery in both:
        atexit.register(nursery.close)
    return both


@dataclass
class Forked:
    """A process, as `subprocess.Popen` shows one."""

    nursery: Nursery
    pid: int
    returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = self.nursery.read(timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """It is a child of the nursery, and gone once that has waited for it."""
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return


# -- in the nursery -----------------------------------------------------------------------


def serve() -> None:
    """Fork a process for each request, until there are no more."""
    importlib.import_module(sys.argv[1])
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            live(json.loads(line))
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def live(request: dict[str, Any]) -> NoReturn:
    """Be the process that was asked for."""

    def settle() -> list[str]:
        os.setsid()
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["environment"])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # requests are for the nursery
        os.dup2(os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT), 1)
        os.dup2(1, 2)
        return request["argv"]

    run_and_end(settle)


def run_and_end(settle: Callable[[], list[str]]) -> NoReturn:
    """In a fork: settle in, run the script of the arguments that `settle` returns, and end as
    Python does, but for taking torch apart, which takes longer than all the rest."""
    status = 1
    try:
        renew_thread_pool()
        sys.argv = settle()
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as exit:
        status = exit.code if isinstance(exit.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            threading._shutdown()  # type: ignore[attr-defined]  -- waits for threads
            atexit._run_exitfuncs()
            sys.stdout.flush()
        finally:
            os._exit(status)


def renew_thread_pool() -> None:
    """In a fork of a process that has imported torch, before there are other threads. torch makes
    its pool anew where it is used first, and a second thread that comes meanwhile finds none:
    "Invalid thread pool!" (caffe2/utils/threadpool/pthreadpool-cpp.cc), or the process aborts."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(torch.get_num_threads())


def kill_group(group: int) -> None:
    """Kill what a process has left behind, such as a loader's workers."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    serve()
