"""Loads: DCP plans which boxes each rank needs, the chunks in them are read and verified."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple, cast

import torch
from torch import distributed
from torch.distributed.checkpoint import storage
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from holdfast.core.adapters import NOTHING
from holdfast.core.address import Latest, Selector, parse_selector, split_reference
from holdfast.core.group import ALONE, Ranks
from holdfast.core.records import Chunk, Leaf, Manifest, Record
from holdfast.core.tree import TreeDecoder, settle
from holdfast.errors import DamagedObject, GroupError, PickleRefused, StateError, UsageError
from holdfast.manager.lookup import Lookup
from holdfast.manager.reader import ChunkReader, Wanted
from holdfast.repo.nearest import NearestRepo
from holdfast.repo.repo import Repo
from holdfast.stores.open import open_store
from holdfast.torch.dcp.naming import Named, named, selector_of
from holdfast.torch.dcp.shares import text_of
from holdfast.torch.memory import stored_shape
from holdfast.torch.tensors import Saved, read_node

Numbers = tuple[int, ...]


class StorageReader(storage.StorageReader):
    """Where `dcp.load` reads: the checkpoint that `reference` names, as `runs/a@latest`.

    `checkpoint_id=` in the call, if there is one, says which of the run instead: a step, also as
    `"checkpoints/step-1000"`, or what can follow an `@`. Any checkpoint of Holdfast can be read,
    also one that a `Run` wrote: names are those that DCP would give to what was saved.

    Each rank reads the chunks that reach into what it needs, and each is compared with its digest
    before it is used: DamagedObject names what is not right; with `mirror`, the address of a copy
    of the run (`holdfast sync`), it is read from there. Nothing is unpickled but what was saved
    with `allow_pickle=True`, and only if it is said here, too; else PickleRefused. Errors come as
    DCP's `CheckpointException`, on all ranks.

        dcp.load(state, storage_reader=StorageReader("runs/a@best:loss"))
    """

    def __init__(
        self,
        reference: str | os.PathLike[str],
        *,
        allow_pickle: bool = False,
        mirror: str | os.PathLike[str] = "",
    ) -> None:
        super().__init__()
        self.address, words = split_reference(os.fspath(reference))
        self._selector: Selector = Latest() if words is None else parse_selector(words)
        self._allow_pickle = allow_pickle
        self._mirror = os.fspath(mirror)
        self._opened: _Opened | None = None

    # -- DCP's protocol ----------------------------------------------------------

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A new load, of the checkpoint that `checkpoint_id` names."""
        self._close()
        if checkpoint_id is not None:
            self._selector = selector_of(checkpoint_id)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it can name a checkpoint."""
        try:
            selector_of(checkpoint_id)
        except UsageError:
            return False
        return True

    @property
    def checkpoint_id(self) -> str:
        return f"{self.address}@{self._selector}"

    # No parameter is called "kwargs": DCP would take a rank whose store failed for one with
    # metadata of its own, and not let it take part any more, while the others wait for it.
    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        """What the checkpoint has, read anew."""
        self._close()
        opened = self._opened = _Opened(self.address, self._selector, self._mirror)
        entries = opened.entries
        return Metadata(
            state_dict_metadata={name: entry.metadata for name, entry in entries.items()},
            planner_data={name: entry.named.path for name, entry in entries.items()},
            storage_meta=StorageMeta(checkpoint_id=f"{self.address}@{opened.record.step}"),
        )

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **options: Any
    ) -> None:
        return

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        plan.storage_data = self._need().record.id
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        if len({plan.storage_data for plan in plans}) > 1:
            raise GroupError(
                f"the ranks have found different checkpoints at {self.checkpoint_id}",
                hint="One was saved or removed meanwhile: load again, or name a step.",
            )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        _Load(self._need(), planner, allow_pickle=self._allow_pickle).run(plan.items)
        self._close()
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _need(self) -> _Opened:
        if self._opened is None:
            raise StateError("read_metadata was not called", hint="Call dcp.load.")
        return self._opened

    def _close(self) -> None:
        if self._opened is not None:
            self._opened.close()
            self._opened = None


class _Source(Lookup):
    """A run whose checkpoints are read; what is damaged, from a copy of it."""

    _copy: NearestRepo | None = None

    def found(self, selector: Selector, mirror: str) -> tuple[Repo, Record]:
        record = self._select(selector)
        if not mirror:
            return self._repo, record
        self._copy = NearestRepo(self._repo.store, lambda: open_store(mirror), lambda key: None)
        return self._copy, record

    def close(self) -> None:
        super().close()
        if self._copy is not None:
            self._copy.close_copy()


@dataclass(frozen=True)
class _Entry:
    named: Named
    metadata: TensorStorageMetadata | BytesStorageMetadata
    saved: Saved | None = None
    """Of a tensor."""


class _Opened:
    """A checkpoint that is being loaded."""

    def __init__(self, address: str, selector: Selector, mirror: str) -> None:
        self._source = _Source(address)
        try:
            self.repo, self.record = self._source.found(selector, mirror)
            self.manifest: Manifest = self.repo.manifest(self.record)
            decoder = TreeDecoder(self.manifest.leaves)
            self.entries = {one.name: _entry(one, decoder) for one in named(self.manifest.tree)}
        except BaseException:
            self.close()
            raise

    @property
    def reader(self) -> ChunkReader:
        return ChunkReader(self.repo, self.record, self.manifest, _ranks())

    def close(self) -> None:
        self._source.close()


def _entry(one: Named, decoder: TreeDecoder) -> _Entry:
    if not one.is_tensor:
        return _Entry(one, BytesStorageMetadata())
    saved = read_node(cast("dict[str, Any]", one.node), text_of(one.path), decoder)
    size = torch.Size(saved.shape)
    # One chunk, whatever there is: which of the stored ones are needed is found out here.
    whole = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
    about = TensorStorageMetadata(TensorProperties(dtype=saved.dtype), size, [whole])
    return _Entry(one, about, saved)


def _ranks() -> Ranks:
    if not (distributed.is_available() and distributed.is_initialized()):
        return ALONE
    return Ranks(distributed.get_rank(), distributed.get_world_size())


class _Piece(NamedTuple):
    """A box of a tensor, and where it goes."""

    start: Numbers
    shape: Numbers
    target: torch.Tensor


@dataclass
class _Load:
    """What one rank reads."""

    opened: _Opened
    planner: LoadPlanner
    allow_pickle: bool
    _commits: list[Callable[[], None]] = field(default_factory=list[Callable[[], None]])

    def run(self, items: Sequence[ReadItem]) -> None:
        pieces: dict[Saved, list[_Piece]] = {}
        views: list[tuple[_Entry, _Piece]] = []
        for item in items:
            entry = self.opened.entries[item.storage_index.fqn]
            if item.type is LoadItemType.BYTE_IO:
                continue
            assert entry.saved is not None
            piece = self._piece(item, entry)
            if entry.saved.view is None:
                pieces.setdefault(entry.saved, []).append(piece)
            else:
                views.append((entry, piece))
        leaves = self.opened.manifest.leaves
        reader = self.opened.reader
        wanted = [
            one
            for saved, found in pieces.items()
            for one in _wanted(leaves[saved.leaf], saved, found)
        ]
        reader.check_packs([Leaf("", "U8", (), (one.chunk,)) for one in wanted])
        reader.read(wanted)
        for entry, piece in views:  # tensors that shared memory: a few, and mostly small ones
            whole = cast(torch.Tensor, self._value(entry))
            piece.target.copy_(whole[_slices(piece.start, piece.shape)])
        for commit in self._commits:
            commit()
        for item in items:
            if item.type is LoadItemType.BYTE_IO:
                self._load_bytes(item)

    def _piece(self, item: ReadItem, entry: _Entry) -> _Piece:
        planned = self.planner.resolve_tensor(item)
        target = planned.detach()
        shape = tuple(item.lengths)
        if tuple(target.shape) != shape:
            raise StateError(
                f"{text_of(entry.named.path)!r}: the plan asks for {list(shape)}, and the planner "
                f"gives a tensor of {list(target.shape)}"
            )
        if target.device.type == "cuda":
            # It is written from other threads, and so on other streams than the one on which
            # its memory may still be in use.
            torch.cuda.synchronize(target.device)
        self._commits.append(lambda: self.planner.commit_tensor(item, planned))
        return _Piece(tuple(item.storage_offsets), shape, target)

    def _load_bytes(self, item: ReadItem) -> None:
        """DCP's planner unpickles what it is given: here, what this process has just pickled."""
        value = self._value(self.opened.entries[item.storage_index.fqn])
        data = io.BytesIO()
        torch.save(value, data)
        data.seek(0)
        self.planner.load_bytes(item, data)

    def _value(self, entry: _Entry) -> object:
        manifest, path = self.opened.manifest, text_of(entry.named.path)
        if manifest.pickled and not self.allow_pickle and _has_pickle(entry.named.node):
            raise PickleRefused(
                f"{path!r} of {self.opened.repo.address}@{self.opened.record.step} is pickled, "
                "which runs code when it is loaded",
                hint="If you trust whoever wrote it, StorageReader(…, allow_pickle=True).",
            )
        reader = self.opened.reader
        decoder = TreeDecoder(
            manifest.leaves,
            allow_pickle=self.allow_pickle,
            fetch=reader.fetch,
            scope=manifest.tree,
        )
        value = decoder.decode(entry.named.node, NOTHING, path)
        reader.fetch(decoder.requests)
        decoder.run()
        return settle(value)


def _has_pickle(node: Any) -> bool:
    if isinstance(node, list):
        return any(map(_has_pickle, cast("list[Any]", node)))
    if not isinstance(node, dict):
        return False
    tagged = cast("dict[str, Any]", node)
    return tagged.get("!") == "pickle" or any(map(_has_pickle, tagged.values()))


def _wanted(leaf: Leaf, saved: Saved, pieces: Sequence[_Piece]) -> list[Wanted]:
    """The chunks that reach into any of `pieces`."""
    extra = len(stored_shape(saved.dtype, ()))

    def write(start: Sequence[int], shape: Sequence[int], data: memoryview) -> None:
        cut = len(shape) - extra
        if prod(shape[cut:]) != prod(leaf.shape[cut:]):
            raise DamagedObject("the manifest", "a chunk has parts of items", leaf=leaf.path)
        box = _items(data, saved.dtype).view(tuple(shape[:cut]))
        for piece in pieces:
            common = _common(tuple(start[:cut]), tuple(shape[:cut]), piece.start, piece.shape)
            if common is None:
                continue
            first, extent = common
            inside = [a - b for a, b in zip(first, start[:cut], strict=True)]
            there = [a - b for a, b in zip(first, piece.start, strict=True)]
            with torch.no_grad():
                piece.target[_slices(there, extent)].copy_(box[_slices(inside, extent)])

    # A part of it may be this rank's alone; the whole is what others load, too.
    shared = _ranks().size > 1 and any(piece.shape == tuple(saved.shape) for piece in pieces)
    return [Wanted(leaf, c, write, shared) for c in leaf.chunks if _reaches(c, extra, pieces)]


def _reaches(chunk: Chunk, extra: int, pieces: Sequence[_Piece]) -> bool:
    cut = len(chunk.shape) - extra
    start, shape = chunk.start[:cut], chunk.shape[:cut]
    return any(_common(start, shape, piece.start, piece.shape) is not None for piece in pieces)


def _items(data: memoryview, dtype: torch.dtype) -> torch.Tensor:
    """Verified bytes as items, which must not be kept. In memory of their own where they are not
    at a multiple of their size."""
    raw = torch.frombuffer(data, dtype=torch.uint8)
    if raw.data_ptr() % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype)


def _common(start: Numbers, shape: Numbers, other: Numbers, extent: Numbers) -> Any:
    """(start, shape) of what two boxes have in common; None if that is nothing."""
    first = tuple(map(max, start, other))
    ends = (min(a + m, b + n) for a, m, b, n in zip(start, shape, other, extent, strict=True))
    common = tuple(end - begin for end, begin in zip(ends, first, strict=True))
    return (first, common) if all(size > 0 for size in common) else None


def _slices(start: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))
