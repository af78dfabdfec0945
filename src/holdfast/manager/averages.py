"""The mean of checkpoints: a new checkpoint, or a file of tensors."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from holdfast.core.averaging import check_weights
from holdfast.core.encode import CapturedLeaf
from holdfast.core.leaves import check_leaf
from holdfast.core.packing import PackChunk, pack_header
from holdfast.core.plan import boxes, itemsize
from holdfast.core.records import Leaf
from holdfast.core.selection import make_selection
from holdfast.core.types import Node
from holdfast.errors import DamagedObject, UsageError, briefly
from holdfast.manager.blocks import Blocks
from holdfast.manager.export import names_below, tensor_indexes
from holdfast.manager.info import CheckpointInfo
from holdfast.manager.manager import CheckpointManager
from holdfast.manager.members import Member, References, members
from holdfast.manager.mixing import (
    Part,
    Plan,
    Side,
    check_references,
    plan_of,
    renumbered,
    side_of,
    used_leaves,
)
from holdfast.manager.nodes import mapping_pairs
from holdfast.manager.progress import current_work
from holdfast.manager.scratch import write_file
from holdfast.manager.snapshot import Snapshot, SnapshotMemory, Way
from holdfast.repo.check import leaf_nbytes
from holdfast.stores.addresses import real_address


@dataclass(frozen=True)
class Average:
    """What `average` has made."""

    of: tuple[CheckpointInfo, ...]
    """The last one's values stand where there is no mean."""
    weights: tuple[float, ...]
    averaged: tuple[str, ...]
    """Paths of the tensors and arrays of which the mean was taken."""
    differing: tuple[str, ...]
    """Paths of what is not the same in all and has no mean: whole numbers, texts, files, plain
    values. They are as in the last one."""
    info: CheckpointInfo | None
    """The new checkpoint."""
    file: Path | None


@briefly
def average(
    checkpoints: References,
    to: str | os.PathLike[str] | None = None,
    *,
    export: str | os.PathLike[str] | None = None,
    weights: Sequence[float] | None = None,
    only: str | Collection[str] = (),
    replace: bool = False,
) -> Average:
    """Average checkpoints into a new one in the run at `to`, or into the safetensors file `export`.

    `checkpoints` are references: `"runs/x@last=5"`, `"runs/x@best=3:val_loss"`, or a list, also
    of several runs. Of each floating-point (and complex) tensor and array below the names `only`
    (all, by default) the mean is taken, weighted if there are `weights`, one for each. Sums are
    64-bit floats, and the mean is rounded once. Everything else is as in the last checkpoint,
    whole numbers and plain values too; `Average.differing` names those that are not the same in
    all. Running statistics of BatchNorm are averaged like weights, and do not fit them: compute
    them anew (docs/evaluation.md).

    The new checkpoint has the last one's step, and without `only` its place in the loops and
    random states: a Run at `to` goes on from there. It has no metrics. A file holds what
    `export_tensors` writes; with one name in `only` its tensors are named below that, and
    `replace` lets it replace another. Every byte is verified; a few blocks of the tensors are in
    memory at a time. Returns when all is on disk; an error leaves no checkpoint and no
    file.

    Raises StructureMismatch naming the first tensor that is not in all checkpoints with one shape
    and dtype; StateError for one that cannot be averaged (8-bit floats); UsageError for
    fewer than two checkpoints, wrong weights, or a `to` that is one of the runs;
    DamagedObject; NoStore, CheckpointNotFound; RunHeld if a process writes `to`.

    >>> import holdfast, numpy as np
    >>> with holdfast.CheckpointManager("memory://averaged") as ckpts:
    ...     for step in (1, 2, 3):
    ...         _ = ckpts.save(step, {"w": np.array([step, 10.0 * step])}).result()
    >>> done = holdfast.average("memory://averaged@last=2", "memory://mean")
    >>> done.averaged, holdfast.open("memory://mean")["w"]
    (('w',), array([ 2.5, 25. ]))
    """
    if (to is None) == (export is None):
        raise UsageError(
            "an average goes into a run or into a file",
            hint='average("runs/x@last=5", "runs/x-avg") or average(…, export="avg.safetensors").',
        )
    names = (only,) if isinstance(only, str) and only else tuple(only)
    with members(checkpoints) as found:
        if len(found) < 2:
            raise UsageError(
                f"an average needs two checkpoints, and this is {found[0].ref}",
                hint=f"Name several: {found[0].info.address}@last=5, or more references.",
            )
        try:
            numbers = check_weights(weights, len(found))
        except ValueError as error:
            refs = ", ".join(member.ref for member in found)
            raise UsageError(str(error), hint=f"One for each of {refs}.") from None
        for member in found:
            if to is not None and real_address(os.fspath(to)) == real_address(member.info.address):
                raise UsageError(
                    f"{os.fspath(to)} is one of the runs: its job would go on from the average",
                    hint="Name another address: the average is the first checkpoint there.",
                )
        mean = _Mean.of(found, numbers, names)
        info = None if to is None else mean.save(os.fspath(to))
        file = None if export is None else mean.export(Path(export), names, replace=replace)
        return Average(
            of=tuple(member.info for member in found),
            weights=tuple(numbers),
            averaged=tuple(mean.plan.averaged),
            differing=tuple(mean.plan.differing),
            info=info,
            file=file,
        )


@dataclass
class _Mean:
    """Of some checkpoints, before anything was read."""

    found: Sequence[Member]
    weights: Sequence[float]
    sides: Sequence[Side]
    plan: Plan
    whole: bool
    """Nothing of the checkpoints is left out."""

    @classmethod
    def of(cls, found: Sequence[Member], weights: Sequence[float], only: Sequence[str]) -> _Mean:
        selection = make_selection(only, (), {})
        sides: list[Side] = []
        for member in found:
            manifest, reader = member.manager.reader_of(member.info.id)
            try:
                sides.append(side_of(member.ref, manifest, reader, selection))
            except UsageError as error:
                error.message = f"{member.ref}: {error.message}"
                raise
        plan = plan_of(sides)
        if not plan.averaged:
            raise UsageError(
                f"there is no floating-point tensor in {found[-1].ref}"
                + (f" below {', '.join(only)}" if only else ""),
                hint="There is nothing to average.",
            )
        return cls(found, weights, sides, plan, not only)

    def blocks(self, leaves: Sequence[Leaf]) -> Blocks:
        """The bytes of these leaves of the last one, averaged where that is to be."""
        parts = [self.plan.parts.get(leaf.path) or Part(leaf, None, (leaf,)) for leaf in leaves]
        for number, side in enumerate(self.sides):
            last = number == len(self.sides) - 1
            needed = [
                part.of[-1] if last else part.of[number]
                for part in parts
                if last or part.format is not None
            ]
            side.reader.check_packs(needed)
        blocks = Blocks(parts, self.sides, self.weights)
        current_work().begin(blocks.nbytes_to_read)
        return blocks

    def described(self) -> dict[str, Any]:
        infos = [member.info for member in self.found]
        return {
            "of": [info.ref for info in infos],
            "ids": [info.id for info in infos],
            "weights": list(self.weights),
        }

    # -- a checkpoint ----------------------------------------------------------

    def save(self, address: str) -> CheckpointInfo:
        last = self.sides[-1]
        manifest, tree = last.manifest, last.tree
        runtime = manifest.runtime if self.whole else _without_loop(manifest.runtime)
        check_references(tree)
        indexes = used_leaves(tree, runtime)
        if indexes and not 0 <= indexes[0] <= indexes[-1] < len(manifest.leaves):
            raise DamagedObject(
                f"manifests/{self.found[-1].info.id}.json",
                "its tree names leaves that are not there",
            )
        leaves = [manifest.leaves[index] for index in indexes]
        for leaf in leaves:
            check_leaf(leaf)
        numbers = {index: number for number, index in enumerate(indexes)}
        blocks = self.blocks(leaves)
        memory = SnapshotMemory()
        held, overlap = memory.take(
            [
                CapturedLeaf(leaf.path, _Source(blocks, number, leaf))
                for number, leaf in enumerate(leaves)
            ],
            lambda source, path: Way.COPIED,
        )
        snapshot = Snapshot(
            step=manifest.step,
            time_s=time.time(),
            tree=renumbered(tree, numbers),
            runtime=renumbered(runtime, numbers),
            leaves=held,
            overlap=overlap,
            memory=memory,
            marks={},
            pickled=manifest.pickled,
        )
        with CheckpointManager(address, keep=None) as manager:
            return manager.save_snapshot(
                snapshot,
                note=f"average of {len(self.found)}",
                config=manifest.config,
                environment={**manifest.environment, "average": self.described()},
            )

    # -- a file ----------------------------------------------------------------

    def export(self, file: Path, only: Sequence[str], *, replace: bool) -> Path:
        last = self.sides[-1]
        every = last.manifest.leaves
        leaves = [every[i] for i in tensor_indexes(last.tree) if 0 <= i < len(every)]
        named = leaves
        if len(only) == 1:
            named = names_below(leaves, only[0])
            leaves = [leaf for leaf in leaves if leaf.path.startswith(f"{only[0].rstrip('/')}/")]
        blocks = self.blocks(leaves)
        described = {"average": self.described(), "step": last.manifest.step}
        metadata = {"format": "pt", "holdfast": msgspec.json.encode(described).decode()}

        def write(scratch: Path) -> None:
            header, _ = pack_header(
                [PackChunk(leaf.path, leaf.dtype, leaf.shape, leaf_nbytes(leaf)) for leaf in named],
                metadata,
            )
            with open(scratch, "xb") as out:
                out.write(header)
                for position, leaf in enumerate(leaves):
                    for _, _, offset, nbytes in boxes(leaf.shape, itemsize(leaf.dtype)):
                        data = memoryview(bytearray(nbytes))
                        blocks.read(position, offset, data)
                        out.write(data)
                out.flush()
                os.fsync(out.fileno())

        write_file(file, write, replace=replace)
        return file


class _Source:
    """A leaf of the mean; see `adapters.LeafSource`."""

    streamed = True

    def __init__(self, blocks: Blocks, position: int, leaf: Leaf) -> None:
        self._blocks = blocks
        self._position = position
        self.dtype = leaf.dtype
        self.shape = leaf.shape
        self.nbytes = leaf_nbytes(leaf)

    def copy_range(self, offset: int, into: memoryview) -> None:
        self._blocks.read(self._position, offset, into)

    def mark(self) -> object:
        return None

    def close(self) -> None:
        """Nothing is held for it alone."""


def _without_loop(runtime: Node) -> Node:
    """A part of a state is none that a loop could go on with."""
    pairs: list[Node] = [
        [key, None if key == "loop" else node] for key, node in mapping_pairs(runtime) or []
    ]
    return {"!": "dict", "v": pairs}
