"""As torchrun: starts the ranks of a script on this machine, and ends all when one fails.

    python launcher.py RANKS PIDS SCRIPT ARGS...

It writes the ranks' processes into the file PIDS, a number a line. The ranks are forked, from a
process that has imported torch already if this one is (see `nursery`), and die with it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

from tests.support.nursery import run_and_end

LAUNCHER = Path(__file__)
_PR_SET_PDEATHSIG = 1
_GRACE_S = 5.0


def main() -> None:
    size, pids = int(sys.argv[1]), Path(sys.argv[2])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children: dict[int, int] = {}
    for rank in range(size):
        child = os.fork()
        if child == 0:
            _live(rank, size, port)
        children[child] = rank
    pids.with_suffix(".new").write_text("".join(f"{child}\n" for child in children))
    pids.with_suffix(".new").rename(pids)

    def forward(number: int, frame: object) -> None:
        for child in children:
            _kill(child, number)

    signal.signal(signal.SIGTERM, forward)
    failed = 0
    while children:
        child, status = os.wait()
        children.pop(child)
        code = os.waitstatus_to_exitcode(status)
        if code and not failed:
            failed = code
            threading.Thread(target=_end, args=(list(children),), daemon=True).start()
    sys.exit(failed if failed >= 0 else 1)


def _end(others: list[int]) -> None:
    """What one rank has left, the others cannot finish."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for child in others:
            _kill(child, number)
        time.sleep(_GRACE_S)


def _kill(child: int, number: int) -> None:
    try:
        os.kill(child, number)
    except ProcessLookupError:
        pass


def _live(rank: int, size: int, port: int) -> NoReturn:
    def settle() -> list[str]:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        return sys.argv[3:]

    run_and_end(settle)


if __name__ == "__main__":
    main()
