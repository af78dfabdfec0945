"""Programs whose stderr is a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
from collections.abc import Sequence
from pathlib import Path


def on_a_terminal(command: Sequence[str | Path], *, cwd: str | Path | None = None) -> str:
    """What the program writes to its stderr, which is a terminal. It ends well."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, cwd=cwd, stderr=theirs) as job:
        os.close(theirs)
        said = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # how Linux says that the other end was closed
                break
            if not part:
                break
            said += part
    os.close(ours)
    assert job.returncode == 0, said
    return said.decode()
