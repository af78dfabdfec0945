"""Saves: each rank writes its share, the coordinator commits."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import msgspec
import torch.distributed as dist
from torch.distributed.checkpoint import storage
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from holdfast.core.address import AtStep, Named, validate_tag
from holdfast.core.codecs import codec_of
from holdfast.core.records import Manifest, Record
from holdfast.core.retention import parse_keep
from holdfast.core.units import parse_size
from holdfast.errors import (
    DamagedObject,
    HoldfastError,
    ObjectNotFound,
    StateError,
    StoreUnavailable,
    UsageError,
)
from holdfast.manager.cutting import Cutting
from holdfast.manager.edits import split_metrics
from holdfast.manager.history import SaveEvent
from holdfast.repo import keys
from holdfast.repo.check import check_manifest, leaf_nbytes
from holdfast.repo.saves import Save
from holdfast.torch.dcp.naming import selector_of
from holdfast.torch.dcp.older import Staging
from holdfast.torch.dcp.runs import OpenRun, Terms, close_run, facts, open_run
from holdfast.torch.dcp.shares import Joined, Share, join
from holdfast.torch.dcp.writing import Asked, write_share


@dataclass
class _Begun:
    """A save of this process, which is the coordinator."""

    save: Save
    asked: Asked
    start_s: float


class StorageWriter(storage.StorageWriter, Staging):
    """Where `dcp.save` and `dcp.async_save` write: a checkpoint of the run at `address`.

    Make one for each save. `step` is the number of completed steps; DCP's `checkpoint_id=` stands
    for it, as `1000` or `"checkpoints/step-1000"`; any other name becomes a tag. `keep`,
    `metrics`, `tags`, `note`, `finished`, `compress`, `sparse_rows`, `rewrite_every`, `config` and
    `take_over` are as for `CheckpointManager`.

    Nothing is visible before all ranks have written their shares durably and the coordinator has
    committed; then `dcp.save` returns. Where a rank fails, it raises `CheckpointException` on all
    of them, with what happened in its `failures`, and earlier checkpoints are as they were. The
    coordinator's process holds the run until it ends or calls `close`.

    Values that are no tensors are stored as nodes, not as pickles: UnsupportedValue for others,
    unless `allow_pickle=True`.

        dcp.save(state, storage_writer=StorageWriter("runs/a", step=10, metrics={"loss": 0.5}))
    """

    def __init__(
        self,
        address: str | os.PathLike[str],
        *,
        step: int | None = None,
        keep: str | None = "last=3",
        metrics: Mapping[str, float] | None = None,
        tags: Iterable[str] = (),
        note: str = "",
        finished: bool = False,
        config: object = None,
        allow_pickle: bool = False,
        take_over: bool = False,
        compress: str | None = None,
        sparse_rows: Collection[str] = (),
        rewrite_every: int | None = None,
        memory: int | str = "256MiB",
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__()
        self.address = os.fspath(address)
        self.step = step
        finite, odd = split_metrics(metrics or {})
        names = tuple(validate_tag(tag) for tag in tags)
        self._terms = Terms(str(parse_keep(keep)), finite, odd, names, note, finished)
        self._config = config
        self._allow_pickle = allow_pickle
        self._take_over = take_over
        self._codec = codec_of(compress)
        Cutting(sparse_rows)  # raises for what are no names
        self._sparse_rows = tuple(sparse_rows)
        self._rewrite_every = rewrite_every
        self._memory = parse_size(memory) if isinstance(memory, str) else memory
        self._clock = clock
        self._name = ""
        """The tag that the call has given."""
        self._begun: _Begun | None = None

    def __getstate__(self) -> dict[str, Any]:
        # `async_save` in a process of its own sends it there, before anything was begun.
        return {**self.__dict__, "_begun": None}

    def close(self) -> None:
        """Give the run up, which other processes may write then. Saves of it must have ended."""
        close_run(self.address)

    # -- DCP's protocol ----------------------------------------------------------

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A new save: of the step that `checkpoint_id` names, or with it as a tag."""
        if checkpoint_id is None:
            return
        selector = selector_of(checkpoint_id)
        self._name = ""
        if isinstance(selector, AtStep):
            self.step = selector.step
            return
        self._name = validate_tag(selector.name if isinstance(selector, Named) else str(selector))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it names a step, or can be a tag."""
        try:
            selector = selector_of(checkpoint_id)
            return isinstance(selector, AtStep) or bool(validate_tag(str(selector)))
        except UsageError:
            return False

    @property
    def checkpoint_id(self) -> str:
        return self.address if self.step is None else f"{self.address}@{self.step}"

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta(checkpoint_id=self.checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        alone = not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1
        if not kwargs.get("use_collectives", True) and not alone:
            raise UsageError(
                "Holdfast commits what all ranks have written, and use_collectives=False lets "
                "each of them commit for itself",
                hint="Leave use_collectives out.",
            )
        if not is_coordinator:
            return
        step = self.step
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise UsageError(
                f"step must be a whole number of completed steps, not {step!r}",
                hint="StorageWriter(address, step=1000), or dcp.save(…, checkpoint_id=1000).",
            )
        self._run().writer(take_over=self._take_over)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        if not all(getattr(plan, "usable", True) for plan in plans):
            raise UsageError(
                "the planner has cached its plans, and each save must tell its ranks the names of "
                "their packs",
                hint="Use DefaultSavePlanner(enable_plan_caching=False), the default.",
            )
        start = time.perf_counter()
        run = self._run()
        writer = run.writer(take_over=self._take_over)
        save = run.begin(self, take_over=self._take_over)
        try:
            base = run.base()
        except HoldfastError:
            base = None  # damage of the list, which was told and costs only space
        asked = Asked(
            run=writer.run,
            epoch=writer.epoch,
            nonce=save.nonce,
            ordinal=save.ordinal,
            base=b"" if base is None else msgspec.json.encode(base),
            time_s=self._clock(),
        )
        self._begun = _Begun(save, asked, start)
        return [
            replace(plan, storage_data=replace(asked, rank=rank)) for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        asked = plan.storage_data
        if not isinstance(asked, Asked):
            raise UsageError(
                f"the planner {type(planner).__name__} has lost the plan's storage_data",
                hint="Its finish_plan must return the plan that it was given, changed or not.",
            )
        run = self._run()
        run.prepare()
        try:
            with run.packing:
                share = write_share(
                    run,
                    asked,
                    plan,
                    planner,
                    allow_pickle=self._allow_pickle,
                    codec=self._codec,
                    cutting=Cutting(self._sparse_rows),
                    rewrite_every=self._rewrite_every,
                    memory=self._memory,
                )
        except (DamagedObject, ObjectNotFound) as error:
            if name := keys.pack_of(error.key):
                run.distrusted.add(name)
            raise
        data: Any = msgspec.json.encode(share)
        results: list[WriteResult] = []
        for item in plan.items:
            about = item.tensor_data
            nbytes = prod(about.chunk.sizes) * about.properties.dtype.itemsize if about else 0
            results.append(WriteResult(item.index, nbytes, data))
            data = None  # all of the rank's share comes with its first item
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        begun, self._begun = self._begun, None
        if begun is None:
            raise StateError("finish was called without a save", hint="Call dcp.save.")
        run = self._run()
        shares = [
            msgspec.json.decode(result.storage_data, type=Share)
            for rank in results
            for result in rank
            if result.storage_data
        ]
        try:
            record = self._commit(run, begun, shares, len(results))
        except BaseException as error:
            message = error.message if isinstance(error, HoldfastError) else repr(error)
            run.failed(begun.save, error, self._event(begun, error=message))
            raise
        metadata.storage_data = None
        metadata.storage_meta = StorageMeta(checkpoint_id=f"{self.address}@{record.step}")

    # -- the commit --------------------------------------------------------------

    def _run(self) -> OpenRun:
        return open_run(self.address, self._clock)

    def _commit(self, run: OpenRun, begun: _Begun, shares: list[Share], world_size: int) -> Record:
        joined = join(shares)
        asked = begun.asked
        assert self.step is not None
        manifest = Manifest(
            run=asked.run,
            epoch=asked.epoch,
            nonce=asked.nonce,
            ordinal=asked.ordinal,
            step=self.step,
            time_s=asked.time_s,
            world_size=world_size,
            tree=joined.tree,
            runtime={"!": "dict", "v": [["rng", {"!": "dict", "v": []}], ["loop", None]]},
            leaves=joined.leaves,
            packs=joined.packs,
            pickled=joined.pickled,
            environment=facts(),
            config=self._config,
        )
        try:
            check_manifest(manifest, "the manifest")
        except DamagedObject as error:
            raise StateError(
                f"what the ranks have written is no checkpoint: {error.message}",
                hint="Does the planner give each element of a tensor to one rank?",
            ) from error
        for pack in joined.packs:
            if pack.born == asked.ordinal and not pack.run:
                begun.save.written[pack.name] = pack
        _check_arrived(run, joined, begun.save)
        new_nbytes = sum(share.new_nbytes for share in shares)

        def event(record: Record, commit_s: float) -> SaveEvent:
            return self._event(begun, record, commit_s, joined, new_nbytes)

        tags = (*self._terms.tags, self._name) if self._name else self._terms.tags
        return run.commit(begun.save, manifest, replace(self._terms, tags=tags), event)

    def _event(
        self,
        begun: _Begun,
        record: Record | None = None,
        commit_s: float = 0.0,
        joined: Joined | None = None,
        new_nbytes: int = 0,
        error: str = "",
    ) -> SaveEvent:
        took_s = time.perf_counter() - begun.start_s
        waited = threading.current_thread() is threading.main_thread()
        return SaveEvent(
            epoch=begun.asked.epoch,
            time_s=begun.asked.time_s,
            step=self.step or 0,
            id=record.id if record else "",
            error=error,
            note=self._terms.note,
            blocked=waited,
            result_s=took_s if waited else 0.0,
            commit_s=commit_s,
            total_s=took_s,
            nbytes=sum(map(leaf_nbytes, joined.leaves)) if joined else 0,
            new_nbytes=new_nbytes,
            written_nbytes=record.new_bytes if record else 0,
        )


def _check_arrived(run: OpenRun, joined: Joined, save: Save) -> None:
    """Raise StoreUnavailable unless this process sees what the others have written: a folder of
    one machine is no store for ranks on several."""
    others = [pack for pack in joined.packs if pack.name in save.written and _rank(pack.name)]
    sizes = run.repo.pack_sizes() if len(others) > 8 else None
    for pack in others:
        try:
            size = run.repo.pack_size(pack) if sizes is None else sizes.get(pack.name)
        except ObjectNotFound:
            size = None
        if size != pack.nbytes:
            raise StoreUnavailable(
                f"what rank {_rank(pack.name)} has written is not in {run.address}, as the "
                "coordinator sees it",
                hint="Give an address that all ranks share: a bucket, or a folder of a network "
                "file system.",
            )


def _rank(name: str) -> int:
    return int(name.split("-")[2])
