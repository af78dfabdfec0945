"""Writing a checkpoint as plain files that need no Holdfast to be read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import msgspec

from holdfast.core.address import some_of
from holdfast.core.leaves import check_leaf
from holdfast.core.records import Leaf, Manifest, Record
from holdfast.core.tree import Directory, File, TreeDecoder
from holdfast.core.types import Node
from holdfast.errors import DamagedObject, UsageError
from holdfast.manager.info import info_of
from holdfast.manager.nodes import file_nodes, leaf_indexes
from holdfast.manager.reader import ChunkReader
from holdfast.manager.restore import fill
from holdfast.manager.scratch import check_target, write_file, write_whole
from holdfast.manager.tensors import (
    Stored,
    check_no_others,
    every_tensor,
    names_of,
    shards,
    write_bytes,
    write_shards,
    write_tensors,
)
from holdfast.repo.repo import Repo

TENSORS = "state.safetensors"
VALUES = "state.json"
FILES = "files"
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
    tensors = [
        Stored(manifest.leaves[index].path, index, *check_leaf(manifest.leaves[index]))
        for index in indexes
    ]
    described = {
        "checkpoint": msgspec.to_builtins(info_of(repo.address, record)),
        "config": manifest.config,
        "environment": manifest.environment,
        "tree": manifest.tree,
        "leaves": {str(index): manifest.leaves[index].path for index in indexes},
    }

    def write(scratch: Path) -> list[Path]:
        write_tensors(repo, record, manifest, tensors, scratch / TENSORS)
        write_bytes(scratch / VALUES, msgspec.json.format(msgspec.json.encode(described), indent=1))
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
    tensors = chosen(manifest, only)
    check_packs(repo, record, manifest, tensors)
    metadata = metadata_of(repo, record)

    def write(scratch: Path) -> None:
        write_tensors(repo, record, manifest, tensors, scratch, metadata)

    write_file(file, write, replace=replace)
    return [one.name for one in tensors]


def export_shards(
    repo: Repo,
    record: Record,
    folder: Path,
    most_bytes: int,
    *,
    only: str = "",
    replace: bool = False,
) -> tuple[list[Path], list[str]]:
    """As `export_tensors`, into files of at most `most_bytes`: (paths, names of tensors).

    `model.safetensors`, or `model-00001-of-00003.safetensors` and so on with
    `model.safetensors.index.json`, which says what is where, as Transformers writes it.
    """
    check_target(folder, replace=replace)
    manifest = repo.manifest(record)
    tensors = chosen(manifest, only)
    check_packs(repo, record, manifest, tensors)
    parts = shards(tensors, most_bytes)
    check_no_others(folder, names_of("model", len(parts)))
    metadata = metadata_of(repo, record)

    def write(scratch: Path) -> list[Path]:
        return write_shards(repo, record, manifest, parts, scratch, "model", metadata)

    written = write_whole(folder, write)
    return [folder / path.name for path in written], [one.name for one in tensors]


def check_packs(repo: Repo, record: Record, manifest: Manifest, tensors: Sequence[Stored]) -> None:
    """Before anything is written. Raises DamagedObject, CheckpointRemoved."""
    ChunkReader(repo, record, manifest).check_packs(manifest.leaves[x.index] for x in tensors)


def chosen(manifest: Manifest, only: str) -> list[Stored]:
    """The tensors below `only`, by the rest of their path. Raises UsageError for none."""
    tensors = every_tensor(manifest)
    if not only:
        return tensors
    return [tensors[i]._replace(name=name) for i, name in _below([x.name for x in tensors], only)]


def names_below(leaves: Sequence[Leaf], only: str) -> list[Leaf]:
    """Those below this path, named by the rest of theirs. Raises UsageError if there is none."""
    found = _below([leaf.path for leaf in leaves], only)
    return [msgspec.structs.replace(leaves[i], path=name) for i, name in found]


def _below(paths: Sequence[str], only: str) -> list[tuple[int, str]]:
    """(position, the rest of the path) of those below `only`."""
    start = f"{only.rstrip('/')}/"
    found = [(i, path[len(start) :]) for i, path in enumerate(paths) if path.startswith(start)]
    if not found:
        names = sorted({path.partition("/")[0] for path in paths})
        raise UsageError(
            f"the checkpoint has no tensor below {only!r}",
            hint=f"It has tensors below {some_of(names)}." if names else "It has no tensor at all.",
        )
    return found


def metadata_of(repo: Repo, record: Record) -> dict[str, str]:
    """What the header of a file says of where it is from."""
    info = info_of(repo.address, record)
    described = {"ref": info.ref, "id": info.id, "step": info.step, "metrics": record.metrics}
    # "format" is what Transformers asks for before it loads a file.
    return {"format": "pt", "holdfast": msgspec.json.encode(described).decode()}


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
