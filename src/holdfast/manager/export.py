"""Writing a checkpoint as plain files that need no Holdfast to be read."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import msgspec

from holdfast.core.address import some_of
from holdfast.core.packing import PackChunk, pack_header
from holdfast.core.plan import itemsize
from holdfast.core.records import Leaf, Manifest, Record
from holdfast.core.tree import Directory, File, TreeDecoder
from holdfast.core.types import Node
from holdfast.errors import DamagedObject, UsageError
from holdfast.manager.info import info_of
from holdfast.manager.nodes import file_nodes, leaf_indexes
from holdfast.manager.reader import ChunkReader, Wanted
from holdfast.manager.restore import fill
from holdfast.manager.scratch import check_target, write_file, write_whole
from holdfast.repo.check import leaf_nbytes
from holdfast.repo.repo import Repo

TENSORS = "state.safetensors"
VALUES = "state.json"
FILES = "files"
_NO_TENSORS = frozenset({"str", "bytes", "bytearray", "file"})
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")


def export(repo: Repo, record: Record, folder: Path, *, replace: bool = False) -> list[Path]:
    """Write `record`'s state to `folder`; the paths written.

    `state.safetensors` holds every tensor and array under its leaf path (one that is
    tied to another is there once), `state.json` the tree that says what belongs where,
    with metrics, config and environment; `files/` the tracked files. `folder` appears
    when all bytes were verified and are on disk. Raises UsageError if it has something
    in it, unless `replace`; DamagedObject, with nothing left behind.
    """
    check_target(folder, replace=replace)
    manifest = repo.manifest(record)
    ChunkReader(repo, record, manifest).check_packs(manifest.leaves)
    used = set(leaf_indexes(manifest.tree))
    files = list(file_nodes(manifest.tree))
    indexes = sorted(used.difference(*(leaf_indexes(node) for _, node in files)))
    if indexes and not 0 <= indexes[0] <= indexes[-1] < len(manifest.leaves):
        raise DamagedObject(
            f"manifests/{record.id}.json", "its tree names leaves that are not there"
        )
    leaves = [manifest.leaves[index] for index in indexes]
    described = {
        "checkpoint": msgspec.to_builtins(info_of(repo.address, record)),
        "config": manifest.config,
        "environment": manifest.environment,
        "tree": manifest.tree,
        "leaves": {str(index): manifest.leaves[index].path for index in indexes},
    }

    def write(scratch: Path) -> list[Path]:
        _write_tensors(repo, record, manifest, leaves, scratch / TENSORS)
        with open(scratch / VALUES, "xb") as out:
            out.write(msgspec.json.format(msgspec.json.encode(described), indent=1))
            out.flush()
            os.fsync(out.fileno())
        written = [scratch / TENSORS, scratch / VALUES]
        for path, node in files:
            written.append(_write_files(repo, record, manifest, path, node, scratch / FILES))
        return [folder / path.relative_to(scratch) for path in written]

    return write_whole(folder, write)


def export_tensors(
    repo: Repo, record: Record, file: Path, *, only: str = "", replace: bool = False
) -> list[str]:
    """Write `record`'s tensors and arrays as one `.safetensors` file; their names there.

    With `only` those below this path of the state, named by the rest of their path: as
    a module's own `state_dict` names them. The header says which checkpoint it is. Raises
    UsageError for a place that cannot take it, or where there is no tensor below `only`;
    DamagedObject, with nothing left behind.
    """
    manifest = repo.manifest(record)
    indexes = [i for i in tensor_indexes(manifest.tree) if 0 <= i < len(manifest.leaves)]
    leaves = [manifest.leaves[index] for index in indexes]
    if only:
        leaves = names_below(leaves, only)
    ChunkReader(repo, record, manifest).check_packs(leaves)
    info = info_of(repo.address, record)
    described = {"ref": info.ref, "id": info.id, "step": info.step, "metrics": record.metrics}
    # "format" is what Transformers asks for before it loads a file.
    metadata = {"format": "pt", "holdfast": msgspec.json.encode(described).decode()}

    def write(scratch: Path) -> None:
        _write_tensors(repo, record, manifest, leaves, scratch, metadata)

    write_file(file, write, replace=replace)
    return [leaf.path for leaf in leaves]


def names_below(leaves: Sequence[Leaf], only: str) -> list[Leaf]:
    """Those below this path, named by the rest of theirs. Raises UsageError if there is none."""
    below = f"{only.rstrip('/')}/"
    found = [
        msgspec.structs.replace(leaf, path=leaf.path.removeprefix(below))
        for leaf in leaves
        if leaf.path.startswith(below)
    ]
    if not found:
        names = sorted({leaf.path.partition("/")[0] for leaf in leaves})
        raise UsageError(
            f"the checkpoint has no tensor below {only!r}",
            hint=f"It has tensors below {some_of(names)}." if names else "It has no tensor at all.",
        )
    return found


def tensor_indexes(tree: Node) -> list[int]:
    """The leaves of a tree that are neither texts nor files, each once, in its order."""
    # Checked for depth, and for nodes that are none.
    every = list(dict.fromkeys(leaf_indexes(tree)))
    others: set[int] = set()
    waiting: list[Node] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            tagged = cast(dict[str, Node], node)
            if tagged.get("!") in _NO_TENSORS and isinstance(tagged.get("leaf"), int):
                others.add(tagged["leaf"])
            waiting.extend(tagged.values())
        elif isinstance(node, list):
            waiting.extend(cast(list[Node], node))
    return [index for index in every if index not in others]


def _write_files(
    repo: Repo,
    record: Record,
    manifest: Manifest,
    path: tuple[str, ...],
    node: Node,
    folder: Path,
) -> Path:
    # Keys are anything that a user wrote: only letters that are safe in a name stay.
    target = folder / (_UNSAFE.sub("_", ".".join(path)).lstrip(".") or "file")
    while target.exists():
        target = target.with_name(target.name + "_")
    folder.mkdir(exist_ok=True)
    decoder = TreeDecoder(manifest.leaves)
    try:
        kind = Directory if cast(dict[str, Node], node).get("!") == "dir" else File
        decoder.decode(node, kind(target), "/".join(path))
        decoder.report()
        fill(repo, record, manifest, decoder)
    except BaseException:
        decoder.discard()
        raise
    return target


def _write_tensors(
    repo: Repo,
    record: Record,
    manifest: Manifest,
    leaves: list[Leaf],
    path: Path,
    metadata: Mapping[str, str] = {},
) -> None:
    header, offsets = pack_header(
        [PackChunk(leaf.path, leaf.dtype, leaf.shape, leaf_nbytes(leaf)) for leaf in leaves],
        metadata,
    )
    with open(path, "xb") as out:
        out.write(header)
        out.flush()
        wanted = [
            Wanted(leaf, chunk, _Place(out.fileno(), offset, leaf).write)
            for leaf, offset in zip(leaves, offsets, strict=True)
            for chunk in leaf.chunks
        ]
        ChunkReader(repo, record, manifest).read(wanted)
        os.fsync(out.fileno())


class _Place:
    """A leaf goes into a file that is open already, from a byte on; see
    `adapters.Destination`."""

    def __init__(self, fd: int, offset: int, leaf: Leaf) -> None:
        self._fd = fd
        self._offset = offset
        self._leaf = leaf

    def write(self, start: Sequence[int], shape: Sequence[int], data: memoryview) -> None:
        flat = 0
        for begin, whole in zip(start, self._leaf.shape, strict=True):
            flat = flat * whole + begin
        at = self._offset + flat * itemsize(self._leaf.dtype)
        while data:
            done = os.pwrite(self._fd, data, at)
            data, at = data[done:], at + done
