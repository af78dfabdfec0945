"""What a run's saves and restores cost: measured as they happen, kept for people.

One line of JSON per event in `events/<epoch>.jsonl`, appended by the process that writes the
run. Nothing depends on it: a line that cannot be written is not, and a torn one is passed
over.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import msgspec

from holdfast.core.types import MiB
from holdfast.errors import DamagedObject, HoldfastError, ObjectNotFound
from holdfast.repo import keys
from holdfast.stores.base import Store

logger = logging.getLogger("holdfast")

_MAX_BYTES = 256 * MiB  # of one process's events: a save per second for a week


class SaveEvent(msgspec.Struct, frozen=True, kw_only=True, tag="save", tag_field="event"):
    """One save. Seconds are wall-clock time of what was done, not of what was waited for;
    reading, digests and writing overlap, so they may add up to more than `total_s`."""

    time_s: float
    """When the state was captured, Unix time."""
    step: int
    id: str = ""
    """Of the checkpoint; "" if the save failed."""
    error: str = ""
    """Why it failed."""
    note: str = ""
    """What caused it."""
    waited_s: float = 0.0
    """The caller waited for the save before this one."""
    capture_s: float = 0.0
    """The caller waited for names, small values and copies."""
    barrier_s: float = 0.0
    """The training waited in front of an optimizer's step, for what was not read yet."""
    read_s: float = 0.0
    """Bytes were brought into staging blocks."""
    digest_s: float = 0.0
    write_s: float = 0.0
    """Blocks were written and synced; of all threads together."""
    commit_s: float = 0.0
    """Manifest and log entry."""
    total_s: float = 0.0
    """From the call to the durable checkpoint."""
    nbytes: int = 0
    """Of the state."""
    copied_nbytes: int = 0
    """Copied before the call returned, or at a barrier; the rest was read in place."""
    written_nbytes: int = 0
    """Of packs that were written for it."""
    memory_nbytes: int = 0
    """That saves hold besides the state: copies and staging blocks."""

    @property
    def stall_s(self) -> float:
        """For how long the training stood still."""
        return self.waited_s + self.capture_s + self.barrier_s


class RestoreEvent(msgspec.Struct, frozen=True, kw_only=True, tag="restore", tag_field="event"):
    """One restore."""

    time_s: float
    step: int
    id: str
    total_s: float
    nbytes: int
    """That were read and verified."""


Event = SaveEvent | RestoreEvent


class History:
    """The events of one run. From any thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()

    def add(self, epoch: int, event: Event) -> None:
        """Append an event of the writer of this epoch. Never raises for a store that does
        not take it."""
        line = msgspec.json.encode(event) + b"\n"
        try:
            with self._lock:
                self._store.append(keys.events_key(epoch), line)
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
                yield msgspec.json.decode(line, type=Event)
            except (msgspec.MsgspecError, ValueError):
                continue
