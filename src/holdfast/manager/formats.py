"""A checkpoint in the forms that other programs load."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from holdfast.core import frameworks
from holdfast.core.adapters import NOTHING
from holdfast.core.address import some_of
from holdfast.core.records import Record
from holdfast.core.tree import TreeDecoder, settle
from holdfast.core.units import parse_size
from holdfast.errors import PickleRefused, UsageError
from holdfast.manager.export import export_shards, export_tensors
from holdfast.manager.exported import FORMATS, Exported
from holdfast.manager.nodes import leaf_indexes, mapping_pairs
from holdfast.manager.reader import ChunkReader
from holdfast.manager.scratch import check_target, write_file, write_whole
from holdfast.manager.tensors import below
from holdfast.repo.repo import Repo


def export_as(
    repo: Repo,
    record: Record,
    kind: str,
    target: Path,
    *,
    only: str = "",
    files: Path | None = None,
    adapter: str = "",
    shard_size: int | str | None = None,
    replace: bool = False,
) -> Exported:
    """See Lookup.export_as."""
    if kind not in FORMATS:
        raise UsageError(f"no format {kind!r}", hint=f"One of {', '.join(FORMATS)}.")
    _check_options(kind, files=files, adapter=adapter, shard_size=shard_size)
    shard_bytes = _parsed(shard_size)
    if kind in ("hf", "peft"):
        from holdfast.manager.pretrained import export_pretrained

        return export_pretrained(
            repo,
            record,
            kind,
            target,
            only=only,
            files=files,
            adapter=adapter,
            shard_bytes=shard_bytes,
            replace=replace,
        )
    if kind in ("pt", "dcp"):
        return _export_state(repo, record, kind, target, only, replace)
    if shard_bytes is not None:
        written, names = export_shards(
            repo, record, target, shard_bytes, only=only, replace=replace
        )
        return Exported(kind, target, written, names)
    names = export_tensors(repo, record, target, only=only, replace=replace)
    return Exported(kind, target, [target], names)


def _check_options(kind: str, **options: object) -> None:
    takes = {
        "files": ("hf", "peft"),
        "adapter": ("peft",),
        "shard_size": ("safetensors", "hf"),
    }
    for name, value in options.items():
        if value not in (None, "") and kind not in takes[name]:
            words = name.replace("_", "-")
            raise UsageError(
                f"--{words} is not for {kind!r}", hint=f"It is for {' and '.join(takes[name])}."
            )


def _parsed(shard_size: int | str | None) -> int | None:
    try:
        nbytes = parse_size(shard_size) if isinstance(shard_size, str) else shard_size
    except ValueError as error:
        raise UsageError(str(error), hint="Name a size such as 5GB.") from None
    if nbytes is not None and nbytes <= 0:
        raise UsageError("a shard has at least one byte", hint="Name a size such as 5GB.")
    return nbytes


def _export_state(
    repo: Repo, record: Record, kind: str, target: Path, only: str, replace: bool
) -> Exported:
    """As torch writes it; of the state, or of what is at `only`."""
    if kind == "dcp":
        check_target(target, replace=replace)
    manifest = repo.manifest(record)
    list(leaf_indexes(manifest.tree))  # raises for a tree that is too deep
    node = below(manifest.tree, only.rstrip("/"))
    if node is None or (kind == "dcp" and mapping_pairs(node) is None):
        names = [str(key) for key, _ in mapping_pairs(manifest.tree) or []]
        raise UsageError(
            f"the checkpoint has no state at {only!r}",
            hint=f"It has {some_of(names)}." if names else "It has nothing.",
        )
    purpose = f"an export as {kind!r}"
    adapter = frameworks.adapter_named("torch", purpose)

    def read() -> Any:
        reader = ChunkReader(repo, record, manifest)
        decoder = TreeDecoder(manifest.leaves, fetch=reader.fetch, scope=manifest.tree)
        try:
            value = decoder.decode(node, NOTHING, only)
            reader.fetch(decoder.requests)
            decoder.run()
        except BaseException as error:
            decoder.discard()
            if isinstance(error, PickleRefused):
                error.hint = "Export a part without it, --only NAME, or its tensors alone: "
                error.hint += "--to safetensors."
            raise
        return settle(value)

    noted: list[tuple[list[str], list[str]]] = []
    if kind == "pt":
        write_file(target, lambda file: noted.append(adapter.write_pt(read, file)), replace=replace)
        written = [target]
    else:

        def write(folder: Path) -> list[str]:
            noted.append(adapter.write_dcp(read, folder, Path(os.path.abspath(target))))
            return sorted(path.name for path in folder.iterdir())

        written = [target / name for name in write_whole(target, write)]
    [(tensors, left_out)] = noted
    return Exported(kind, target, written, tensors, left_out)
