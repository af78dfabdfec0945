"""A model in several files, as Hugging Face's libraries lay a large one out, with an index that
says which tensor is in which."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, cast

import msgspec

from holdfast.core.types import MiB
from holdfast.errors import DamagedObject, UsageError
from holdfast.foreign.data import ForeignTensor, Tree
from holdfast.foreign.described import ForeignFile
from holdfast.foreign.open_arrays import open_safetensors
from holdfast.foreign.open_pickles import open_pickle, open_torch
from holdfast.foreign.opened import Foreign, Proof
from holdfast.foreign.pickles import describe_pickle, describe_torch
from holdfast.foreign.reading import describe_safetensors
from holdfast.foreign.source import FileSource, Reopened, Source
from holdfast.foreign.zips import read_archive

_MAX_INDEX_BYTES = 64 * MiB
_MAX_SHARDS = 10_000
_OPEN_SHARDS = 200  # a process may have 256 files on macOS


@dataclass(frozen=True)
class _Layout:
    """Of one format."""

    format: str
    suffix: str
    open: Callable[[Source], Foreign]
    """One shard. Raises DamagedObject."""
    total: bool
    """Whether the index's total is that of all tensors."""

    @property
    def index(self) -> str:
        return f"{self.suffix}.index.json"


def _open_safetensors(source: Source) -> Foreign:
    return open_safetensors(source, describe_safetensors(source))


def _open_torch(source: Source) -> Foreign:
    if source.read(0, min(source.nbytes, 4)) == b"PK\3\4":
        archive = read_archive(source)
        found = open_torch(archive, describe_torch(archive))
    else:
        file = describe_pickle(source)
        if file is None:
            raise DamagedObject(source.name, "it is no file by torch.save")
        found = open_pickle(source, file)
    if not found.file.kind.startswith("PyTorch"):
        raise DamagedObject(source.name, f"it is {found.file.kind}, and no file by torch.save")
    return found


_SAFETENSORS = _Layout("safetensors", ".safetensors", _open_safetensors, total=True)
# Tensors that share their bytes are counted once there.
_TORCH = _Layout("PyTorch", ".bin", _open_torch, total=False)


def is_sharded(path: str) -> bool:
    """Whether `path` is a folder of safetensors files, or the index of shards, or has one."""
    return _layout(path) is not None


def _layout(path: str) -> _Layout | None:
    """Where a folder has a model in both formats: safetensors, as the libraries choose, too.
    Other files end with .bin that are no shards: for these it takes an index."""
    if not os.path.isdir(path):
        return next((one for one in (_SAFETENSORS, _TORCH) if path.endswith(one.index)), None)
    names = os.listdir(path)
    if any(name.endswith((_SAFETENSORS.suffix, _SAFETENSORS.index)) for name in names):
        return _SAFETENSORS
    return _TORCH if any(name.endswith(_TORCH.index) for name in names) else None


class _Index(msgspec.Struct):
    weight_map: dict[str, str]
    metadata: dict[str, Any] = {}


def open_sharded(path: str) -> Foreign:
    """What `is_sharded`. Raises DamagedObject, UsageError."""
    layout = _layout(path)
    assert layout is not None
    folder, index_name = (path, "") if os.path.isdir(path) else os.path.split(path)
    folder = folder or "."
    names = sorted(os.listdir(folder))
    indexes = [name for name in names if name.endswith(layout.index)]
    if not index_name and len(indexes) > 1:
        raise UsageError(
            f"{path} has {len(indexes)} indexes", hint=f"Name one: {os.path.join(path, indexes[0])}"
        )
    index_name = index_name or (indexes[0] if indexes else "")
    return _opened(layout, folder, index_name, names)


def _opened(layout: _Layout, folder: str, index_name: str, names: list[str]) -> Foreign:
    index = _read_index(os.path.join(folder, index_name)) if index_name else None
    shards = [name for name in names if name.endswith(layout.suffix)]
    problems: list[str] = []
    notes: list[str] = []
    if index is None:
        if shards[1:]:
            notes.append(f"no index: all of its {len(shards)} {layout.format} files")
    else:
        wanted = dict.fromkeys(index.weight_map.values())
        strange = [name for name in wanted if os.path.basename(name) != name or name in ("", "..")]
        if strange:
            raise DamagedObject(index_name, f"it names a file elsewhere: {strange[0][:200]!r}")
        problems += [f"the shard {name[:200]!r} is missing" for name in wanted if name not in names]
        extra = [name for name in shards if name not in wanted]
        if extra and layout is _SAFETENSORS:
            notes.append(f"{len(extra):,} safetensors files are not in the index: {extra[0][:200]}")
        shards = [name for name in wanted if name in names]
    if len(shards) > _MAX_SHARDS:
        raise DamagedObject(folder, f"it has {len(shards):,} shards, more than any real one")
    files: dict[str, ForeignFile] = {}
    proofs: list[Proof] = []
    found: dict[str, str] = {}
    for name in shards:
        try:
            with FileSource(os.path.join(folder, name)) as source:
                shard = layout.open(source)
        except DamagedObject as error:
            problems.append(f"{name}: {error.reason}")
            continue
        files[name] = shard.file
        proofs.append(shard.proof)
        problems += [f"{name}: {problem}" for problem in shard.file.problems]
        for leaf in shard.file.leaves:
            if leaf.path in found:
                problems.append(f"{leaf.path[:200]!r} is in {found[leaf.path]} and in {name}")
            found[leaf.path] = name
    leaves = [leaf for file in files.values() for leaf in file.leaves]
    if index is not None:
        problems += _against_index(index, files, found)
        if layout.total and len(files) == len(set(found.values())):
            problems += _against_total(index, sum(leaf.nbytes for leaf in leaves))
    file = ForeignFile(
        f"{layout.format} (sharded)" if index or shards[1:] else layout.format,
        sum(file.nbytes for file in files.values()),
        leaves=tuple(leaves),
        values=tuple((f"{n}/{k}", v) for n, f in files.items() for k, v in f.values),
        runs=tuple(dict.fromkeys(name for file in files.values() for name in file.runs)),
        notes=(*notes, *(f"{n}: {note}" for n, f in files.items() for note in f.notes)),
        problems=tuple(problems),
    )
    held = ExitStack()

    def build() -> Tree:
        tree: dict[str, Tree] = {}
        for number, name in enumerate(files):
            path = os.path.join(folder, name)
            source: Source = held.enter_context(
                FileSource(path) if number < _OPEN_SHARDS else Reopened(path)
            )
            tree |= _tensors(layout.open(source), name)
        return tree

    def survey() -> Iterator[str]:
        for name in files:
            with FileSource(os.path.join(folder, name)) as source:
                yield from (f"{name}: {problem}" for problem in layout.open(source).check())

    proof = _proof(proofs, indexed=index is not None, total=layout.total)
    return Foreign(file, proof, build, survey, held=held)


def _tensors(shard: Foreign, name: str) -> dict[str, Tree]:
    tree = shard.tree()
    if not isinstance(tree, dict):
        raise DamagedObject(name, "it holds no dict of tensors")

    def here(value: Tree) -> Tree:
        # Equal within one file only.
        if isinstance(value, ForeignTensor) and value.same is not None:
            return replace(value, same=(name, value.same))
        return value

    return {key: here(value) for key, value in cast("dict[str, Tree]", tree).items()}


def _proof(proofs: Collection[Proof], *, indexed: bool, total: bool) -> Proof:
    checked = [f"in every shard: {text}" for proof in proofs for text in proof.checked]
    if indexed:
        checked.append("every tensor is in the shard that the index names, and in no other")
    if indexed and total:
        checked.append("the index's total size is that of the tensors")
    unchecked = [text for proof in proofs for text in proof.unchecked]
    return Proof(tuple(dict.fromkeys(checked)), tuple(dict.fromkeys(unchecked)))


def _read_index(path: str) -> _Index:
    with FileSource(path) as source:
        if source.nbytes > _MAX_INDEX_BYTES:
            raise DamagedObject(path, "it is longer than any real index")
        data = source.read(0, source.nbytes)
    try:
        return msgspec.json.decode(data, type=_Index)
    except (ValueError, RecursionError) as error:
        raise DamagedObject(path, f"it is no index of shards ({error})") from None


def _against_index(
    index: _Index, files: dict[str, ForeignFile], found: dict[str, str]
) -> Iterator[str]:
    for name, shard in index.weight_map.items():
        if shard in files and found.get(name) != shard:
            where = f"it is in {found[name]}" if name in found else "it is in no shard"
            yield f"{name[:200]!r} should be in {shard[:200]}, but {where}"
    for name, shard in found.items():
        if name not in index.weight_map:
            yield f"{name[:200]!r}, in {shard}, is not in the index"


def _against_total(index: _Index, nbytes: int) -> Iterator[str]:
    total = index.metadata.get("total_size")
    if isinstance(total, int) and total != nbytes:
        yield f"the index says {total:,} bytes, its tensors have {nbytes:,}"
