"""Runs that this process has open for saves by DCP.

A program makes a `StorageWriter` for each save. What lasts from one to the next is here, one for
each address: the blocks that bytes pass through, what is known of chunks, and on the coordinator
the run's writer, which holds the run until the process ends or `StorageWriter.close` is called.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from holdfast.core.records import Manifest, Record
from holdfast.core.retention import parse_keep
from holdfast.core.retiring import Retiring
from holdfast.errors import BaseLost, CommitUnknown, Fenced, HoldfastError
from holdfast.manager import heartbeat
from holdfast.manager.history import History, SaveEvent
from holdfast.manager.snapshot import SnapshotMemories
from holdfast.manager.staging import Staging
from holdfast.manager.stored import Digests
from holdfast.repo.repo import Repo
from holdfast.repo.saves import Save
from holdfast.repo.writer import Writer
from holdfast.run.environment import collect
from holdfast.stores.addresses import real_address
from holdfast.stores.open import open_store

logger = logging.getLogger("holdfast")


@dataclass(frozen=True)
class Terms:
    """What a checkpoint is committed with."""

    keep: str
    metrics: Mapping[str, float]
    odd_metrics: Mapping[str, str]
    tags: tuple[str, ...]
    note: str
    finished: bool


class OpenRun:
    """One run of this process. From any thread."""

    def __init__(self, address: str, clock: Callable[[], float]) -> None:
        self.address = address
        self.repo = Repo(open_store(address), clock=clock)
        self.memories = SnapshotMemories()
        self.digests = Digests()
        self.distrusted: set[str] = set()
        """Packs in which damage was found: never a source for reuse."""
        self.packing = threading.Lock()
        """Held by the save that uses the staging blocks."""
        self._staging: tuple[int, Staging] | None = None
        self._writable = False
        self._lock = threading.RLock()
        self._writer: Writer | None = None
        self._history = History(self.repo.store)
        self._retiring: dict[str, Retiring] = {}
        self._base: tuple[str, Manifest] | None = None
        self._lost_base = False
        """What the last save built on was removed meanwhile: the next one is full."""
        self._begun: dict[str, tuple[Save, weakref.ref[object]]] = {}
        """By nonce: saves that have not ended, and whose they are."""
        self._leftovers = False
        """A save that has failed left packs."""

    def staging(self, nbytes: int) -> Staging:
        """The blocks of this run; for the thread that holds `packing`."""
        if self._staging is None or self._staging[0] != nbytes:
            self._staging = nbytes, Staging(nbytes)
        return self._staging[1]

    def prepare(self) -> None:
        """This process is going to write packs. Raises StoreUnfit, StoreReadOnly."""
        with self._lock:
            if not self._writable:
                self.repo.store.prepare_writing()
                self._writable = True

    def writer(self, *, take_over: bool) -> Writer:
        """The run's writer: this process, from now on. Removes what dead ones left. Raises
        RunHeld, StoreUnfit, StoreReadOnly."""
        with self._lock:
            if self._writer is not None:
                return self._writer
            writer = Writer.open(self.repo, take_over=take_over)
            if not writer.is_new:
                _collect(writer)
            self._history.begin(writer.epoch)
            self._writer, self._writable = writer, True
            return writer

    def begin(self, owner: object, *, take_over: bool) -> Save:
        """A save of `owner`, which has to `end` it. Raises Fenced, before the ranks have written
        anything.

        One that was begun and not ended came to nothing: a rank failed, or the caller has given
        up. What the others have written for it goes now.
        """
        with self._lock:
            writer = self.writer(take_over=take_over)
            writer.refresh()
            dead = [n for n, (_, ref) in self._begun.items() if ref() is None or ref() is owner]
            for nonce in dead:
                writer.abandon(self._begun.pop(nonce)[0])
            if dead or self._leftovers:
                self._leftovers = False
                _collect(writer)
            save = writer.begin()
            self._begun[save.nonce] = save, weakref.ref(owner)
            return save

    def failed(self, save: Save, error: BaseException, event: SaveEvent) -> None:
        """It was not committed, because of `error`, or nobody knows."""
        with self._lock:
            self._begun.pop(save.nonce, None)
            if self._writer is not None and not isinstance(error, CommitUnknown | Fenced):
                self._writer.abandon(save)
                self._leftovers = True
        self._history.add(event)

    def base(self) -> Record | None:
        """The checkpoint whose chunks the next save may refer to."""
        with self._lock:
            if self._writer is None or self._lost_base:
                return None
            return self._writer.newest()

    def manifest(self, record: Record) -> Manifest:
        """Of a checkpoint. Raises DamagedObject, CheckpointRemoved."""
        with self._lock:
            if self._base is None or self._base[0] != record.id:
                self._base = record.id, self.repo.manifest(record)
            return self._base[1]

    def commit(
        self, save: Save, manifest: Manifest, terms: Terms, event: Callable[..., SaveEvent]
    ) -> Record:
        """Make the checkpoint visible. Raises as `Writer.commit`."""
        with self._lock:
            writer = self._writer
            assert writer is not None
            retiring = self._retiring.setdefault(terms.keep, Retiring(parse_keep(terms.keep)))
            start = time.perf_counter()
            try:
                record = writer.commit(
                    save,
                    manifest,
                    metrics=terms.metrics,
                    odd_metrics=terms.odd_metrics,
                    tags=terms.tags,
                    note=terms.note,
                    finished=terms.finished,
                    keep=terms.keep,
                    retire=retiring.ids,
                )
            except BaseLost:
                self._lost_base = True
                raise
            self._lost_base = False
            self._base = record.id, manifest
            self._begun.pop(save.nonce, None)
        heartbeat.checkpoint(self.address, record.step, record.id)
        self._history.add(event(record, time.perf_counter() - start))
        writer.delete_retired()
        return record

    def close(self) -> None:
        """Give the run up."""
        with self._lock:
            if self._writer is not None:
                heartbeat.ended(self.address)
                self._writer.close()
            self.repo.close()


def _collect(writer: Writer) -> None:
    try:
        if orphans := writer.collect():
            logger.info("removed %d leftover object(s) of unfinished saves", len(orphans))
    except HoldfastError as error:
        logger.warning("could not remove leftovers: %s", error.message)


_open: dict[tuple[int, str], OpenRun] = {}
_opening = threading.Lock()


def open_run(address: str, clock: Callable[[], float] = time.time) -> OpenRun:
    """The run at `address`, as this process has it open. Raises what stores raise."""
    key = os.getpid(), real_address(address)
    with _opening:
        run = _open.get(key)
        if run is None:
            run = _open[key] = OpenRun(address, clock)
        return run


def close_run(address: str) -> None:
    """Give up the run at `address`, if this process has it open."""
    with _opening:
        run = _open.pop((os.getpid(), real_address(address)), None)
    if run is not None:
        run.close()


@atexit.register
def _close_all() -> None:
    for pid, address in list(_open):
        if pid == os.getpid():
            close_run(address)


@cache
def facts() -> dict[str, Any]:
    """What a checkpoint records about where it was made; looked up once, since it asks git."""
    return collect()
