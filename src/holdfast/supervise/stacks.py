"""Where the threads of a command are, when it hangs."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

from holdfast.manager.heartbeat import STACKS_SIGNAL
from holdfast.supervise.processes import Process, catches, send

# A process that runs C code, or waits, answers at once: faulthandler needs no Python code to
# run. One that was stopped, or sits in an uninterruptible wait, does not.
_ANSWER_S = 2.0
_SETTLED_S = 0.1
_ALL_S = 30.0
_POLL_S = 0.01


def save_stacks(processes: Sequence[Process], answers: Path, folder: Path) -> bool:
    """Write a file for each process into `folder`: what it is, what it waits for, and the
    stack of each of its Python threads. `answers` is the folder of the heartbeats, where
    processes write their stacks when they are sent a signal; only those get it that have a
    handler, since it would end others. False if nothing could be written."""
    deadline = time.monotonic() + _ALL_S
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for process in processes:
            text = describe(process)
            if STACKS_SIGNAL is None or not catches(process.pid, STACKS_SIGNAL):
                text += "\n(not a Python process that has loaded Holdfast: no stacks)\n"
            elif stacks := _ask(process, answers, min(deadline, time.monotonic() + _ANSWER_S)):
                text += "\n" + stacks
            else:
                text += "\n(it did not answer: no stacks)\n"
            (folder / f"{process.pid}.txt").write_text(text)
    except OSError:
        return False
    return bool(processes)


def describe(process: Process) -> str:
    """What the kernel tells of it, as far as we may know."""
    lines = [f"pid {process.pid}, parent {process.parent}, state {process.state}"]
    for name in ("cmdline", "wchan", "stack"):
        with contextlib.suppress(OSError):
            data = Path("/proc", str(process.pid), name).read_bytes().replace(b"\0", b" ")
            if text := data.decode(errors="backslashreplace").strip():
                lines.append(f"{name}: {text}" if name != "stack" else f"in the kernel:\n{text}")
    return "\n".join(lines) + "\n"


def _ask(process: Process, answers: Path, deadline: float) -> str:
    """Its answer; "" if none came. Forked children answer into their parent's file, so only
    one process at a time is asked, and what was added since is its answer."""
    before = _sizes(answers)
    send(process, STACKS_SIGNAL or 0)
    seen, since = before, time.monotonic()
    while (now := time.monotonic()) < deadline:
        sizes = _sizes(answers)
        if sizes != seen:
            seen, since = sizes, now
        elif seen != before and now - since >= _SETTLED_S:
            break
        time.sleep(_POLL_S)
    parts: list[str] = []
    for path, size in seen.items():
        with path.open("rb") as file:
            file.seek(before.get(path, 0))
            parts.append(file.read(size - before.get(path, 0)).decode(errors="backslashreplace"))
    return "".join(parts)


def _sizes(folder: Path) -> dict[Path, int]:
    return {path: os.stat(path).st_size for path in folder.glob("*.stacks")}
