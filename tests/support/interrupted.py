"""A real program that is stopped once, killed once, and started again."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path


def check_stopped_and_killed(program: str, folder: Path) -> None:
    """`program` gets the address of its run and a file for its result, prints the number of each
    of its 40 steps, and saves every 5. SIGTERM is answered at the end of a step; SIGKILL leaves
    the last checkpoint; the result is that of one that was left alone."""

    def start(run: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", program, str(folder / run), str(folder / f"{run}.result")]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def heard(process: subprocess.Popen[str], upto: int) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= upto:
                return
        raise AssertionError("it ended")

    whole = start("whole")
    whole.communicate(timeout=60)
    assert whole.returncode == 0
    first = start("run")
    heard(first, 6)
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)
    assert first.returncode == 75
    second = start("run")
    heard(second, 18)
    second.kill()
    second.communicate(timeout=60)
    third = start("run")
    said, _ = third.communicate(timeout=60)
    assert third.returncode == 0
    assert int(said.split()[0]) >= 7
    assert (folder / "run.result").read_bytes() == (folder / "whole.result").read_bytes()
