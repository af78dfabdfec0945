"""The background threads that turn snapshots into committed checkpoints.

A save is a series of steps, driven by one thread at a time. While it reads in place that
thread has normal priority, for what it has not read in time the barrier must copy; then it
has a low one, which on a machine with busy cores gets little time. A thread cannot raise
its priority again, so as soon as somebody waits for the save (`block=True`, `result`,
`wait`, `close`, the next save) a new thread of normal priority drives the steps that
are left: the low one lets go between two chunks.

Whoever calls may be interrupted by what a signal's handler raises, at any instruction. So a
job is there before a thread that drives it, any thread can drive it, and who waits for it has it
driven: none is ever left that everybody waits for and nobody drives. See `core.aside`.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain

from msgspec.structs import replace

from holdfast.core.aside import Helper, Latch, NoThread
from holdfast.core.codecs import RAW
from holdfast.core.records import Manifest, Record
from holdfast.core.retention import KeepPolicy
from holdfast.core.retiring import Retiring
from holdfast.errors import (
    BaseLost,
    CommitUnknown,
    DamagedObject,
    Fenced,
    HoldfastError,
    ObjectNotFound,
    SaveFailed,
    StoredWrong,
    TornRead,
)
from holdfast.manager.cutting import Cutting
from holdfast.manager.history import History, SaveEvent
from holdfast.manager.packer import Packer
from holdfast.manager.pending import Pending
from holdfast.manager.progress import Work
from holdfast.manager.snapshot import Snapshot, SnapshotMemories
from holdfast.manager.staging import Staging, yield_to_others
from holdfast.manager.stored import Digests, Stored
from holdfast.repo import keys
from holdfast.repo.together import AnyWriter

logger = logging.getLogger("holdfast")

_Steps = Iterator[None]


@dataclass(frozen=True)
class Order:
    """One save that is to be carried out."""

    snapshot: Snapshot
    pending: Pending
    metrics: Mapping[str, float]
    odd_metrics: Mapping[str, str]
    tags: tuple[str, ...]
    note: str
    finished: bool
    config: object
    environment: Mapping[str, object]
    asked_s: float
    """When the save was asked for, by `time.perf_counter`."""
    waited_s: float
    capture_s: float
    blocked: bool
    """See `history.SaveEvent`."""
    work: Work
    """Where its bytes are counted for whoever waits."""
    number: int = 0
    """Of the save, among those of all ranks."""
    held_nbytes: int = 0
    """Of memory that captured states take beside this one."""


class _Job:
    """One save on its way."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.pending = order.pending
        self.overlap = order.snapshot.overlap
        self.steps: _Steps = iter(())
        self.turn = threading.Lock()
        """Held by the thread that drives the steps."""
        self.hurried = False
        """A thread of normal priority drives it, or waits for its turn."""
        self.ended = Latch()


class Saver:
    """Writes one snapshot at a time; `submit`, `hurry` and `wait` from any thread."""

    def __init__(
        self,
        writer: AnyWriter,
        memories: SnapshotMemories,
        staging: Staging,
        digests: Digests,
        history: History,
        *,
        policy: KeepPolicy,
        rewrite_every: int | None,
        cutting: Cutting,
        base: Callable[[], Manifest | None],
        codec: str,
        mirrored: bool,
        distrusted: set[str],
        unsteady: set[str],
        spared: Callable[[], str],
        on_commit: Callable[[Record, Manifest, Order], None],
    ) -> None:
        self._writer = writer
        self._memories = memories
        self._staging = staging
        self._digests = digests
        self._history = history
        self._packer: Packer | None = None
        self._commit_s = 0.0
        self._lost_base = False
        """The last base was removed while a save built on it."""
        self.policy = policy
        self._retiring = Retiring(policy)
        self._rewrite_every = rewrite_every
        self._cutting = cutting
        self._base = base
        self._codec = codec
        self._mirrored = mirrored
        self._distrusted = distrusted
        self._unsteady = unsteady
        self._spared = spared
        self._left = False
        """The last save has spared one."""
        self._on_commit = on_commit
        self._in_progress: dict[str, _Job] = {}
        """None, or one: nothing is entered where there is one, in one call into C."""
        self._threads: list[Helper] = []
        self._pid = os.getpid()
        self.failures = 0
        self.last_error: BaseException | None = None

    @property
    def _job(self) -> _Job | None:
        return self._in_progress.get("job")

    def submit(self, order: Order, *, urgent: bool = False) -> None:
        """Begin a save, when the one before it has ended: commits come in order. `urgent`: it
        begins when it is waited for, which is at once."""
        job = _Job(order)
        job.steps = self._steps(job)
        while self._in_progress.setdefault("job", job) is not job:
            self.finish()
        if not urgent and not self._start(job, low=True):
            with job.pending.awaited():
                self._drive(job, low=False)

    def give_up(self, number: int, error: BaseException) -> None:
        """The save of this number could not even be begun here. Where others save, too, they are
        told, for else they would wait for this rank's share."""
        if not self._writer.alone:
            self._writer.abandon(self._writer.begin(number), error)

    def hurry(self) -> None:
        """Somebody waits for the save in progress: it goes on at the caller's priority."""
        if self._pid != os.getpid():
            return  # a forked child has a copy of a job that is the parent's
        job = self._job
        # Not marked before there is a thread: this one may be interrupted in between.
        if job is not None and not job.hurried and not self._start(job, low=False):
            self._drive(job, low=False)

    def finish(self) -> None:
        """Block until the save in progress, if there is one, has been committed or has failed."""
        job = self._job
        if job is not None and self._pid == os.getpid():
            self.hurry()
            job.ended.wait()

    def wait(self) -> None:
        """`finish`, for a caller who has nothing else to do: the save's time shows it."""
        job = self._job  # the only one, unless another thread saves: its waits are its own
        with nullcontext() if job is None else job.pending.awaited():
            self.finish()

    def check(self, address: str, most: int, *, last_chance: bool) -> None:
        """Give up after `most` failures in a row; a save that is waited for is always tried,
        since space may be free again and nothing may follow it. Raises Fenced, SaveFailed."""
        if isinstance(self.last_error, Fenced):
            raise self.last_error
        if self.last_error is not None and self.failures >= most and not last_chance:
            raise _failure(
                f"{self.failures} saves of {address} in a row have failed; the last",
                self.last_error,
            )

    def check_last(self, address: str) -> None:
        """Raise SaveFailed if the newest save failed."""
        if self.last_error is not None:
            raise _failure(f"the last save of {address} failed", self.last_error)

    def stop(self) -> None:
        """Wait until the threads have ended, after the save that was submitted."""
        self.wait()
        for thread in self._threads:
            thread.join()

    def _unhurried(self) -> bool:
        """Whether nobody waits for the save in progress, nor for what it reads in place."""
        job = self._job
        return job is not None and not job.hurried and not self._presses(job)

    def _presses(self, job: _Job) -> bool:
        """Whether a barrier would have to copy what is not done soon. Not where new bytes are
        compressed: that takes several times what it takes to read them, from the training."""
        return job.overlap.waits and self._codec == RAW

    def _start(self, job: _Job, *, low: bool) -> bool:
        """Drive the job from a new thread; False if there can be none: too many are there
        already, or the interpreter is ending."""
        # A new thread has the priority of the one that starts it: never a low one here.
        # A daemon: a crashed main thread must not hang on an upload. Whoever wants the
        # last save calls `wait`, as `close` and the exit hook do.
        try:
            thread = Helper(partial(self._drive, job, low), name="holdfast-saver")
        except NoThread:
            return False
        self._threads = [*(t for t in self._threads if t.works), thread]
        return True

    def _drive(self, job: _Job, low: bool) -> None:
        if not low:
            job.hurried = True
        lowered = not low
        with job.turn:
            for _ in chain((None,), job.steps):
                if low and job.hurried:
                    return  # the thread that `hurry` started goes on
                if not lowered and not self._presses(job):
                    yield_to_others()
                    lowered = True

    def _steps(self, job: _Job) -> _Steps:
        order = job.order
        try:
            record, manifest = yield from self._save(order)
            event = self._event(order, record)
            order.pending.stats = event
            self._on_commit(record, manifest, order)
            self.failures, self.last_error = 0, None
            self._history.add(event)
            self._writer.delete_retired()
        except GeneratorExit:
            raise  # given up with the process
        except BaseException as error:  # noqa: BLE001 - reported in Pending and counted
            self._failed(order, error)
        finally:
            order.snapshot.close()
            self._memories.give_back(order.snapshot.memory)
            self._in_progress.clear()
            job.ended.set()

    def _failed(self, order: Order, error: BaseException) -> None:
        self._digests.forget()
        self.failures += 1
        self.last_error = error
        message = error.message if isinstance(error, HoldfastError) else repr(error)
        logger.error("the save of step %d failed: %s", order.pending.step, message)
        if not isinstance(error, HoldfastError):
            wrapped = SaveFailed(f"the save of step {order.pending.step} failed: {error!r}")
            wrapped.__cause__ = error
            error = self.last_error = wrapped
        if isinstance(error, DamagedObject | ObjectNotFound) and (name := keys.pack_of(error.key)):
            self._distrusted.add(name)
        if isinstance(error, TornRead):
            self._unsteady.update(error.leaves)
        order.pending.failed(error)
        self._history.add(replace(self._event(order), error=message))

    def _event(self, order: Order, record: Record | None = None) -> SaveEvent:
        """What the save has cost."""
        snapshot, packer = order.snapshot, self._packer
        return SaveEvent(
            epoch=self._writer.epoch,
            time_s=snapshot.time_s,
            step=snapshot.step,
            id=record.id if record else "",
            note=order.note,
            blocked=order.blocked,
            waited_s=order.waited_s,
            capture_s=order.capture_s,
            barrier_s=snapshot.overlap.stall_s,
            result_s=order.pending.result_s,
            read_s=packer.read_s if packer else 0.0,
            digest_s=packer.digest_s if packer else 0.0,
            compress_s=packer.compress_s if packer else 0.0,
            write_s=packer.write_s if packer else 0.0,
            commit_s=self._commit_s,
            total_s=time.perf_counter() - order.asked_s,
            nbytes=sum(leaf.source.nbytes for leaf in snapshot.leaves),
            copied_nbytes=snapshot.copied_nbytes,
            new_nbytes=packer.packed_nbytes if packer and record else 0,
            written_nbytes=record.new_bytes if record else 0,
            memory_nbytes=snapshot.memory.nbytes + self._staging.nbytes + order.held_nbytes,
        )

    def _retire(self, records: tuple[Record, ...]) -> list[str]:
        """What the rule gives up, but for one that is just being read: the next save's turn."""
        spared = self._spared()
        ids = self._retiring.ids(records)
        self._left = spared in ids
        return [id for id in ids if id != spared]

    def retire_spared(self) -> None:
        """What the last save has spared goes now: nothing reads it any more."""
        if not self._left:
            return
        try:

            def change(records: tuple[Record, ...]) -> list[Record]:
                gone = set(self._retiring.ids(records))
                return [record for record in records if record.id not in gone]

            self._writer.amend("retire", change)
        except HoldfastError as error:
            logger.warning("one checkpoint more than `keep` says stays: %s", error.message)

    def _save(self, order: Order) -> Generator[None, None, tuple[Record, Manifest]]:
        self._packer, self._commit_s = None, 0.0
        base = None if self._lost_base else self._base()
        try:
            saved = yield from self._attempt(order, base)
        except BaseLost as error:
            if base is None:
                raise
            if not self._writer.alone:
                self._lost_base = True  # on all ranks: the next save is full on each of them
                raise
            # Somebody pruned what this save wanted to reuse: write everything anew.
            self._lost_base = True
            logger.info("writing step %d in full: %s", order.pending.step, error.message)
            if not order.snapshot.overlap.start_again():
                raise SaveFailed(
                    "the checkpoint that this save builds on was removed, and what they share "
                    "can no longer be read: training has gone on",
                    hint="The next save writes everything.",
                ) from error
            saved = yield from self._attempt(order, None)
        except StoredWrong as error:
            if not self._writer.alone or not order.snapshot.overlap.start_again():
                raise
            # What arrived wrong keeps its name: once more, under others.
            logger.warning("writing step %d once more: %s", order.pending.step, error.message)
            saved = yield from self._attempt(order, base)
        self._lost_base = False
        self._digests.settle(order.snapshot.marks)
        return saved

    def _attempt(
        self, order: Order, base: Manifest | None
    ) -> Generator[None, None, tuple[Record, Manifest]]:
        snapshot = order.snapshot
        save = self._writer.begin(order.number)
        save.own = [n for n, leaf in enumerate(snapshot.leaves) if leaf.share and leaf.share.own]
        save.marks = snapshot.replicas
        stored = None
        if base is not None:
            oldest = save.ordinal - self._rewrite_every if self._rewrite_every else 0
            stored = Stored(
                base,
                distrusted=self._distrusted,
                born_after=max(0, oldest),
                same_place=not self._writer.alone,
            )
        packer = self._packer = Packer(
            self._writer,
            save,
            stored,
            self._digests,
            self._staging,
            low=self._unhurried,
            work=order.work,
            cutting=self._cutting,
            codec=self._codec,
            mirrored=self._mirrored,
        )
        try:
            leaves, packs = yield from packer.write(snapshot)
            yield
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
            start = time.perf_counter()
            record = self._writer.commit(
                save,
                manifest,
                packs_durable=packer.finish,
                metrics=order.metrics,
                odd_metrics=order.odd_metrics,
                tags=order.tags,
                note=order.note,
                finished=order.finished,
                keep=str(self.policy),
                retire=self._retire,
            )
            self._commit_s = time.perf_counter() - start - packer.finish_s
            return record, manifest
        except (CommitUnknown, Fenced, GeneratorExit):
            raise  # its packs may be needed
        except BaseException as error:
            self._writer.abandon(save, error)
            raise
        finally:
            packer.close()


def _failure(what: str, cause: BaseException) -> SaveFailed:
    message, hint = str(cause), ""
    if isinstance(cause, HoldfastError):
        message, hint = cause.message, f"{cause.hint} " if cause.hint else ""
    error = SaveFailed(
        f"{what}: {message}",
        hint=f"{hint}Earlier checkpoints are whole. Mend the cause and start again.",
    )
    error.__cause__ = cause
    return error
