"""Processes that train together: functions called in all of them at once.

The processes are forked from one that has imported torch, and stay for the whole session.
Each call makes a process group of its own, of as many of them as it asks for:

    def ranks_sum(size: int) -> float: ...            # at the top of a module
    results = call(ranks_sum, 4, 4)                   # one result for each of 4 ranks
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from tests.support.nursery import renew_thread_pool

MOST = 8
_TIMEOUT_S = 100
# On a busy machine gloo fails now and then to connect the ranks of a new group: once more, then.
_NOT_CONNECTED = "connectFullMesh failed"
_TRIES = 3


def call(function: Callable[..., Any], size: int, *args: Any) -> list[Any]:
    """What `function(*args)` returns in each of `size` ranks, in their order. Its arguments and
    results are pickled. Raises AssertionError with the traceback of each rank that failed."""
    failed = ""
    for _ in range(_TRIES):
        answers = _call(function, size, args)
        failed = "\n".join(
            f"rank {rank}:\n{text}" for rank, (_, text) in enumerate(answers) if text
        )
        if _NOT_CONNECTED not in failed:
            break
    assert not failed, failed
    return [result for result, _ in answers]


def _call(function: Callable[..., Any], size: int, args: tuple[Any, ...]) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        connections = _processes(size)
        for rank, connection in enumerate(connections):
            _send(connection, (function, args, rank, size, os.path.join(folder, "group")))
        return [_answer(connection) for connection in connections]


def _send(connection: Connection, value: object) -> None:
    """Not by `connection.send`: torch would keep a file open for each tensor."""
    connection.send_bytes(pickle.dumps(value))


def _answer(connection: Connection) -> Any:
    assert connection.poll(_TIMEOUT_S), "a rank does not answer"
    return pickle.loads(connection.recv_bytes())


_started: list[Connection] = []


def _processes(size: int) -> Sequence[Connection]:
    """So many of them, which stay until this process ends."""
    assert size <= MOST
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.ranks_preloaded"])
    while len(_started) < size:
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there,), daemon=True)
        process.start()
        there.close()
        _started.append(here)
        atexit.register(_end, process)
    return _started[:size]


def _end(process: Any) -> None:
    for connection in _started:  # all of them first: none waits for another one
        connection.close()
    process.join(10)


def _serve(connection: Connection) -> None:
    import torch
    from torch import distributed
    from torch._C._distributed_c10d import FileStore

    renew_thread_pool()
    while True:
        try:
            function, args, rank, size, file = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            store = FileStore(file, size)
            distributed.init_process_group(
                "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60)
            )
            distributed.barrier()  # who is done first is not to leave while others connect
            torch.manual_seed(0)
            answer = function(*args), ""
        except BaseException:
            answer = None, traceback.format_exc()
        finally:
            if distributed.is_initialized():
                distributed.destroy_process_group()
        _send(connection, answer)
