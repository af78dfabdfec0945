"""Trainings by the Trainer on several ranks: functions called in processes that have imported
Transformers already, which takes longer than all that such a training does.

    def losses(folder: str) -> list[float]: ...           # at the top of a module
    ended = call(losses, 2, "/tmp/run")                   # how each of 2 ranks has ended
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from tests.support.nursery import renew_thread_pool

_TIMEOUT_S = 120.0


@dataclass
class Ended:
    """How a rank has ended."""

    status: int
    """Of the process; negative: the signal."""
    value: Any = None
    """What the function returned."""
    error: str = ""
    """What it raised, with the traceback."""


def call(function: Callable[..., Any], size: int, *args: Any) -> list[Ended]:
    """Call `function(*args)` in each of `size` new processes that form a group over gloo."""
    connection = _server()
    connection.send((function, args, size))
    assert connection.poll(_TIMEOUT_S), "a rank hangs"
    return connection.recv()


def values(ended: list[Ended]) -> list[Any]:
    """What the ranks returned. Fails if one did not."""
    errors = "\n".join(f"rank {rank}:\n{one.error}" for rank, one in enumerate(ended) if one.error)
    assert not errors, errors
    assert [one.status for one in ended] == [0] * len(ended)
    return [one.value for one in ended]


@functools.cache
def _server() -> Connection:
    """Forks the processes. Until this one ends."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there,), daemon=False)
    process.start()
    there.close()
    atexit.register(process.join, 10)
    atexit.register(here.close)
    return here


def _serve(connection: Connection) -> None:
    import tests.support.tiny_transformers  # noqa: F401

    while True:
        try:
            function, args, size = connection.recv()
        except EOFError:
            return
        with tempfile.TemporaryDirectory() as folder:
            connection.send(_run(function, args, size, Path(folder)))


def _run(function: Callable[..., Any], args: tuple[Any, ...], size: int, folder: Path) -> Any:
    ranks: dict[int, int] = {}
    for rank in range(size):
        child = os.fork()
        if child == 0:
            _live(function, args, rank, size, folder)
        ranks[child] = rank
    ended = [Ended(0)] * size
    while ranks:
        child, status = os.wait()
        rank = ranks.pop(child)
        answer = folder / f"answer{rank}"
        ended[rank] = pickle.loads(answer.read_bytes()) if answer.exists() else Ended(0)
        ended[rank].status = os.waitstatus_to_exitcode(status)
        if ended[rank].status < 0:
            for other in ranks:
                os.kill(other, signal.SIGKILL)  # as torchrun does, but for its patience
    return ended


def _live(
    function: Callable[..., Any], args: tuple[Any, ...], rank: int, size: int, folder: Path
) -> NoReturn:
    import torch.distributed as dist

    renew_thread_pool()
    os.environ |= {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(size)}
    status = 0
    try:
        if size > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/group",
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=60),
            )
        ended = Ended(0, function(*args))
    except SystemExit as exit:
        ended, status = Ended(0), exit.code if isinstance(exit.code, int) else 1
    except BaseException:
        ended = Ended(0, error=traceback.format_exc())
    new = folder / f"new{rank}"
    new.write_bytes(pickle.dumps(ended))
    new.rename(folder / f"answer{rank}")
    os._exit(status)  # without taking torch apart


def copied(folder: str, to: str) -> str:
    """A copy of a run's folder, once no save is in progress; to be called by all ranks."""
    import torch.distributed as dist

    from tests.support.jobs import savers

    for saver in savers():
        saver.finish()
    together = dist.is_initialized()
    if together:
        dist.barrier()
    if not together or dist.get_rank() == 0:
        shutil.copytree(folder, to)
    if together:
        dist.barrier()
    return to
