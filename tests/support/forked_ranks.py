"""Processes that form a group over gloo for one call, and may die in it; see `ranks` for those
that live on.

    run_ranks(function, "memory", size=2)    # function(rank, size, "memory") on each

`function` is of a module that can be imported. What it returns comes back; what it raises, too.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

TIMEOUT_S = 120.0


@dataclass
class Ended:
    """How a rank ended."""

    status: int
    """Of the process; negative: the signal."""
    value: Any = None
    """What the function returned."""
    error: str = ""
    """What it raised, with its class."""


@functools.cache
def _forkserver() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.ranks_preloaded"])  # as `ranks`: there is one
    return context


def run_ranks(function: Callable[..., Any], *args: Any, size: int = 2) -> list[Ended]:
    """How each of `size` processes ended, in the order of ranks."""
    context = _forkserver()
    processes: list[Any] = []
    pipes: list[Connection] = []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(size):
            here, there = context.Pipe(duplex=False)
            process = context.Process(
                target=_live, args=(there, str(Path(folder) / "store"), rank, size, function, args)
            )
            process.start()
            there.close()
            processes.append(process)
            pipes.append(here)
        try:
            return [_ended(*both) for both in zip(processes, pipes, strict=True)]
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()


def values(ended: list[Ended]) -> list[Any]:
    """What the ranks returned. Fails if one did not."""
    assert [(one.status, one.error) for one in ended] == [(0, "")] * len(ended)
    return [one.value for one in ended]


def die() -> None:
    """End this process as the kernel does when memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)


def _ended(process: Any, pipe: Connection) -> Ended:
    found = Ended(0)
    if wait([pipe], TIMEOUT_S):
        try:
            found = pipe.recv()
        except EOFError:
            pass  # it was killed
    process.join(TIMEOUT_S)
    assert process.exitcode is not None, "a rank hangs"
    found.status = process.exitcode
    return found


def _live(
    pipe: Connection,
    store: str,
    rank: int,
    size: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        pipe.send(Ended(0, function(rank, size, *args)))
    except BaseException as error:
        pipe.send(Ended(0, error=f"{type(error).__name__}: {error}"))
    pipe.close()
    # Without taking the group apart: others may be dead.
    import atexit

    atexit._run_exitfuncs()
    os._exit(0)
