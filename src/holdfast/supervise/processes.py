"""The processes of a command: started, found whatever they did to hide, signalled and reaped.

On Linux the supervisor is a "child subreaper": a process whose parent has died becomes its
child, also after a double fork and in a session of its own, as `torchrun` gives its workers. So
all that descends from the supervisor is the command's. As PID 1 of a container it is that anyway.
Elsewhere only the process group is known.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.02
_UNKILLABLE_S = 10.0  # a process in an uninterruptible wait, of a dead file server say
_SHIM = Path(__file__).with_name("shim.py")


@dataclass(frozen=True)
class Process:
    """One line of the kernel's table."""

    pid: int
    parent: int
    state: str
    """As `ps` has it: R, S, D, T, Z, …"""
    started: str


class Command:
    """One start of the command, and everything that comes of it."""

    def __init__(
        self,
        words: Sequence[str],
        environment: Mapping[str, str],
        *,
        foreground: bool,
        strangers: Collection[Process] = (),
    ) -> None:
        """`foreground`: it shares our process group, which the terminal belongs to.
        `strangers`: children of ours that are none of its (a shell that became us by `exec` may
        have had some)."""
        self._own_group = not foreground
        self._strangers = {(process.pid, process.started) for process in strangers}
        self._popen = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_SHIM), str(os.getpid()), *words],
            env=dict(environment),
            start_new_session=self._own_group,
        )
        self.pid = self._popen.pid
        self._killed = False
        self.status: int | None = None
        """As a shell has it, once it has ended: 128 + the signal's number."""

    def reap(self) -> int:
        """Take notice of every child that has ended; how many they were."""
        count = 0
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return count
            if pid == 0:
                return count
            count += 1
            if pid == self.pid:
                code = os.waitstatus_to_exitcode(status)
                self._popen.returncode = code
                self.status = 128 - code if code < 0 else code

    def send(self, number: int) -> None:
        """To the command itself. Its own processes are its business, and would get some
        signals twice."""
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def processes(self) -> list[Process]:
        """All that are alive, parents first."""
        return descendants(self._strangers)

    def kill(self) -> None:
        """SIGKILL to every process that there is now."""
        self._killed = True
        self._group(signal.SIGKILL)
        for process in self.processes():
            send(process, signal.SIGKILL)

    def clear(self, grace_s: float, heed: Callable[[], None] = lambda: None) -> list[Process]:
        """After the command has ended: end what it left behind. SIGTERM first, since behind a
        shell that died of a signal there may be a training program that still wants to save.
        Calls `heed` now and then; once it has called `kill`, nothing is waited for any more.
        Returns what could not be killed."""
        now = time.monotonic()
        kill_at, give_up_at = now + grace_s, now + grace_s + _UNKILLABLE_S
        told = set[tuple[int, str]]()
        while True:
            self.reap()
            left = self.processes()
            if not left and not self._group(0):
                return []
            now = time.monotonic()
            if now >= give_up_at:
                return left
            if now >= kill_at or self._killed:
                self.kill()
            for process in left:
                if (process.pid, process.started) not in told:
                    told.add((process.pid, process.started))
                    send(process, signal.SIGTERM)
                    send(process, signal.SIGCONT)  # a stopped one would never see it
            if not left and not told:  # no /proc: the group is all that is known
                told.add((0, ""))
                self._group(signal.SIGTERM)
            time.sleep(_POLL_S)
            heed()

    def _group(self, number: int) -> bool:
        """Signal the process group, where it is the command's; whether it is there."""
        if not self._own_group:
            return False
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            return False
        except PermissionError:  # how macOS says that only zombies are left
            return False
        return True


def become_subreaper() -> None:
    """Orphans of our descendants become our children."""
    if sys.platform != "linux":
        return
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(strangers: Collection[tuple[int, str]] = ()) -> list[Process]:
    """Every living process below this one, parents first; but not `strangers` and what is below
    them. Zombies are left out: they hold nothing, and wait for their parent only. Empty where
    there is no /proc."""
    children: dict[int, list[Process]] = {}
    for process in _table():
        children.setdefault(process.parent, []).append(process)
    found: list[Process] = []
    waiting = [os.getpid()]
    while waiting:
        below = children.get(waiting.pop(0), [])
        below = [process for process in below if (process.pid, process.started) not in strangers]
        found += below
        waiting += [process.pid for process in below]
    return [process for process in found if process.state not in "ZX"]


def send(process: Process, number: int) -> None:
    """Signal this very process: not another one that was given its pid since."""
    with contextlib.suppress(OSError):
        handle = _handle(process.pid)
        try:
            now = look(process.pid)
            if now is None or now.started != process.started:
                return
            if handle is None:
                os.kill(process.pid, number)
            else:
                signal.pidfd_send_signal(handle, number)
        finally:
            if handle is not None:
                os.close(handle)


def _handle(pid: int) -> int | None:
    """What means this process even if another one gets its pid; None where the kernel, or a
    sandbox that plays one, has no such thing."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise
    except (OSError, AttributeError):
        return None


def catches(pid: int, number: int) -> bool:
    """Whether the process has a handler for the signal."""
    try:
        text = (_PROC / str(pid) / "status").read_text()
    except OSError:
        return False
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == "SigCgt":
            return bool(int(value, 16) >> (number - 1) & 1)
    return False


def look(pid: int) -> Process | None:
    """What the kernel says of it; None if it is not there."""
    try:
        text = (_PROC / str(pid) / "stat").read_bytes()
    except OSError:
        return None
    # The second field is the program's name in parentheses, and may hold anything.
    fields = text[text.rfind(b")") + 1 :].split()
    if len(fields) < 20:
        return None
    return Process(pid, int(fields[1]), fields[0].decode(), fields[19].decode())


def _table() -> list[Process]:
    try:
        names = os.listdir(_PROC)
    except OSError:
        return []
    return [found for name in names if name.isdigit() and (found := look(int(name)))]
