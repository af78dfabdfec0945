"""Looks at this process, its parents, its cluster and its disk. Decides nothing."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.errors import UsageError
from holdfast.jobs.facts import Facts, Process, Saves, Slurm, Source, Space, Unit
from holdfast.jobs.shells import script_of
from holdfast.stores.local import LocalStore
from holdfast.stores.open import open_store

if TYPE_CHECKING:
    from holdfast.manager.listing import Listing

_TIMEOUT_S = 3.0
_MAX_SCRIPT_BYTES = 64 * 1024
_MAX_DEPTH = 64  # a chain of parents that is longer was torn while it was read
_CONTAINER_FILES = ("/.dockerenv", "/run/.containerenv")


def gather(
    environment: Mapping[str, str] = os.environ,
    *,
    proc: Path = Path("/proc"),
    dmi: Path = Path("/sys/class/dmi/id"),
) -> Facts:
    """What can be seen from this process. Takes seconds where Slurm, systemd or the cloud does
    not answer. Never raises for what is not there."""
    kubernetes = "KUBERNETES_SERVICE_HOST" in environment
    container = next((name for name in _CONTAINER_FILES if os.path.exists(name)), "")
    return Facts(
        ancestors=_ancestors(proc, os.getpid()),
        container="Kubernetes" if kubernetes else container,
        kubernetes=kubernetes,
        slurm=_slurm(environment),
        unit=_unit(proc),
        sources=_sources(environment, dmi),
        grace_s=_told_s(environment.get("HOLDFAST_GRACE", "")),
        left_out=environment.get("HOLDFAST_NOTICES", ""),
    )


def of_run(run: Listing, keep: str | None = None) -> tuple[Saves, Space | None]:
    """What a run has cost so far, and the room that it has: under the rule that it recorded,
    or under `keep`. Raises NoStore, StoreUnavailable."""
    saves = Saves(save_s(run))
    overview = run.overview(newest=1)
    store = open_store(run.address)
    if not isinstance(store, LocalStore) or not overview.shown:
        return saves, None
    try:
        free_bytes, free_files = free(store.address)
    except OSError:
        return saves, None
    status = overview.status
    protected = sum(1 for one in run.checkpoints() if one.tags or one.pinned)
    return saves, Space(
        free_bytes=free_bytes,
        free_files=free_files,
        stored_bytes=status.stored_bytes,
        state_bytes=overview.shown[0].nbytes,
        keep=status.keep if keep is None else keep,
        protected=protected,
    )


def save_s(run: Listing) -> float | None:
    """In what time 95 % of its newest saves were durable; None if there was none."""
    from holdfast.manager.history import SaveEvent
    from holdfast.run.costs import cost_of
    from holdfast.run.deadline import p95_s

    saves = (event for event in run.events() if isinstance(event, SaveEvent) and not event.error)
    return p95_s([cost_of(save) for save in saves])


def free(folder: str) -> tuple[int, int | None]:
    """(bytes, files) that this user may add there; None files where there is no limit of
    them. Of a quota only if the file system counts it, as those of projects do. Raises OSError."""
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize, disk.f_favail if disk.f_files else None


# -- processes --------------------------------------------------------------------


def _ancestors(proc: Path, pid: int) -> tuple[Process, ...]:
    found: list[Process] = []
    while pid and len(found) < _MAX_DEPTH:
        try:
            status = _fields(_text(proc / f"{pid}/status"))
            found.append(_process(proc, pid, status))
            pid = int(status.get("PPid", "0"))
        except (OSError, ValueError):
            break
    return tuple(found)


def _process(proc: Path, pid: int, status: Mapping[str, str]) -> Process:
    words = _text(proc / f"{pid}/cmdline").split("\0")
    argv = tuple(words[:-1] if words[-1] == "" else words)
    # After the name, which may hold anything: state, parent, group, session, terminal.
    numbers = _text(proc / f"{pid}/stat").rpartition(")")[2].split()
    return Process(
        pid,
        argv,
        status.get("Name", ""),
        ignored=signals_in(status.get("SigIgn", "0")),
        blocked=signals_in(status.get("SigBlk", "0")),
        caught=signals_in(status.get("SigCgt", "0")),
        terminal=len(numbers) > 4 and numbers[4] != "0",
        script=_script(proc, pid, argv),
    )


def _script(proc: Path, pid: int, argv: Sequence[str]) -> str:
    text, path = script_of(argv)
    if not path:
        return text
    try:
        # As that process finds it: in its folder, in its container.
        folder = os.readlink(proc / f"{pid}/cwd")
        return _regular(os.path.join(folder, path))
    except (OSError, ValueError):
        return ""


def _regular(path: str) -> str:
    """The start of a file. A pipe would not answer, and is emptied by who reads it; what
    `/dev/fd` names is another file for each process."""
    if path.startswith(("/dev/", "/proc/")):
        return ""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return ""
        return file.read(_MAX_SCRIPT_BYTES).decode(errors="replace")


def signals_in(mask: str) -> frozenset[str]:
    """The names of the signals whose bits are set.

    >>> sorted(signals_in("0000000000004003"))
    ['SIGHUP', 'SIGINT', 'SIGTERM']
    """
    bits = int(mask, 16)
    return frozenset(one.name for one in signal.Signals if bits >> (one - 1) & 1)


def _fields(text: str) -> dict[str, str]:
    lines = (line.partition(":") for line in text.splitlines())
    return {name: value.strip() for name, _, value in lines}


def _text(path: Path) -> str:
    return path.read_bytes().decode(errors="replace")


# -- clusters ---------------------------------------------------------------------


def _slurm(environment: Mapping[str, str]) -> Slurm | None:
    job = environment.get("SLURM_JOB_ID", "")
    if not job:
        return None
    try:
        left_s = float(environment["SLURM_JOB_END_TIME"]) - time.time()
    except (KeyError, ValueError):
        left_s = None
    said = _output("scontrol", "show", "config")
    wait = re.search(r"^KillWait\s*=\s*(\d+)", said, re.MULTILINE)
    return Slurm(job, "SLURM_STEP_ID" in environment, left_s, float(wait[1]) if wait else None)


def _told_s(text: str) -> float | None:
    from holdfast.notices.grace import grace_s

    try:
        return grace_s(text) if text.strip() else None
    except UsageError:  # a run says it, and does not start
        return None


# One request that each of them answers at once, and that changes nothing.
_QUESTIONS: dict[str, tuple[str, str, dict[str, str]]] = {
    "aws": ("PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}),
    "gcp": ("GET", "/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"}),
    "azure": ("GET", "/metadata/instance?api-version=2021-02-01", {"Metadata": "true"}),
}


def _sources(environment: Mapping[str, str], dmi: Path) -> tuple[Source, ...]:
    from holdfast.notices.detect import detect

    return tuple(
        Source(place.name, place.why, _unanswered(place.name, place.where))
        for place in detect(environment, dmi)
        if place.found and place.name != "slurm"  # its time limit is a fact of its own
    )


def _unanswered(name: str, where: str) -> str:
    """Why the metadata service says nothing; "" if it does. Takes a second at most."""
    from holdfast.notices.metadata import Unanswered, request

    if name not in _QUESTIONS:
        return ""
    method, path, headers = _QUESTIONS[name]
    try:
        answer = request(where, path, headers, method=method)
    except Unanswered as error:
        return str(error)
    return "" if answer.status == 200 else f"{where}: HTTP {answer.status}"


def _unit(proc: Path) -> Unit | None:
    try:
        name = service_in(_text(proc / "self/cgroup"))
    except OSError:
        return None
    if not name:
        return None
    manager = ["--user"] if "/user@" in _text(proc / "self/cgroup") else []
    shown = ("--property=TimeoutStopUSec", "--property=KillMode")
    said = dict(
        line.split("=", 1)
        for line in _output("systemctl", *manager, "show", *shown, "--", name).splitlines()
        if "=" in line
    )
    return Unit(name, span_s(said.get("TimeoutStopUSec", "")), said.get("KillMode", ""))


def service_in(cgroup: str) -> str:
    """The systemd service that `/proc/self/cgroup` names; "" if there is none. That which
    holds the services of a user is none.

    >>> service_in("0::/system.slice/train.service")
    'train.service'
    >>> service_in("0::/user.slice/user-1000.slice/session-2.scope")
    ''
    """
    for line in cgroup.splitlines():
        path = line.rpartition(":")[2].removesuffix("/")
        name = path.rpartition("/")[2]
        if name.endswith(".service") and not name.startswith("user@"):
            return name
    return ""


_SPAN = {"h": 3600.0, "min": 60.0, "s": 1.0, "ms": 0.001, "us": 0.000001}


def span_s(text: str) -> float | None:
    """Seconds in what systemd prints; None if it is no limit, or no number.

    >>> span_s("1min 30s"), span_s("infinity")
    (90.0, None)
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)(h|min|ms|us|s)\b", text)
    return sum(float(number) * _SPAN[unit] for number, unit in parts) if parts else None


def _output(*command: str) -> str:
    """What a program prints; "" where there is none, it fails, or does not answer."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode(errors="replace") if done.returncode == 0 else ""
