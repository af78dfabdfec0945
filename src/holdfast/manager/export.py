"""Writing a checkpoint as plain files that need no Holdfast to be read."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
from holdfast.core.tree import TreeDecoder, file_nodes

from holdfast.core.packing import PackChunk, pack_header
from holdfast.core.plan import itemsize
from holdfast.core.records import Chunk, Leaf, Manifest, Record
from holdfast.errors import UsageError
from holdfast.manager.info import info_of
from holdfast.manager.reader import ChunkReader, Wanted
from holdfast.manager.restore import fill
from holdfast.repo.check import leaf_nbytes
from holdfast.repo.repo import Repo

TENSORS = "state.safetensors"
VALUES = "state.json"
FILES = "files"


def export(repo: Repo, record: Record, folder: Path) -> list[Path]:
    """Write `record`'s state into `folder`; the paths written.

    `state.safetensors` holds every tensor and array under its leaf path (a leaf that
    is tied to another is there once), `state.json` the tree that says what belongs
    where, with metrics, config and environment; `files/` the tracked files. All bytes
    are verified. Raises UsageError if the folder has something in it; DamagedObject.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not empty", hint="Name a new folder.")
    manifest = repo.manifest(record)
    files = dict(file_nodes(manifest.tree))
    leaves = [
        manifest.leaves[index]
        for index in sorted(_leaf_indexes(manifest) - {i for i in _file_leaves(files)})
    ]
    ChunkReader(repo, record, manifest).check_packs(manifest.leaves)
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / TENSORS, folder / VALUES]
    _write_tensors(repo, record, manifest, leaves, written[0])
    info = info_of(repo.address, record)
    described = {
        "checkpoint": msgspec.to_builtins(info),
        "config": manifest.config,
        "environment": manifest.environment,
        "tree": manifest.tree,
        "leaves": {str(i): leaf.path for i, leaf in enumerate(manifest.leaves)},
    }
    with open(written[1], "wb") as out:
        out.write(msgspec.json.format(msgspec.json.encode(described), indent=1))
        out.flush()
        os.fsync(out.fileno())
    for path, node in files.items():
        decoder = TreeDecoder(manifest.leaves)
        target = folder / FILES / path
        decoder.decode_file(node, target)
        fill(repo, record, manifest, decoder)
        written.append(target)
    return written


def _write_tensors(
    repo: Repo, record: Record, manifest: Manifest, leaves: list[Leaf], path: Path
) -> None:
    header, offsets = pack_header(
        [PackChunk(leaf.path, leaf.dtype, leaf.shape, leaf_nbytes(leaf)) for leaf in leaves], {}
    )
    start_of = {leaf.path: offset for leaf, offset in zip(leaves, offsets, strict=True)}
    with open(path, "xb") as out:
        out.write(header)
        out.flush()

        def write(leaf: Leaf, chunk: Chunk, data: memoryview) -> None:
            flat = 0
            for begin, whole in zip(chunk.start, leaf.shape, strict=True):
                flat = flat * whole + begin
            at = start_of[leaf.path] + flat * itemsize(leaf.dtype)
            while data:
                done = os.pwrite(out.fileno(), data, at)
                data, at = data[done:], at + done

        wanted = [Wanted(leaf, chunk, write) for leaf in leaves for chunk in leaf.chunks]
        ChunkReader(repo, record, manifest).read(wanted)
        os.fsync(out.fileno())
