"""`CheckpointManager`: save, restore and look after the checkpoints of one run."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import count
from types import TracebackType
from typing import Any

from holdfast.core.address import validate_tag as check_tag
from holdfast.core.aside import aside
from holdfast.core.codecs import codec_of
from holdfast.core.frameworks import loaded_adapters
from holdfast.core.group import Group
from holdfast.core.records import Manifest, Record
from holdfast.core.units import parse_size
from holdfast.errors import HoldfastError, SaveFailed, TornRead, UsageError, briefly
from holdfast.manager import heartbeat
from holdfast.manager.capture import InPlace
from holdfast.manager.cutting import Cutting
from holdfast.manager.edits import split_metrics
from holdfast.manager.evaluate import Evaluating
from holdfast.manager.info import CheckpointInfo, Overview, info_of, overview_of
from holdfast.manager.orders import Captured, Orders
from holdfast.manager.pending import Pending
from holdfast.manager.ranks import join
from holdfast.manager.saver import Order, Saver
from holdfast.manager.snapshot import Snapshot, SnapshotMemories
from holdfast.manager.staging import Staging
from holdfast.manager.stored import Digests
from holdfast.repo.together import AnyWriter, Follower, Leader
from holdfast.repo.writer import Writer
from holdfast.stores.base import Store

logger = logging.getLogger("holdfast")


class CheckpointManager(Evaluating):
    """Saves and restores the checkpoints of one run.

    `address` is a folder or a URL (`memory://name`). `keep` is the retention rule
    (`last=3 best=2:val_loss every=1000 within=2d size=200GB`; None keeps all). The
    run is opened for reading; the first `save` makes this process its writer, and
    raises RunHeld if another live process on this machine is.

    `memory` bounds the blocks that bytes pass through on their way to the store, in bytes
    or as text. `sparse_rows` names leaves (or what they lie below) of which few rows change
    from save to save: they are compared and stored in chunks of 64 KiB instead of 8 MiB.
    `compress="zstd"` stores new bytes compressed where that makes them smaller
    (`pip install 'holdfast[zstd]'`).

    `mirror` is a second address, mostly a bucket: each checkpoint is copied there in the
    background once it is committed here, at `mirror_bandwidth` at most ("200MB/s"), and kept
    as `mirror_keep` says (by default as `keep`; "" keeps all). `close` copies what is left for
    at most `mirror_wait` ("5min"). Where this address has no checkpoint, those of the mirror
    are brought back first. See `wait_mirrored`, and docs/mirror.md.

    With a `group` (`holdfast.torch.process_group()`) all its ranks save and restore together:
    each makes a manager for the same address and calls the same methods in the same order, and
    each tensor of a model is written once, by one of them. Of what lies below the names of
    `per_rank` each rank has its own. See docs/distributed.md.

    Saves run in a background thread, one at a time, at low priority but for what they read
    in place and until somebody waits for them; all methods may be called from any thread.
    Use it as a context manager or call `close`.

    >>> import holdfast
    >>> with holdfast.CheckpointManager("memory://doc") as ckpts:
    ...     info = ckpts.save(10, {"weights": [1.5, 2.5]}, metrics={"loss": 0.5}).result()
    ...     ckpts.load()["weights"]
    [1.5, 2.5]
    """

    def __init__(
        self,
        address: str | os.PathLike[str],
        *,
        keep: str | None = "last=3",
        take_over: bool = False,
        allow_pickle: bool = False,
        max_save_failures: int = 3,
        rewrite_every: int | None = None,
        memory: int | str = "256MiB",
        sparse_rows: Collection[str] = (),
        compress: str | None = None,
        mirror: str | os.PathLike[str] | None = None,
        mirror_keep: str | None = None,
        mirror_bandwidth: int | str | None = None,
        mirror_wait: float | str | None = None,
        store: Store | None = None,
        clock: Callable[[], float] = time.time,
        config: object = None,
        environment: Mapping[str, Any] | None = None,
        group: Group | None = None,
        per_rank: Collection[str] = (),
    ) -> None:
        if rewrite_every is not None and rewrite_every < 1:
            raise UsageError(
                f"rewrite_every must be at least 1, not {rewrite_every}",
                hint="Give a number of saves, or leave it out.",
            )
        self._codec = codec_of(compress)
        super().__init__(
            address,
            keep=keep,
            store=store,
            clock=clock,
            take_over=take_over,
            mirror=mirror,
            mirror_keep=mirror_keep,
            mirror_bandwidth=mirror_bandwidth,
            mirror_wait=mirror_wait,
        )
        self.config = config
        self.environment = dict(environment or {})
        self._max_failures = max_save_failures
        self._rewrite_every = rewrite_every
        self._writer: Writer | None = None
        self._together: Leader | Follower | None = None
        """What this rank saves through, if others save, too."""
        self._saver: Saver | None = None
        self._memories = SnapshotMemories()
        self._staging = Staging(parse_size(memory) if isinstance(memory, str) else memory)
        self._cutting = Cutting(sparse_rows)
        self._digests = Digests()
        self._unsteady: set[str] = set()
        """Paths of leaves that changed while they were read in place."""
        self._orders = Orders(
            self._digests,
            self._unsteady,
            allow_pickle=allow_pickle,
            clock=self._clock,
            runs_in=lambda: (self.config, self.environment),
            cut=lambda path, source: self._cutting.boxes(path, source, self._staging.block_bytes),
            per_rank=per_rank,
        )
        self._released = False
        """`close` has come to its end, but for what it raises."""
        self._numbers = count()
        """Of saves; all ranks count alike."""
        if group is not None:
            self.save_with(group)

    # -- writing ---------------------------------------------------------------

    @briefly
    def acquire(self) -> None:
        """Become the run's writer now instead of at the first save.

        Creates the run where there is none and removes what dead writers left.
        Raises RunHeld if another live process on this machine holds it; StoreUnfit
        or StoreReadOnly where the store cannot hold a run safely.
        """
        self._check_usable()
        if self._saver is not None:
            return
        if self._group is None:
            self._bring_back()
            self._become_writer()
        else:
            self._together = join(self._group, self._repo, self._lead)
            self._save_through(self._together)

    def save_with(self, group: Group) -> None:
        """Save and restore together with the other ranks of `group` from now on. Before anything
        is saved or restored; all ranks call the same methods in the same order from here."""
        self._group = group
        self._divide_over_nodes(group)
        self.history.move(self._repo.store)
        self._looked = self._looked or group.ranks.rank > 0  # for what its mirror alone has

    def settle(self) -> None:
        """All ranks know what became of all saves: nothing is kept for those that may not."""
        if isinstance(self._together, Leader):
            self._together.settled()

    def leave_ranks(self, within_s: float) -> None:
        """This rank is about to end, and perhaps others have: nothing is waited for longer."""
        if self._together is not None:
            self._together.patience.end_in(within_s)

    def _lead(self) -> Writer:
        """As rank 0, for all ranks."""
        self._bring_back()
        self._become_writer()
        assert self._writer is not None
        return self._writer

    @aside
    def _become_writer(self) -> None:
        with self._lock:
            if self._writer is not None:
                return
            writer = self._open_writer()
            try:
                orphans = [] if writer.is_new else writer.collect()
                if orphans:
                    logger.info("removed %d leftover object(s) of unfinished saves", len(orphans))
            except HoldfastError as error:
                logger.warning("could not remove leftovers: %s", error.message)

    @aside
    def _open_writer(self) -> Writer:
        """The run's writer, with what dead ones left still there if it is new."""
        with self._lock:
            self._check_usable()
            if self._writer is not None:
                return self._writer
            loaded_adapters()  # imported now, and not while the first save holds up the loop
            writer = self._writer = Writer.open(self._repo, take_over=self._take_over)
            if self._group is None:
                self._save_through(writer)
            self.history.begin(writer.epoch)
            self._start_mirror(writer.epoch)
            return writer

    def _save_through(self, writer: AnyWriter) -> None:
        self._saver = Saver(
            writer,
            self._memories,
            self._staging,
            self._digests,
            self.history,
            policy=self.policy,
            rewrite_every=self._rewrite_every,
            cutting=self._cutting,
            base=self._dedup_base,
            codec=self._codec,
            mirrored=bool(self.mirror),
            distrusted=self._distrusted,
            unsteady=self._unsteady,
            spared=self._spared,
            on_commit=self._committed,
        )

    @briefly
    def save(
        self,
        step: int,
        state: Mapping[str, object],
        *,
        metrics: Mapping[str, float] | None = None,
        note: str = "",
        tags: Iterable[str] = (),
        loop: object = None,
        finished: bool = False,
        block: bool = False,
        in_place: InPlace | None = None,
        rng: bool = True,
    ) -> Pending:
        """Save `state` as the checkpoint of `step` completed steps.

        Every tensor, array and tracked file is copied before this returns: you may
        change them at once. Waits while an earlier save still uses the copy memory.
        With `block` this returns, or raises, when the checkpoint is durable; then nothing
        needs to be copied, but for what another thread changes meanwhile. `in_place` names
        leaves that the caller will not change before it calls `drain`: they are read while
        it goes on. `loop` is any plain value that `restore` gives back; RNG states of Python,
        NumPy and loaded frameworks are captured, unless `rng=False`.

        Raises UnsupportedValue for a value that cannot be stored; RunHeld; Fenced if
        another process took over; and, after `max_save_failures` failed saves in a
        row, SaveFailed. Other errors of a save surface in the result.
        """
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(
                f"step must be a whole number of completed steps, not {step!r}",
                hint="Count from 0: manager.save(step=0, state).",
            )
        start = time.perf_counter()
        tag_names = tuple(check_tag(tag) for tag in tags)
        finite, odd = split_metrics(metrics or {})
        self.acquire()
        number = next(self._numbers)
        with self._lock:
            self._check_usable()
            saver = self._saver
            assert saver is not None
            saver.check(self.address, self._max_failures, last_chance=block)
            waiting = time.perf_counter()
            saver.finish()  # one copy of the state is enough
            waited_s = time.perf_counter() - waiting
            try:
                order = self._orders.take(
                    saver,
                    self._memories,
                    step,
                    state,
                    loop,
                    in_place,
                    waits=block,
                    metrics=(finite, odd),
                    note=note,
                    tags=tag_names,
                    finished=finished,
                    rng=rng,
                    asked_s=start,
                    waited_s=waited_s,
                    ranks=None if self._group is None else self._group.ranks,
                    number=number,
                )
            except BaseException as error:
                saver.give_up(number, error)
                raise
            self._overlap, pending = order.snapshot.overlap, order.pending
            if not block:
                saver.submit(order)
                return pending
        try:
            saver.submit(order, urgent=True)
            pending.result()
        except TornRead:  # another thread changes what is saved: now it is copied first
            more = {"note": note, "tags": tag_names, "loop": loop, "finished": finished, "rng": rng}
            return self.save(step, state, metrics=metrics, **more, block=True)
        finally:
            order.snapshot.overlap.drain()  # interrupted: the caller may go on to change things
        return pending

    def save_snapshot(
        self, snapshot: Snapshot, *, note: str, config: object, environment: Mapping[str, Any]
    ) -> CheckpointInfo:
        """Make a snapshot that was put together elsewhere the next checkpoint; returns when that
        is durable. Raises RunHeld, Fenced, and what makes the save fail."""
        self.acquire()
        assert self._saver is not None
        order = self._orders.of(snapshot, self._saver, note, config, environment)
        self._saver.submit(order, urgent=True)
        return order.pending.result()

    def hold(
        self,
        step: int,
        state: Mapping[str, object],
        *,
        metrics: Mapping[str, float] | None = None,
        note: str = "held",
        loop: object = None,
    ) -> Captured:
        """Copy `state` as `save` does, and keep the copy: `Captured.commit` makes it a checkpoint,
        later and from any thread, and `drop` gives its memory to the next one. Nothing of it is
        read in place. Raises UnsupportedValue, RunHeld, Fenced."""
        self.acquire()
        with self._lock:
            self._check_usable()
            assert self._saver is not None
            check = self._check_usable
            return self._orders.hold(self._saver, step, state, loop, metrics or {}, note, check)

    @property
    def _saves(self) -> bool:
        return self._saver is not None

    def _dedup_base(self) -> Manifest | None:
        """The newest checkpoint's manifest; read once, then kept from save to save."""
        # Without the manager's lock: only the saver comes here, and `save` may
        # hold the lock while it waits for a save to give the copy memory back.
        if self._base is None and self._writer is not None:
            try:
                # As the writer knows it: the commit asks whether what is reused is still there.
                if (newest := self._writer.newest()) is not None:
                    self._base = self._repo.manifest(newest)
            except HoldfastError as error:
                logger.warning("nothing is reused from the newest checkpoint: %s", error)
        return self._base

    def _committed(self, record: Record, manifest: Manifest, order: Order) -> None:
        # No lock: the thread that waits for this save may hold it.
        self._base = manifest
        heartbeat.checkpoint(self.address, record.step, record.id)
        info = info_of(self.address, record)
        self._new_to_mirror(record.id, lambda: order.pending.committed(info))

    def wait(self) -> None:
        """Block until every save has been committed or has failed."""
        if self._saver is not None and self._pid == os.getpid():
            self._saver.wait()

    def close(self) -> None:
        """Finish pending saves and give the run up. May be called twice.

        Raises SaveFailed if the newest save failed: its steps are not saved.
        """
        if self._released or self._pid != os.getpid():
            return  # a forked child holds nothing
        self.wait()
        heartbeat.ended(self.address)
        self._finish()
        try:
            self._close_mirror()
        finally:
            self._release()
        if self._saver is not None:
            self._saver.check_last(self.address)

    @aside
    def _finish(self) -> None:
        """No save follows, and no thread makes one."""
        with self._lock:
            self._closed = True
        if self._saver is not None:
            self._saver.stop()

    @aside
    def _release(self) -> None:
        if self._saver is not None:
            self._saver.retire_spared()
        if self._writer is not None:
            self._writer.close()
        self._repo.close()
        self._released = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except SaveFailed:
            if error is None:
                raise  # else the body's own error matters more; this one was logged

    # -- looking after ----------------------------------------------------------

    def written(self, newest: int) -> Overview | None:
        """As `overview`, as of this writer's own last commit: the store is not asked.

        None for a manager that has not become the writer. Also after `close`."""
        if self._writer is None:
            return None
        return overview_of(self.address, *self._writer.listed(), newest)

    def _amend(self, action: str, change: Callable[[tuple[Record, ...]], Iterable[Record]]) -> None:
        if not self._is_first:
            list(change(self._read()[1]))  # rank 0 commits it: here it is only tried
        elif self._writer is None:
            super()._amend(action, change)
        else:
            self._check_usable()
            self._writer.amend(action, change)
            self._to_mirror()

    def gc(self, *, dry_run: bool = False) -> list[str]:
        """Delete objects that no checkpoint needs; their keys. Makes this the writer. With
        `dry_run` nothing is deleted. Of several ranks only the first does it."""
        if not self._is_first:
            return []
        self._bring_back()
        return self._open_writer().collect(dry_run=dry_run, thorough=True)
