"""The background thread that turns snapshots into committed checkpoints."""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from holdfast.core.records import Manifest, Record
from holdfast.core.retention import KeepPolicy, decide
from holdfast.errors import BaseLost, CommitUnknown, Fenced, HoldfastError, SaveFailed
from holdfast.manager.packer import Packer, Stored
from holdfast.manager.pending import Pending
from holdfast.manager.snapshot import Snapshot, SnapshotMemory
from holdfast.repo.writer import Writer

logger = logging.getLogger("holdfast")

# The background thread yields to the training loop's threads (Linux: per thread).
_NICE = 19


@dataclass(frozen=True)
class Order:
    """One save that the thread is to carry out."""

    snapshot: Snapshot
    pending: Pending
    metrics: Mapping[str, float]
    odd_metrics: Mapping[str, str]
    tags: tuple[str, ...]
    note: str
    finished: bool
    config: object
    environment: Mapping[str, object]


class Saver:
    """Writes one snapshot at a time, in order. `submit` and `wait` from any thread."""

    def __init__(
        self,
        writer: Writer,
        memory: SnapshotMemory,
        *,
        policy: KeepPolicy,
        rewrite_every: int | None,
        base: Callable[[], Manifest | None],
        distrusted: set[str],
        on_commit: Callable[[Record, Manifest, Order], None],
    ) -> None:
        self._writer = writer
        self._memory = memory
        self.policy = policy
        self._rewrite_every = rewrite_every
        self._base = base
        self._distrusted = distrusted
        self._on_commit = on_commit
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._idle = threading.Condition()
        self._waiting = 0
        self._thread: threading.Thread | None = None
        self.failures = 0
        self.last_error: BaseException | None = None

    def submit(self, order: Order) -> None:
        """Queue a save; its snapshot is given back when it is done."""
        with self._idle:
            self._waiting += 1
        if self._thread is None:
            # A daemon: a crashed main thread must not hang on an upload. Whoever wants
            # the last save calls `wait`, as `close` and the exit hook do.
            self._thread = threading.Thread(target=self._work, name="holdfast-saver", daemon=True)
            self._thread.start()
        self._orders.put(order)

    def wait(self) -> None:
        """Block until every submitted save has been committed or has failed."""
        with self._idle:
            self._idle.wait_for(lambda: self._waiting == 0)

    def stop(self) -> None:
        """End the thread after the saves that were submitted."""
        if self._thread is not None:
            self._orders.put(None)
            self._thread.join()
            self._thread = None

    def _work(self) -> None:
        if sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        while (order := self._orders.get()) is not None:
            try:
                record, manifest = self._save(order)
                self._on_commit(record, manifest, order)
                self.failures, self.last_error = 0, None
            except BaseException as error:  # noqa: BLE001 - reported in Pending and counted
                self._failed(order, error)
            finally:
                self._memory.give_back()
                with self._idle:
                    self._waiting -= 1
                    self._idle.notify_all()
            del order  # its snapshot's views must not outlive the memory's next use

    def _failed(self, order: Order, error: BaseException) -> None:
        self.failures += 1
        self.last_error = error
        message = error.message if isinstance(error, HoldfastError) else repr(error)
        logger.error("the save of step %d failed: %s", order.pending.step, message)
        if not isinstance(error, HoldfastError):
            wrapped = SaveFailed(f"the save of step {order.pending.step} failed: {error!r}")
            wrapped.__cause__ = error
            error = self.last_error = wrapped
        order.pending.failed(error)

    def _save(self, order: Order) -> tuple[Record, Manifest]:
        base = self._base()
        try:
            return self._attempt(order, base)
        except BaseLost as error:
            if base is None:
                raise
            # Somebody pruned what this save wanted to reuse: write everything anew.
            logger.info("writing step %d in full: %s", order.pending.step, error.message)
            return self._attempt(order, None)

    def _attempt(self, order: Order, base: Manifest | None) -> tuple[Record, Manifest]:
        snapshot = order.snapshot
        save = self._writer.begin()
        stored = None
        if base is not None:
            oldest = save.ordinal - self._rewrite_every if self._rewrite_every else 0
            stored = Stored(base, distrusted=self._distrusted, born_after=max(0, oldest))
        try:
            leaves, packs = Packer(self._writer, save, stored).write(snapshot)
            snapshot.close_sources()
            manifest = Manifest(
                run=self._writer.run,
                epoch=self._writer.epoch,
                nonce=save.nonce,
                ordinal=save.ordinal,
                step=snapshot.step,
                time_s=snapshot.time_s,
                tree=snapshot.tree,
                runtime=snapshot.runtime,
                leaves=leaves,
                packs=packs,
                pickled=snapshot.pickled,
                environment=dict(order.environment),
                config=order.config,
            )
            record = self._writer.commit(
                save,
                manifest,
                metrics=order.metrics,
                odd_metrics=order.odd_metrics,
                tags=order.tags,
                note=order.note,
                finished=order.finished,
                keep=str(self.policy),
                retire=lambda records: [
                    d.record.id for d in decide(records, self.policy) if not d.keep
                ],
            )
            return record, manifest
        except (CommitUnknown, Fenced):
            raise
        except BaseException:
            self._writer.abandon(save)
            raise
