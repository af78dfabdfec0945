"""Which process this is, and whether another one is still alive.

A process is (host, boot id, pid namespace, pid, start time): a pid alone is reused
by the kernel, and means nothing on another host or in another container. Linux is
asked through `/proc`, other systems through `ps` and `sysctl`.
"""

from __future__ import annotations

import os
import re
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from holdfast.core.records import Holder

_PROC = Path("/proc")
_PS_TIMEOUT_S = 10
_OLDEST_S = 3e8  # ten years
_DEAD_STATES = frozenset("ZXx")  # zombie, dead; "T" (stopped) can be continued


class _Seen(NamedTuple):
    """What the kernel says about a pid at this moment."""

    state: str
    """One letter, as `ps` shows it: R, S, D, T, Z, …"""
    started: str


def current() -> Holder:
    """The calling process. Right in forked children too; costs a call of `getpid`."""
    return _identify(os.getpid())


def is_alive(holder: Holder) -> bool | None:
    """Whether `holder` still runs; None if that cannot be known from here.

    A stopped process is alive: it can be continued and write. A zombie is dead, and
    so is a process whose pid was given to another one, or whose machine was booted
    since. Unknown are other hosts and other pid namespaces (containers).
    """
    me = current()
    if holder.host != me.host:
        return None
    if holder.boot != me.boot:
        return False
    if holder.namespace != me.namespace:
        return None
    if holder.pid == me.pid:
        return holder.started == me.started
    seen = _look(holder.pid)
    if seen is None:
        return None if pid_exists(holder.pid) else False
    return seen.state not in _DEAD_STATES and seen.started == holder.started


def age_s() -> float | None:
    """For how long the calling process exists; None if the system does not say so."""
    seen = _look(os.getpid()) if _has_proc() else None
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    if seen is None or clock is None or not seen.started.isdigit():
        return None
    age = time.clock_gettime(clock) - int(seen.started) / os.sysconf("SC_CLK_TCK")
    # In a time namespace (a container that was moved) the two count from different boots.
    return age if 0 <= age < _OLDEST_S else None


@lru_cache(maxsize=2)
def _identify(pid: int) -> Holder:
    seen = _look(pid)
    return Holder(
        host=os.uname().nodename,
        boot=_boot(),
        namespace=_namespace(),
        pid=pid,
        started=seen.started if seen else "",
    )


def pid_exists(pid: int) -> bool:
    """Whether some process of this PID namespace has `pid`, visible to us or not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _look(pid: int) -> _Seen | None:
    return _look_proc(pid) if _has_proc() else _look_ps(pid)


# -- Linux ----------------------------------------------------------------------


def _has_proc() -> bool:
    """Whether /proc is there and counts pids as this process does."""
    try:
        return os.readlink(_PROC / "self") == str(os.getpid())
    except OSError:
        return False


def _look_proc(pid: int) -> _Seen | None:
    seen = _read_stat(_PROC / str(pid) / "stat")
    if seen is None or seen.state not in _DEAD_STATES:
        return seen
    # A group leader that is gone is a zombie while its other threads go on, and those
    # can still be in a write.
    try:
        threads = list((_PROC / str(pid) / "task").iterdir())
    except OSError:
        return seen
    states = [found.state for task in threads if (found := _read_stat(task / "stat"))]
    running = [state for state in states if state not in _DEAD_STATES]
    return seen._replace(state=running[0]) if running else seen


def _read_stat(path: Path) -> _Seen | None:
    try:
        text = path.read_bytes()
    except OSError:
        return None
    # The second field is the program's name in parentheses, and may hold anything.
    fields = text[text.rfind(b")") + 1 :].split()
    if len(fields) < 20:
        return None
    return _Seen(state=fields[0].decode(), started=fields[19].decode())


def _boot() -> str:
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return _run("sysctl", "-n", "kern.bootsessionuuid") or _run("sysctl", "-n", "kern.boottime")


def _namespace() -> str:
    if sys.platform != "linux":
        return ""
    try:
        link = os.readlink(_PROC / "self/ns/pid")  # pid:[4026531836]
    except OSError:
        return ""
    return re.sub(r"\D", "", link)


# -- other systems ----------------------------------------------------------------


def _look_ps(pid: int) -> _Seen | None:
    return _parse_ps(_run("ps", "-o", "stat=", "-o", "lstart=", "-p", str(pid)))


def _parse_ps(line: str) -> _Seen | None:
    """
    >>> _parse_ps("Ss   Fri Nov 21 06:30:07 2026")
    _Seen(state='S', started='Fri_Nov_21_06:30:07_2026')
    """
    state, *started = line.split() or [""]
    return _Seen(state=state[0], started="_".join(started)) if started else None


def _run(*command: str) -> str:
    import subprocess  # here: Linux never needs it, and it takes milliseconds

    # C and UTC: a start time must read the same whatever the user's settings are.
    environment = {**os.environ, "LC_ALL": "C", "TZ": "UTC"}
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_PS_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
