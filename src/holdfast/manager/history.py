"""What happened to a run: measured as it happens, kept for people.

One line of JSON per event in `events/<epoch>.jsonl`, appended by the process that writes the
run, and, once that one is dead, by what watched over it (`append_outside`): who only reads
leaves no trace in a run. Nothing depends on it: a line that cannot be written is not, and a
torn one is passed over. What the events come to is in `goodput`.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from holdfast.core.types import MiB
from holdfast.errors import DamagedObject, HoldfastError, ObjectNotFound
from holdfast.repo import keys
from holdfast.stores.base import Store

logger = logging.getLogger("holdfast")

_MAX_BYTES = 256 * MiB  # of one process's events: a save per second for a week
_MAX_EARLY = 100  # an evaluator restores again and again, and never writes


# What a line may say, so that sums and averages of many are finite numbers, too.
_Seconds = Annotated[float, Meta(ge=0, le=1e12)]
_Number = Annotated[int, Meta(ge=0, le=2**63 - 1)]
_Time = Annotated[float, Meta(ge=-1e12, le=1e12)]


class SaveEvent(msgspec.Struct, frozen=True, kw_only=True, tag="save", tag_field="event"):
    """One save. Seconds are wall-clock time of what was done, not of what was waited for;
    reading, digests and writing overlap, so they may add up to more than `total_s`."""

    time_s: float
    """When the state was captured, Unix time."""
    step: _Number
    id: str = ""
    """Of the checkpoint; "" if the save failed."""
    error: str = ""
    """Why it failed."""
    note: str = ""
    """What caused it."""
    blocked: bool = False
    """The caller of `save` waited until it was durable."""
    waited_s: _Seconds = 0.0
    """The caller waited for the save before this one."""
    capture_s: _Seconds = 0.0
    """The caller waited for names, small values and copies."""
    barrier_s: _Seconds = 0.0
    """The training waited in front of an optimizer's step, for what was not read yet."""
    result_s: _Seconds = 0.0
    """The thread that asked for the save waited for its end: with `block`, in `result`, `wait`
    or `close`. (In the next `save`: that one's `waited_s`.) Other threads do not count."""
    read_s: _Seconds = 0.0
    """Bytes were brought into staging blocks."""
    digest_s: _Seconds = 0.0
    compress_s: _Seconds = 0.0
    write_s: _Seconds = 0.0
    """Blocks were written and synced; of all threads together."""
    commit_s: _Seconds = 0.0
    """Manifest and log entry."""
    total_s: _Seconds = 0.0
    """From the call to the durable checkpoint."""
    nbytes: _Number = 0
    """Of the state."""
    copied_nbytes: _Number = 0
    """Copied before the call returned, or at a barrier; the rest was read in place."""
    new_nbytes: _Number = 0
    """Of the chunks that were written for it, before they were compressed."""
    written_nbytes: _Number = 0
    """Of packs that were written for it."""
    memory_nbytes: _Number = 0
    """That saves hold besides the state: copies and staging blocks."""
    epoch: _Number = 0
    """Of the writer whose history it is in; a reader takes it from there."""

    @property
    def stall_s(self) -> float:
        """For how long the training stood still: nothing of it counts for two saves."""
        return self.waited_s + self.capture_s + self.barrier_s + self.result_s


class RestoreEvent(msgspec.Struct, frozen=True, kw_only=True, tag="restore", tag_field="event"):
    """One restore."""

    time_s: float
    step: _Number
    id: str
    total_s: _Seconds
    nbytes: _Number
    """That were read and verified."""
    epoch: _Number = 0
    """Of the writer whose history it is in; a reader takes it from there."""


class StartEvent(msgspec.Struct, frozen=True, kw_only=True, tag="start", tag_field="event"):
    """A process has begun, or gone on, with the loop."""

    time_s: _Time
    """When the loop took its first item that was not trained on before, Unix time."""
    step: _Number
    """Completed steps that it goes on from."""
    began_s: _Time
    """When the process began; for a later `Run` of the same process, when that was made."""
    id: str = ""
    """Of the checkpoint that it goes on from."""
    host: str = ""
    pid: _Number = 0
    boot: str = ""
    """Of the machine: another one after it was booted."""
    beat_s: _Seconds = 0.0
    """How far apart its beats are at most; 0: it sends none."""
    epoch: _Number = 0
    """Of the writer whose history it is in; a reader takes it from there."""


class BeatEvent(msgspec.Struct, frozen=True, kw_only=True, tag="beat", tag_field="event"):
    """The loop was alive."""

    time_s: _Time
    step: _Number
    """Completed ones."""
    epoch: _Number = 0
    """Of the writer whose history it is in; a reader takes it from there."""


class FallbackEvent(msgspec.Struct, frozen=True, kw_only=True, tag="fallback", tag_field="event"):
    """A restore found newer checkpoints damaged, and took an older one."""

    time_s: _Time
    step: _Number
    """Of the checkpoint that was taken."""
    id: str
    skipped: _Number
    """Newer ones that were damaged."""
    epoch: _Number = 0
    """Of the writer whose history it is in; a reader takes it from there."""


class NoticeEvent(msgspec.Struct, frozen=True, kw_only=True, tag="notice", tag_field="event"):
    """The process was told that it will be stopped, or that it may be."""

    time_s: _Time
    source: str
    """"SIGTERM", "aws", "gcp", …"""
    text: str = ""
    deadline_s: _Time = 0.0
    """Unix time; 0 if none was named."""
    epoch: _Number = 0
    """Of the writer whose history it is in; a reader takes it from there."""


class EndEvent(msgspec.Struct, frozen=True, kw_only=True, tag="end", tag_field="event"):
    """A process is done with the run, as it says itself or as what watched over it saw.

    `why`: "finished"; "preempted" (it was told to stop, and did); "interrupted" (Ctrl-C);
    "error" (an exception); "closed" (given up without `finish`); "killed" (by a signal),
    "exited" (with a status that says no more), "hang" and "timeout" (killed for it) are what a
    supervisor says. A reader takes a reason that it does not know for an unplanned end.
    """

    time_s: _Time
    why: str
    step: _Number = 0
    """Completed steps; 0 if that is not known."""
    exit_code: int | None = None
    signal: _Number = 0
    """That killed it; 0 if none did."""
    pid: _Number = 0
    text: str = ""
    epoch: _Number = 0
    """Of the writer whose history it is in; a reader takes it from there."""


Event = SaveEvent | RestoreEvent | StartEvent | BeatEvent | FallbackEvent | NoticeEvent | EndEvent
_AnyEvent = TypeVar("_AnyEvent", bound=Event)
_DECODER = msgspec.json.Decoder(Event)


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What many events come to. What has no value, since nothing was saved, is None."""

    saves: int
    """Failed ones, too."""
    failed: int
    median_stall_s: float | None
    largest_stall_s: float | None
    median_total_s: float | None
    """Of the saves that were committed, as are these:"""
    nbytes: int
    new_nbytes: int
    written_nbytes: int
    compress_s: float
    write_s: float
    """Of all threads together."""
    restores: int
    restored_nbytes: int
    restore_s: float


def summarize(events: Sequence[Event]) -> Summary:
    """The whole of `events`, in any order."""
    from statistics import median  # not at the start of the program, which it would slow down

    saves = [event for event in events if isinstance(event, SaveEvent)]
    committed = [save for save in saves if not save.error]
    restores = [event for event in events if isinstance(event, RestoreEvent)]
    stalls = [save.stall_s for save in saves]
    return Summary(
        saves=len(saves),
        failed=len(saves) - len(committed),
        median_stall_s=median(stalls) if stalls else None,
        largest_stall_s=max(stalls, default=None),
        median_total_s=median(save.total_s for save in committed) if committed else None,
        nbytes=sum(save.nbytes for save in committed),
        new_nbytes=sum(save.new_nbytes for save in committed),
        written_nbytes=sum(save.written_nbytes for save in committed),
        compress_s=sum(save.compress_s for save in committed),
        write_s=sum(save.write_s for save in committed),
        restores=len(restores),
        restored_nbytes=sum(restore.nbytes for restore in restores),
        restore_s=sum(restore.total_s for restore in restores),
    )


class History:
    """The events of one run. From any thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._epoch: int | None = None
        """Of this process, once it is the run's writer."""
        self._early: deque[Event] = deque(maxlen=_MAX_EARLY)

    def move(self, store: Store) -> None:
        """The run is in this store; before `begin`."""
        self._store = store

    def begin(self, epoch: int) -> None:
        """This process is the run's writer from now on: append what was added before."""
        with self._lock:
            self._epoch = epoch
            early = list(self._early)
            self._early.clear()
            if early:
                self._append(epoch, early)

    def add(self, event: Event) -> None:
        """Append an event; before `begin` it is kept in memory, and lost if that never comes.
        Never raises for a store that does not take it."""
        with self._lock:
            if self._epoch is None:
                self._early.append(event)
            else:
                self._append(self._epoch, [event])

    def _append(self, epoch: int, events: Sequence[Event]) -> None:
        try:
            self._store.append(keys.events_key(epoch), _lines(epoch, events))
        except HoldfastError as error:
            logger.debug("an event of %s was not kept: %s", self._store.address, error.message)

    def read(self) -> list[Event]:
        """Every event that is there, in the order of its writers. Lines that are torn, or of
        a later version, are left out."""
        epochs = sorted(
            epoch
            for info in self._store.list(keys.EVENTS)
            if (epoch := keys.events_epoch(info.key)) is not None
        )
        return [event for epoch in epochs for event in self._of(epoch)]

    def _of(self, epoch: int) -> Iterator[Event]:
        try:
            data = self._store.get(keys.events_key(epoch), max_bytes=_MAX_BYTES)
        except (ObjectNotFound, DamagedObject) as error:
            logger.warning("events were left out: %s", error.message)
            return
        for line in data.splitlines():
            try:
                yield _in_epoch(_DECODER.decode(line), epoch)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                continue


def append_outside(address: str | os.PathLike[str], events: Sequence[Event]) -> bool:
    """Add to the history of a run whose writer is dead: for what watched over its process.

    The lines go to the newest writer's. False, and nothing is added, where there is no run, where
    its writer lives or may live on another machine, or where the store does not take them: this
    never raises a HoldfastError.
    """
    from holdfast.core.process import is_alive
    from holdfast.repo.repo import Repo
    from holdfast.stores.open import open_store

    try:
        repo = Repo(open_store(address))
        try:
            head = repo.head()
            if head is None or not head.entry.epoch:
                return False
            holder = head.entry.holder
            if holder is not None and is_alive(holder) is not False:
                return False
            epoch = head.entry.epoch
            repo.store.append(keys.events_key(epoch), b"\n" + _lines(epoch, events))
        finally:
            repo.close()
    except HoldfastError as error:
        logger.debug("events of %s were not kept: %s", address, error.message)
        return False
    return True


def _lines(epoch: int, events: Sequence[Event]) -> bytes:
    return b"".join(msgspec.json.encode(_in_epoch(event, epoch)) + b"\n" for event in events)


def _in_epoch(event: _AnyEvent, epoch: int) -> _AnyEvent:
    return event if event.epoch == epoch else msgspec.structs.replace(event, epoch=epoch)
