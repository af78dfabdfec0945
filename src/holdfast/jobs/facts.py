"""What was seen of the place: plain values, so that a test can write any place down."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Process:
    """This process, or one that it descends from, as `/proc` shows it."""

    pid: int
    argv: tuple[str, ...]
    """Empty where it cannot be read."""
    name: str
    """As the kernel has it: at most 15 characters."""
    ignored: frozenset[str] = frozenset()
    """Names of signals ("SIGTERM"), and so are these:"""
    blocked: frozenset[str] = frozenset()
    caught: frozenset[str] = frozenset()
    terminal: bool = False
    """Whether it belongs to a terminal."""
    script: str = ""
    """What a shell executes: the file that it was given, or the text after `-c`."""


@dataclass(frozen=True)
class Slurm:
    """The job that this process belongs to."""

    job: str
    step: bool
    """Whether `srun` started this process: else it belongs to the batch script."""
    left_s: float | None = None
    """Until the time limit."""
    kill_wait_s: float | None = None
    """Between SIGTERM and SIGKILL at the time limit; None where Slurm did not say."""


@dataclass(frozen=True)
class Unit:
    """The systemd service that this process belongs to."""

    name: str
    stop_s: float | None = None
    """Between SIGTERM and SIGKILL (`TimeoutStopSec=`); None where systemd did not say."""
    kill_mode: str = ""
    """`KillMode=`: "control-group" means that every process of the service gets SIGTERM."""


@dataclass(frozen=True)
class Source:
    """Who can say that this machine is about to be taken away, besides signals."""

    name: str
    """"aws", "gcp", "azure" or "file"."""
    why: str
    """What says that it is here."""
    error: str = ""
    """Why it does not answer; "" = it does."""


@dataclass(frozen=True)
class Saves:
    """What the saves of a run have cost."""

    p95_s: float | None
    """In what time 95 % of the newest are durable."""


@dataclass(frozen=True)
class Space:
    """Of a run in a local folder."""

    free_bytes: int
    free_files: int | None
    """Inodes; None where the file system has no limit of them."""
    stored_bytes: int
    """Of the run's packs, each counted once."""
    state_bytes: int
    """Of the newest checkpoint's state."""
    keep: str
    """The retention rule; "" = everything stays."""
    protected: int = 0
    """Checkpoints that are tagged or pinned."""


@dataclass(frozen=True)
class Facts:
    """Everything that `findings` decides from."""

    ancestors: tuple[Process, ...]
    """This process first, then its parent, and so on up to the first that is visible."""
    container: str = ""
    """What says that this is a container: a file, or "Kubernetes"; "" = nothing does."""
    kubernetes: bool = False
    slurm: Slurm | None = None
    unit: Unit | None = None
    sources: tuple[Source, ...] = ()
    left_out: str = ""
    """HOLDFAST_NOTICES, by which sources may be left out."""
    grace_s: float | None = None
    """What HOLDFAST_GRACE tells the run; None if nothing."""
    saves: Saves | None = None
    """None: no run was named."""
    space: Space | None = None
    """None: no run was named, or it is in no local folder."""
