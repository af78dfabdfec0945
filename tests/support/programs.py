"""Training scripts in processes of their own, to be sent signals."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import holdfast

HEAD = """
import os, signal, sys, time
import numpy as np
import holdfast

# Tests that are started in the background ignore it, and so would this process.
signal.signal(signal.SIGINT, signal.default_int_handler)
run = holdfast.Run(sys.argv[1], every=None, keep=None, OPTIONS)
values = []
run.track(values=values)

def say(word):
    print(word, flush=True)

def wait(seconds=30.0):
    "A long step: its time is not cut short by a signal."
    end = time.monotonic() + seconds
    while time.monotonic() < end and not run._session.stopping.signals.requested:
        time.sleep(0.01)
"""


class Program:
    """A training script in a child process with a process group of its own."""

    def __init__(self, tmp_path: Path, body: str, *, options: str = "") -> None:
        self.address = str(tmp_path / "run")
        self.script = tmp_path / "train.py"
        self.errors = tmp_path / "stderr"
        head = HEAD.replace(", OPTIONS", f", {options}" if options else "")
        self.script.write_text(head + textwrap.dedent(body))
        self.process: subprocess.Popen[str] | None = None

    def start(self, until: str = "ready") -> subprocess.Popen[str]:
        """Start it, and wait until it prints `until`."""
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(self.script), self.address],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip() == until:
                return self.process
        raise AssertionError(f"ended early: {self.end()}")

    def await_error(self, text: str, timeout_s: float = 60.0) -> None:
        """Wait until it has printed `text` to stderr."""
        end = time.monotonic() + timeout_s
        while text not in self.errors.read_text():
            assert time.monotonic() < end, self.errors.read_text()
            time.sleep(0.01)

    def end(self) -> tuple[int, str, str]:
        assert self.process is not None
        assert self.process.stdout is not None
        with self.process.stdout as stdout:
            out = stdout.read()
        return self.process.wait(60), out, self.errors.read_text()

    def again(self) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, str(self.script), self.address],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    def saved(self) -> list[tuple[int, str]]:
        with holdfast.CheckpointManager(self.address) as manager:
            return [(info.step, info.note) for info in manager.checkpoints()]
