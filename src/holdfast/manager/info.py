"""What the manager tells its callers: plain frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from holdfast.core.address import short_ids
from holdfast.core.process import is_alive
from holdfast.core.records import Entry, Record
from holdfast.core.retention import Best, parse_keep, ranking
from holdfast.errors import BadPolicy
from holdfast.repo.head import packs_of


@dataclass(frozen=True)
class CheckpointInfo:
    """A committed checkpoint.

    `nbytes` are the bytes of its state, `new_bytes` what was written for it; the
    rest is shared with other checkpoints. `time_s` is Unix time.
    """

    address: str
    id: str
    step: int
    ordinal: int
    time_s: float
    nbytes: int
    new_bytes: int
    metrics: Mapping[str, float]
    tags: tuple[str, ...]
    pinned: bool
    note: str
    pickled: bool

    @property
    def ref(self) -> str:
        """The reference that names it: `runs/x@41200`."""
        return f"{self.address}@{self.step}"


Action = Literal["copy", "repair", "update", "keep", "remove"]


@dataclass(frozen=True)
class Transfer:
    """What becomes of one checkpoint in a copy of a run."""

    info: CheckpointInfo
    action: Action
    """"repair": it is listed there, but objects of it are missing; "update": metrics, tags,
    the note or pins differ."""
    why: tuple[str, ...]
    nbytes: int
    """Of the packs that are copied; of a removal those that only it needs there."""
    error: str = ""
    """Why it was not done."""
    damaged: bool = False
    """It was not done because the source is damaged."""


def info_of(address: str, record: Record) -> CheckpointInfo:
    """The public value of a log record."""
    odd = {name: float(value) for name, value in record.odd_metrics.items()}
    return CheckpointInfo(
        address=address,
        id=record.id,
        step=record.step,
        ordinal=record.ordinal,
        time_s=record.time_s,
        nbytes=record.nbytes,
        new_bytes=record.new_bytes,
        metrics={**record.metrics, **odd},
        tags=record.tags,
        pinned=bool(record.pins),
        note=record.note,
        pickled=record.pickled,
    )


@dataclass(frozen=True)
class RunStatus:
    """What the newest log entry says about the run as a whole."""

    finished: bool
    stored_bytes: int
    """Bytes of the run's own packs: data that several checkpoints share counts once."""
    best: Mapping[str, str]
    """The best checkpoint by each `best=` rule that the run recorded: metric -> id."""
    writer: str
    """The process that opened the run for writing and did not close it; "" = none."""
    writer_alive: bool | None
    """Whether it still runs; None if there is none, or it cannot be known from here."""
    keep: str = ""
    """The retention rule that the newest save was made under."""


def status_of(entry: Entry | None, records: tuple[Record, ...]) -> RunStatus:
    """What the newest entry, which lists `records`, says of the run."""
    best = {
        rule.metric: ranking(records, rule.metric, rule.mode)[:1] for rule in recorded_rules(entry)
    }
    holder = entry.holder if entry else None
    return RunStatus(
        finished=entry is not None and entry.finished,
        stored_bytes=sum(packs_of(records).values()),
        best={metric: first.id for metric, found in best.items() for first in found},
        writer=f"process {holder.pid} on {holder.host}" if holder else "",
        writer_alive=is_alive(holder) if holder else None,
        keep=entry.keep if entry else "",
    )


def recorded_rules(entry: Entry | None) -> tuple[Best, ...]:
    """The `best` rules that the run's writer last saved under."""
    try:
        return parse_keep(entry.keep).best if entry else ()
    except BadPolicy:  # a store can say anything, and a newer Holdfast may have more rules
        return ()


@dataclass(frozen=True)
class Overview:
    """A run as `holdfast ls` shows it: one look at its list."""

    status: RunStatus
    count: int
    """Live checkpoints."""
    shown: tuple[CheckpointInfo, ...]
    """Newest first: all, or the newest and those that are marked."""
    short_ids: Mapping[str, str]
    """Of those shown: the start of the id that names it in a reference."""
    all_ids: frozenset[str] = frozenset()
    nbytes: int = 0
    """Of the states of all live checkpoints."""
    committed: int = 0
    """How many were ever committed; those that are not live were removed."""


def overview_of(
    address: str, entry: Entry | None, records: tuple[Record, ...], newest: int | None = None
) -> Overview:
    """Of the run at `address` by its newest log entry, which lists `records`."""
    status, shown = status_of(entry, records), records[::-1]
    if newest is not None and len(shown) > newest:
        best = set(status.best.values())
        marked = [r for r in shown[newest:] if r.tags or r.pins or r.id in best]
        shown = (*shown[:newest], *marked[:newest])
    return Overview(
        status=status,
        count=len(records),
        shown=tuple(info_of(address, r) for r in shown),
        short_ids=short_ids([r.id for r in shown], [r.id for r in records]),
        all_ids=frozenset(r.id for r in records),
        nbytes=sum(r.nbytes for r in records),
        committed=entry.ordinal if entry else 0,
    )


@dataclass(frozen=True)
class Restored:
    """What a restore found. `values` holds the restored state by name."""

    info: CheckpointInfo
    loop: Any
    """The loop position that was given to `save(loop=…)`."""
    config: Any
    environment: Mapping[str, Any]
    values: Mapping[str, Any] = field(default_factory=dict[str, Any])
    skipped: tuple[str, ...] = ()
    """Newer checkpoints that were damaged, as lines for people."""
    world_size: int = 1
    """How many ranks have saved it."""


@dataclass(frozen=True)
class Verification:
    """The outcome of reading every byte of one checkpoint."""

    info: CheckpointInfo
    ok: bool
    problems: tuple[str, ...]
    bytes_read: int
    repaired: tuple[str, ...] = ()
    """Keys of objects that were damaged or missing, and were replaced."""
    unrepaired: tuple[str, ...] = ()
    """Why others could not be replaced, as lines for people."""
