"""One rank's share of a save: from DCP's plan to packs."""

from __future__ import annotations

import io
import logging
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import msgspec
import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

from holdfast.core.adapters import LeafSource
from holdfast.core.encode import TreeEncoder
from holdfast.core.records import Leaf, Manifest, Record
from holdfast.core.types import Node
from holdfast.errors import HoldfastError, StateError, UnsupportedValue
from holdfast.manager.cutting import Cutting
from holdfast.manager.packer import Packer
from holdfast.manager.progress import Work
from holdfast.manager.snapshot import Snapshot, Way
from holdfast.manager.stored import Stored
from holdfast.repo.pack_writer import PackWriter
from holdfast.repo.saves import Save
from holdfast.torch.dcp.runs import OpenRun
from holdfast.torch.dcp.shares import Box, Part, Path, Share, Value, moved, own_part, text_of
from holdfast.torch.dtypes import NAMES, describe, name_of
from holdfast.torch.memory import source_of, stored_shape
from holdfast.torch.tensors import check_supported

logger = logging.getLogger("holdfast")

_T = TypeVar("_T")


@dataclass(frozen=True)
class Asked:
    """What the coordinator tells each rank, in its plan's `storage_data`."""

    run: str
    epoch: int
    nonce: str
    ordinal: int
    base: bytes
    """The record of the checkpoint whose chunks may be referred to; empty if there is none."""
    time_s: float
    rank: int = 0


@dataclass(frozen=True)
class _Item:
    """A tensor's part that is a leaf of this rank."""

    path: Path
    node: dict[str, Node]
    leaf: int
    shape: tuple[int, ...]
    start: tuple[int, ...]


class _Captured:
    """The plan's items as leaves."""

    def __init__(self, plan: SavePlan, planner: SavePlanner, *, allow_pickle: bool) -> None:
        self.encoder = TreeEncoder(allow_pickle=allow_pickle)
        self.parts: list[_Item] = []
        self.values: list[tuple[Path, Node]] = []
        found = plan.planner_data
        self._paths = cast("Mapping[str, Any]", found) if isinstance(found, Mapping) else {}
        self._planner = planner
        try:
            for item in plan.items:
                self._add(item)
        except BaseException:
            self.encoder.close()
            raise

    def _add(self, item: WriteItem) -> None:
        path = self._path(item.index.fqn)
        if item.type is WriteItemType.BYTE_IO:
            value = _value(item, self._planner, text_of(path))
            self.values.append((path, self.encoder.encode(value, text_of(path))))
            return
        data, about = self._planner.resolve_data(item), item.tensor_data
        assert isinstance(data, torch.Tensor)
        assert about is not None
        tensor = _checked(data.detach(), text_of(path))
        if tuple(tensor.shape) != tuple(about.chunk.sizes):
            raise StateError(
                f"{text_of(path)!r}: the plan says {list(about.chunk.sizes)}, and the planner has "
                f"given {describe(tensor)}"
            )
        leaf = self.encoder.leaf(source_of(tensor), text_of(path))
        extra = (0,) * (len(stored_shape(tensor.dtype, ())))
        self.parts.append(
            _Item(
                path=path,
                node={"!": "torch.tensor", "dtype": NAMES[tensor.dtype]},
                leaf=leaf,
                shape=stored_shape(tensor.dtype, tuple(about.size)),
                start=(*about.chunk.offsets, *extra),
            )
        )

    def _path(self, name: str) -> Path:
        path = self._paths.get(name)
        if isinstance(path, tuple) and path and isinstance(path[0], str):
            parts = cast("tuple[Any, ...]", path)
            if all(isinstance(part, str) or type(part) is int for part in parts):
                return parts
        return (name,)

    def base(self, manifest: Manifest) -> Manifest:
        """Of an earlier checkpoint, what this rank may refer to."""
        boxes: dict[str, list[Box]] = {}
        leaves = self.encoder.leaves
        for part in self.parts:
            box = part.start, leaves[part.leaf].source.shape
            boxes.setdefault(text_of(part.path), []).append(box)
        tensors = {part.leaf for part in self.parts}
        names = {leaf.path for n, leaf in enumerate(leaves) if n not in tensors}
        return own_part(manifest, boxes, names)


def write_share(
    run: OpenRun,
    asked: Asked,
    plan: SavePlan,
    planner: SavePlanner,
    *,
    allow_pickle: bool,
    codec: str,
    cutting: Cutting,
    rewrite_every: int | None,
    memory: int,
) -> Share:
    """Write all that the plan has. Returns when it is durable. Raises UnsupportedValue, StateError,
    DamagedObject, StoreError."""
    captured = _Captured(plan, planner, allow_pickle=allow_pickle)
    save = Save(asked.nonce, asked.ordinal)
    snapshot = _snapshot(run, captured.encoder)
    packer = None
    try:
        stored = None
        if (base := _base(run, asked)) is not None:
            oldest = max(0, asked.ordinal - rewrite_every) if rewrite_every else 0
            stored = Stored(captured.base(base), distrusted=run.distrusted, born_after=oldest)
        packer = Packer(
            PackWriter(run.repo, asked.epoch, asked.rank),
            save,
            stored,
            run.digests,
            run.staging(memory),
            low=lambda: False,
            work=Work(),
            cutting=cutting,
            codec=codec,
        )
        leaves, packs = _driven(packer.write(snapshot))
        packer.finish()
        new_nbytes = packer.packed_nbytes
    except BaseException:
        run.digests.forget()
        raise
    finally:
        if packer is not None:
            packer.close()
        snapshot.overlap.drain()
        snapshot.close()
        run.memories.give_back(snapshot.memory)
    run.digests.settle({})
    return _share(captured, leaves, packs, new_nbytes)


def _share(captured: _Captured, leaves: tuple[Leaf, ...], packs: Any, new_nbytes: int) -> Share:
    parts: list[Part] = []
    for part in captured.parts:
        leaf = msgspec.structs.replace(leaves[part.leaf], path=text_of(part.path))
        parts.append(Part(part.path, part.node, moved(leaf, part.shape, part.start)))
    tensors = {part.leaf for part in captured.parts}
    others = [number for number in range(len(leaves)) if number not in tensors]
    numbers = {number: index for index, number in enumerate(others)}
    return Share(
        parts=tuple(parts),
        values=tuple(Value(path, _numbered(node, numbers)) for path, node in captured.values),
        leaves=tuple(leaves[number] for number in others),
        packs=tuple(packs),
        pickled=captured.encoder.pickled,
        new_nbytes=new_nbytes,
    )


def _numbered(node: Any, numbers: Mapping[int, int]) -> Node:
    """`node` with its leaves numbered anew."""
    if isinstance(node, list):
        return [_numbered(item, numbers) for item in cast("list[Any]", node)]
    if not isinstance(node, dict):
        return node
    return {
        key: numbers[item] if key == "leaf" and type(item) is int else _numbered(item, numbers)
        for key, item in cast("dict[str, Any]", node).items()
    }


def _snapshot(run: OpenRun, encoder: TreeEncoder) -> Snapshot:
    """The caller waits for the save: what is large is read where it is."""

    def in_place(source: LeafSource, path: str) -> Way:
        return Way.LIVE

    try:
        memory = run.memories.take()
        leaves, overlap = memory.take(encoder.leaves, in_place)
    except BaseException:
        encoder.close()
        raise
    return Snapshot(0, 0.0, None, None, leaves, overlap, memory, {}, encoder.pickled)


def _base(run: OpenRun, asked: Asked) -> Manifest | None:
    if not asked.base:
        return None
    try:
        return run.manifest(msgspec.json.decode(asked.base, type=Record))
    except HoldfastError as error:
        logger.warning("nothing is reused from the newest checkpoint: %s", error)
        return None


def _driven(steps: Generator[None, None, _T]) -> _T:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def _checked(tensor: torch.Tensor, path: str) -> torch.Tensor:
    check_supported(tensor, path)
    if tensor.layout is not torch.strided:
        raise UnsupportedValue(
            path, f"a {describe(tensor)}", hint="Save its indices and values as two tensors."
        )
    if tensor.dtype not in NAMES:
        raise UnsupportedValue(
            path, f"tensor of dtype {name_of(tensor.dtype)}", hint="Convert it with .to(dtype)."
        )
    if tensor.is_conj() or tensor.is_neg():
        return tensor.resolve_conj().resolve_neg()
    return tensor


def _value(item: WriteItem, planner: SavePlanner, path: str) -> object:
    """What is no tensor. DCP's own planner would pickle it here, and is not asked to."""
    kind: Any = type(planner)
    own: Any = DefaultSavePlanner
    if (
        isinstance(planner, DefaultSavePlanner)
        and kind.resolve_data is own.resolve_data
        and kind.transform_object is own.transform_object
    ):
        return planner.lookup_object(item.index)
    data = planner.resolve_data(item)
    assert isinstance(data, io.BytesIO)
    data.seek(0)
    try:
        # Of this very process, a moment ago: what it ran then it may run again.
        return torch.load(data, weights_only=False)
    except Exception as error:
        raise UnsupportedValue(
            path,
            f"bytes of {kind.__module__}.{kind.__qualname__} that torch.save has not made",
            hint="Let the planner's resolve_data return what torch.save writes.",
        ) from error
