"""`holdfast run` in a process of its own, over small programs."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

HEAD = """
import os, signal, subprocess, sys, time
from pathlib import Path

here = Path(sys.argv[1])

def attempt():
    "Counts the starts, from 1."
    path = here / "starts"
    path.write_text(path.read_text() + "." if path.exists() else ".")
    return len(path.read_text())

def beat(step, checkpoint=None):
    from holdfast.manager import heartbeat
    heartbeat.beat("run", "training", step)
    if checkpoint is not None:
        heartbeat.checkpoint("run", checkpoint, f"id-{checkpoint}")
"""


def holdfast_run(*options: str) -> list[str]:
    return [sys.executable, "-m", "holdfast", "run", "--max-backoff", "0.05s", *options, "--"]


class Supervised:
    """A supervisor and the program that it starts."""

    started: ClassVar[list[subprocess.Popen[str]]] = []

    def __init__(self, tmp_path: Path, body: str, *options: str) -> None:
        self.folder = tmp_path
        self.script = tmp_path / "train.py"
        self.script.write_text(HEAD + textwrap.dedent(body))
        self.errors = tmp_path / "stderr"
        self.temporary = tmp_path / "tmp"
        self.temporary.mkdir()
        self.words = [
            *holdfast_run("--log-dir", str(tmp_path / "logs"), *options),
            *(sys.executable, str(self.script), str(tmp_path)),
        ]
        self.environment = {**os.environ, "TMPDIR": str(self.temporary)}
        self.process: subprocess.Popen[str] | None = None

    def start(self, *, until: str = "", prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        """Start it, and wait for a file named `until` that the program makes."""
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [*prefix, *self.words],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        self.started.append(self.process)
        if until:
            wait_for(lambda: self.made(until) or self.process_ended())
            assert self.made(until), self.said
        return self.process

    def process_ended(self) -> bool:
        assert self.process is not None
        return self.process.poll() is not None

    def end(self) -> int:
        """Wait for its end; its exit status as `subprocess` has it."""
        assert self.process is not None
        self.out, _ = self.process.communicate(timeout=120)
        return self.process.returncode

    def run(self, *, prefix: tuple[str, ...] = ()) -> int:
        self.start(prefix=prefix)
        return self.end()

    def made(self, name: str) -> bool:
        return (self.folder / name).exists()

    def pid(self, name: str) -> int:
        """A pid that the program has written down."""
        return int((self.folder / name).read_text())

    @property
    def said(self) -> str:
        return self.errors.read_text()

    @property
    def starts(self) -> int:
        return len((self.folder / "starts").read_text())


def wait_for(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def exists(pid: int) -> bool:
    """Whether there is such a process, a zombie or not."""
    return Path("/proc", str(pid)).exists()
