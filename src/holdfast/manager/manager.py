"""`CheckpointManager`: save, restore and look after the checkpoints of one run."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from holdfast.core.address import BestBy, Selector, parse_selector, select
from holdfast.core.address import validate_tag as check_tag
from holdfast.core.records import Manifest, Record
from holdfast.core.retention import Decision, KeepPolicy, Mode, decide, parse_keep
from holdfast.core.rng import capture_rng
from holdfast.core.tree import TreeEncoder
from holdfast.errors import (
    CheckpointNotFound,
    Fenced,
    HoldfastError,
    NoStore,
    RunClosed,
    SaveFailed,
    UsageError,
)
from holdfast.manager.export import export
from holdfast.manager.info import CheckpointInfo, Restored, Verification, info_of
from holdfast.manager.loaded import LoadedCheckpoint
from holdfast.manager.pending import Pending
from holdfast.manager.restore import RUNTIME, Restorer, Wish
from holdfast.manager.saver import Order, Saver
from holdfast.manager.snapshot import Snapshot, SnapshotMemory
from holdfast.manager.verify import verify
from holdfast.repo.fork import fork
from holdfast.repo.lending import is_fork_pin
from holdfast.repo.repo import Repo
from holdfast.repo.writer import Writer
from holdfast.stores.base import Store
from holdfast.stores.open import open_store

logger = logging.getLogger("holdfast")

Ref = str | int | None
"""A checkpoint: a step, "latest", "best:val_loss", a tag, the start of an id; None = latest."""


class CheckpointManager:
    """Saves and restores the checkpoints of one run.

    `address` is a folder or a URL (`memory://name`). `keep` is the retention rule
    (`last=3 best=2:val_loss every=1000 within=2d size=200GB`; None keeps all). The
    run is opened for reading; the first `save` makes this process its writer, and
    raises RunHeld if another live process on this machine is.

    Saves run in a background thread, one at a time; all methods may be called from
    any thread. Use it as a context manager or call `close`.

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
        store: Store | None = None,
        clock: Callable[[], float] = time.time,
        config: object = None,
        environment: Mapping[str, Any] | None = None,
    ) -> None:
        if rewrite_every is not None and rewrite_every < 1:
            raise UsageError(f"rewrite_every must be at least 1, not {rewrite_every}")
        self.address = os.fspath(address)
        self.policy: KeepPolicy = parse_keep(keep)
        self.config = config
        self.environment = dict(environment or {})
        self._take_over = take_over
        self._allow_pickle = allow_pickle
        self._max_failures = max_save_failures
        self._rewrite_every = rewrite_every
        self._clock = clock
        self._repo = Repo(store if store is not None else open_store(self.address), clock=clock)
        self._writer: Writer | None = None
        self._saver: Saver | None = None
        self._memory = SnapshotMemory()
        self._lock = threading.RLock()
        self._base: Manifest | None = None
        """Manifest whose chunks the next save may reuse."""
        self._distrusted: set[str] = set()
        """Packs in which damage was found: never a source for reuse."""
        self._closed = False
        self._pid = os.getpid()

    # -- writing ---------------------------------------------------------------

    def acquire(self) -> None:
        """Become the run's writer now instead of at the first save.

        Creates the run where there is none and removes what dead writers left.
        Raises RunHeld if another live process on this machine holds it; StoreUnfit
        or StoreReadOnly where the store cannot hold a run safely.
        """
        with self._lock:
            self._check_usable()
            if self._writer is not None:
                return
            writer = Writer.open(self._repo, take_over=self._take_over)
            self._writer = writer
            try:
                orphans = writer.collect()
                if orphans:
                    logger.info("removed %d leftover object(s) of unfinished saves", len(orphans))
            except HoldfastError as error:
                logger.warning("could not remove leftovers: %s", error.message)
            self._saver = Saver(
                writer,
                self._memory,
                policy=self.policy,
                rewrite_every=self._rewrite_every,
                base=self._dedup_base,
                distrusted=self._distrusted,
                on_commit=self._committed,
            )

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
    ) -> Pending:
        """Save `state` as the checkpoint of `step` completed steps.

        Every tensor and array is copied before this returns: you may change them at
        once. (Files in `File` and `Directory` are read later: leave them alone until
        the result is there.) Waits while an earlier save still uses the copy memory.
        `loop` is any plain value that `restore` gives back; RNG states of Python,
        NumPy and loaded frameworks are always captured.

        Raises UnsupportedValue for a value that cannot be stored; RunHeld; Fenced if
        another process took over; and, after `max_save_failures` failed saves in a
        row, SaveFailed. Other errors of a save surface in the result.
        """
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(f"step must be a whole number of completed steps, not {step!r}")
        tag_names = tuple(check_tag(tag) for tag in tags)
        finite, odd = split_metrics(metrics or {})
        with self._lock:
            self.acquire()
            assert self._saver is not None
            self._raise_failures()
            snapshot = self._capture(step, state, loop)
            pending = Pending(step)
            self._saver.submit(
                Order(
                    snapshot=snapshot,
                    pending=pending,
                    metrics=finite,
                    odd_metrics=odd,
                    tags=tag_names,
                    note=note,
                    finished=finished,
                    config=self.config,
                    environment=self.environment,
                )
            )
        if block:
            pending.result()
        return pending

    def _capture(self, step: int, state: Mapping[str, object], loop: object) -> Snapshot:
        encoder = TreeEncoder(allow_pickle=self._allow_pickle)
        try:
            tree = encoder.encode(dict(state), "")
            runtime = encoder.encode({"rng": capture_rng(), "loop": loop}, RUNTIME)
            leaves = self._memory.take(encoder.leaves)
        except BaseException:
            encoder.close()
            raise
        return Snapshot(
            step=step,
            time_s=self._clock(),
            tree=tree,
            runtime=runtime,
            leaves=leaves,
            pickled=encoder.pickled,
        )

    def _dedup_base(self) -> Manifest | None:
        """The newest checkpoint's manifest; read once, then kept from save to save."""
        # Without the manager's lock: only the saver's thread comes here, and `save` may
        # hold the lock while it waits for that thread to give the copy memory back.
        if self._base is None and (records := self._repo.records()):
            try:
                self._base = self._repo.manifest(records[-1])
            except HoldfastError as error:
                logger.warning("nothing is reused from the newest checkpoint: %s", error)
        return self._base

    def _committed(self, record: Record, manifest: Manifest, order: Order) -> None:
        # No lock: the thread that waits for this save may hold it.
        self._base = manifest
        order.pending.committed(info_of(self.address, record))

    def _raise_failures(self) -> None:
        saver = self._saver
        if saver is None or saver.last_error is None:
            return
        if isinstance(saver.last_error, Fenced):
            raise saver.last_error
        if saver.failures >= self._max_failures:
            raise SaveFailed(
                f"{saver.failures} saves of {self.address} in a row have failed; "
                f"the last: {saver.last_error}",
                hint="Earlier checkpoints are whole. Mend the cause and start again.",
            ) from saver.last_error

    def wait(self) -> None:
        """Block until every save has been committed or has failed."""
        if self._saver is not None and self._pid == os.getpid():
            self._saver.wait()

    def close(self) -> None:
        """Finish pending saves and give the run up. May be called twice.

        Raises SaveFailed if the newest save failed: its steps are not saved.
        """
        if self._closed or self._pid != os.getpid():
            return  # a forked child holds nothing
        self.wait()
        with self._lock:
            self._closed = True
            saver, writer = self._saver, self._writer
        if saver is not None:
            saver.stop()
        if writer is not None:
            writer.close()
        self._repo.close()
        if saver is not None and saver.last_error is not None:
            raise SaveFailed(
                f"the last save of {self.address} failed: {saver.last_error}",
                hint="Earlier checkpoints are whole.",
            ) from saver.last_error

    def __enter__(self) -> Self:
        return self

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

    # -- reading ---------------------------------------------------------------

    def checkpoints(self) -> list[CheckpointInfo]:
        """Every live checkpoint, oldest first; none where there is no run yet."""
        return [info_of(self.address, record) for record in self._records()]

    def latest(self) -> CheckpointInfo | None:
        """The newest checkpoint, or None."""
        records = self._records()
        return info_of(self.address, records[-1]) if records else None

    def best(self, metric: str, mode: Mode | None = None) -> CheckpointInfo | None:
        """The checkpoint with the lowest (mode "max": highest) finite `metric`, or None.

        Without `mode`, as the run's `keep` rule for that metric says, else the lowest.
        """
        chosen = mode or self.policy.mode_of(metric) or "min"
        try:
            return info_of(self.address, select(self._records(), BestBy(metric, chosen), None))
        except CheckpointNotFound:
            return None

    def info(self, ref: Ref = None) -> CheckpointInfo:
        """The checkpoint that `ref` names. Raises CheckpointNotFound, BadAddress."""
        return info_of(self.address, self._resolve(ref))

    def manifest(self, ref: Ref = None) -> Manifest:
        """The checkpoint's whole description. Raises DamagedObject."""
        return self._repo.manifest(self._resolve(ref))

    @property
    def finished(self) -> bool:
        """Whether the newest checkpoint was saved as a finished run's last."""
        head = self._head()
        return bool(head and head.finished)

    def _head(self) -> Any:
        try:
            self._repo.info()
        except NoStore:
            return None
        head = self._repo.head()
        return head.entry if head else None

    def _records(self) -> tuple[Record, ...]:
        self._check_usable()
        try:
            self._repo.info()
        except NoStore:
            return ()
        return self._repo.records()

    def _resolve(self, ref: Ref) -> Record:
        return self._select(parse_selector(ref))

    def _select(self, selector: Selector) -> Record:
        records = self._records()
        if not records:
            raise NoStore(f"there is no checkpoint in {self.address}", hint="Check the address.")
        return select(records, selector, self.policy.default_best)

    def restore(
        self,
        into: MutableMapping[str, Any] | None = None,
        ref: Ref = None,
        *,
        strict: bool = True,
        only: Collection[str] = (),
        skip: Collection[str] = (),
        rename: Mapping[str, str] | None = None,
        allow_pickle: bool = False,
        rng: bool = True,
    ) -> Restored | None:
        """Put a checkpoint's state into live objects, every byte verified.

        `into` maps names to live objects, as given to `save`; tensors, modules,
        containers are filled in place, plain values replaced in `into`. Without
        `into` new values are made. Nothing live is touched before the structure was
        accepted. With `ref=None` a damaged checkpoint is skipped with a loud line and
        the newest intact one used; None is returned only where no checkpoint was ever
        committed. `only`, `skip` and `rename` ({"saved": "live"}) take names or path
        prefixes.

        Raises StructureMismatch listing every missing, unexpected and changed leaf;
        NoIntactCheckpoint; DamagedObject for an explicit `ref`; PickleRefused.
        """
        wish = Wish(
            into=into,
            strict=strict,
            only=tuple(only),
            skip=tuple(skip),
            rename=dict(rename or {}),
            allow_pickle=allow_pickle,
            rng=rng,
        )
        return self._restorer().restore(None if ref is None else self._resolve(ref), wish)

    def read_loop(self, ref: Ref = None) -> Restored | None:
        """Position, config and environment of a checkpoint; touches nothing live."""
        return self._restorer().read_loop(None if ref is None else self._resolve(ref))

    def _restorer(self) -> Restorer:
        self._check_usable()
        return Restorer(self._repo, self.address, self._records, self._distrusted, self._restored)

    def _restored(self, manifest: Manifest) -> None:
        """What was restored is verified: the best base for reuse."""
        if self._saver is None:
            self._base = manifest

    def load(self, ref: Ref = None, *, allow_pickle: bool = False) -> LoadedCheckpoint:
        """The checkpoint as a lazy mapping: each leaf is read when it is asked for."""
        return self._load(self._resolve(ref), allow_pickle)

    def load_selected(self, selector: Selector, *, allow_pickle: bool = False) -> LoadedCheckpoint:
        """As `load`, for a selector that `core.address` parsed."""
        return self._load(self._select(selector), allow_pickle)

    def _load(self, record: Record, allow_pickle: bool) -> LoadedCheckpoint:
        return LoadedCheckpoint(
            self._repo, record, info_of(self.address, record), allow_pickle=allow_pickle
        )

    # -- looking after ----------------------------------------------------------

    def tag(self, ref: Ref, name: str) -> CheckpointInfo:
        """Give a checkpoint a name; it moves there if another had it. Tagged ones stay."""
        check_tag(name)
        id = self._resolve(ref).id

        def change(records: tuple[Record, ...]) -> list[Record]:
            _require(records, id, self.address)
            return [_with_tags(r, r.id == id, name) for r in records]

        self._amend("tag", change)
        return self.info(name)

    def untag(self, name: str) -> None:
        """Take a tag away. Raises CheckpointNotFound if no checkpoint has it."""
        if not any(name in record.tags for record in self._records()):
            raise CheckpointNotFound(f"no checkpoint of {self.address} has the tag {name!r}")
        self._amend("untag", lambda records: [_with_tags(r, False, name) for r in records])

    def pin(self, ref: Ref, reason: str = "") -> CheckpointInfo:
        """Keep a checkpoint whatever the rules say, until `unpin`."""
        if is_fork_pin(reason):
            raise UsageError(f"a reason cannot start like a forked run's pin: {reason!r}")
        return self._edit("pin", ref, lambda r: {"pins": tuple(sorted({*r.pins, reason}))})

    def unpin(self, ref: Ref) -> CheckpointInfo:
        """Leave a checkpoint to the rules again. Pins of forked runs stay."""
        return self._edit("unpin", ref, lambda r: {"pins": tuple(filter(is_fork_pin, r.pins))})

    def log_metrics(self, ref: Ref, metrics: Mapping[str, float]) -> CheckpointInfo:
        """Add metrics to a checkpoint after the fact; its data is not touched."""
        finite, odd = split_metrics(metrics)

        def fields(record: Record) -> dict[str, object]:
            old_finite = {k: v for k, v in record.metrics.items() if k not in odd}
            old_odd = {k: v for k, v in record.odd_metrics.items() if k not in finite}
            return {"metrics": {**old_finite, **finite}, "odd_metrics": {**old_odd, **odd}}

        return self._edit("metrics", ref, fields)

    def _edit(
        self, action: str, ref: Ref, fields: Callable[[Record], Mapping[str, object]]
    ) -> CheckpointInfo:
        id = self._resolve(ref).id
        edited: list[Record] = []

        def change(records: tuple[Record, ...]) -> list[Record]:
            edited[:] = [_require(records, id, self.address)]
            edited[:] = [msgspec.structs.replace(edited[0], **fields(edited[0]))]
            return [edited[0] if r.id == id else r for r in records]

        self._amend(action, change)
        return info_of(self.address, edited[0])

    def _amend(self, action: str, change: Callable[[tuple[Record, ...]], Iterable[Record]]) -> None:
        self._check_usable()
        if self._writer is not None:
            self._writer.amend(action, change)
        else:
            self._repo.store.prepare_writing()
            self._repo.amend(action, change)

    def prune(self, keep: str | None = None, *, dry_run: bool = False) -> list[Decision]:
        """Apply a retention rule now (the manager's own without `keep`).

        Returns each checkpoint with the reason why it stays or goes. With `dry_run`
        nothing is changed. Safe beside a live writer in another process.
        """
        policy = self.policy if keep is None else parse_keep(keep)
        decisions = decide(self._records(), policy)
        if dry_run or all(d.keep for d in decisions):
            return decisions

        def change(records: tuple[Record, ...]) -> list[Record]:
            decisions[:] = decide(records, policy)
            return [d.record for d in decisions if d.keep]

        self._amend("prune", change)
        return decisions

    def verify(self, ref: Ref = None) -> list[Verification]:
        """Read every byte of one checkpoint, or of all, and compare with its digest."""
        records = self._records() if ref is None else (self._resolve(ref),)
        return [verify(self._repo, record, self.address) for record in records]

    def gc(self, *, dry_run: bool = False) -> list[str]:
        """Delete objects that no checkpoint needs; their keys. Makes this the writer."""
        self.acquire()
        assert self._writer is not None
        return self._writer.collect(dry_run=dry_run)

    def export(self, ref: Ref, folder: str | os.PathLike[str]) -> list[Path]:
        """Write a checkpoint as plain files that need no Holdfast to be read.

        `state.safetensors` with every tensor, `state.json` with the rest, `files/`
        with tracked files. The folder must not exist or be empty.
        """
        return export(self._repo, self._resolve(ref), Path(folder))

    def fork(self, ref: Ref, address: str | os.PathLike[str]) -> CheckpointInfo:
        """Start a new run at `address` from a checkpoint, sharing its data.

        The checkpoint stays pinned here until the new run no longer needs it.
        """
        child = Repo(open_store(os.fspath(address)), clock=self._clock)
        try:
            return info_of(os.fspath(address), fork(self._repo, self._resolve(ref), child))
        finally:
            child.close()

    def _check_usable(self) -> None:
        if self._closed:
            raise RunClosed(f"the manager of {self.address} is closed")
        if self._pid != os.getpid():
            raise RunClosed(
                f"{self.address} was opened by process {self._pid}, not by this forked child",
                hint="Open it again in the child; only one process may write.",
            )


def split_metrics(metrics: Mapping[str, float]) -> tuple[dict[str, float], dict[str, str]]:
    """(finite ones, the others as "nan", "inf", "-inf"). Raises UsageError for non-numbers."""
    finite: dict[str, float] = {}
    odd: dict[str, str] = {}
    for name, value in metrics.items():
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise UsageError(f"metric {name!r} is not a number: {value!r}") from error
        if math.isfinite(number):
            finite[name] = number
        else:
            odd[name] = str(number)
    return finite, odd


def _require(records: Iterable[Record], id: str, address: str) -> Record:
    for record in records:
        if record.id == id:
            return record
    raise CheckpointNotFound(f"the checkpoint {id:.12} of {address} was removed meanwhile")


def _with_tags(record: Record, add: bool, name: str) -> Record:
    tags = tuple(tag for tag in record.tags if tag != name) + ((name,) if add else ())
    return record if tags == record.tags else msgspec.structs.replace(record, tags=tags)
