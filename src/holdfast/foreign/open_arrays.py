"""safetensors, in one file or in several, and NumPy's files, opened."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import msgspec

from holdfast.core.packing import header_bytes, read_header
from holdfast.core.types import MiB
from holdfast.errors import DamagedObject, UsageError
from holdfast.foreign.arrays import MAGIC, read_array_header
from holdfast.foreign.data import ForeignObject, ForeignTensor, Span, Tree
from holdfast.foreign.described import ForeignFile
from holdfast.foreign.opened import PACKED_RATIO, Foreign, Proof, nothing_more
from holdfast.foreign.reading import describe_safetensors
from holdfast.foreign.source import FileSource, Source
from holdfast.foreign.trees import numpy_tensor
from holdfast.foreign.zips import Archive

INDEX = ".safetensors.index.json"
_MAX_INDEX_BYTES = 64 * MiB
_MAX_SHARDS = 10_000
_OPEN_SHARDS = 200  # a process may have 256 files on macOS
_NUMPY_FORMATS = frozenset(("np", "numpy", "flax", "tf", "mlx"))
_NUMPY_DTYPES = frozenset(
    ("BOOL", *(f"{kind}{bits}" for kind in "IU" for bits in (8, 16, 32, 64)), "F16", "F32", "F64")
)
_SAFETENSORS_PROOF = Proof(
    ("the header is well formed", "every tensor lies in the file, and none over another"),
    ("the bytes of tensors: the format has no checksum at all",),
)
_SHARDED_PROOF = Proof(
    (
        "every shard has a well-formed header",
        "every tensor is in the shard that the index names, and in no other",
        "the index's total size is that of the tensors",
    ),
    ("the bytes of tensors: the format has no checksum at all",),
)
_NPY_PROOF = Proof(
    ("the header fits the length of the file",),
    ("the bytes of the array: the format has no checksum at all",),
)
_NPZ_PROOF = Proof(
    ("the list of entries and the headers agree", "every entry has its size and its CRC-32"),
    ("a CRC-32 finds accidents, and not who changed the file on purpose: there is no digest",),
)


def open_safetensors(source: Source, file: ForeignFile) -> Foreign:
    return Foreign(file, _SAFETENSORS_PROOF, lambda: _tensors(source), nothing_more)


def _tensors(source: Source) -> dict[str, ForeignTensor]:
    end = header_bytes(source.read(0, min(source.nbytes, 8)), source.nbytes, source.name)
    header = read_header(source.read(0, end), source.nbytes, source.name)
    as_numpy = header.metadata.get("format") in _NUMPY_FORMATS
    ordered = sorted(header.entries.items(), key=lambda item: item[1].offset)
    return {
        name: ForeignTensor(
            entry.dtype,
            entry.shape,
            Span(source, entry.offset, entry.nbytes),
            numpy=as_numpy and entry.dtype in _NUMPY_DTYPES,
        )
        for name, entry in ordered
    }


# -- in several files -----------------------------------------------------------


def is_sharded(path: str) -> bool:
    """Whether `path` is a folder of safetensors files, or the index of one."""
    if os.path.isdir(path):
        return any(name.endswith((".safetensors", INDEX)) for name in os.listdir(path))
    return path.endswith(INDEX)


class _Index(msgspec.Struct):
    weight_map: dict[str, str]
    metadata: dict[str, Any] = {}


def open_sharded(path: str) -> Foreign:
    """A folder of safetensors files, or its index. Raises DamagedObject, UsageError."""
    folder, index_name = (path, "") if os.path.isdir(path) else os.path.split(path)
    folder = folder or "."
    names = sorted(os.listdir(folder))
    indexes = [name for name in names if name.endswith(INDEX)]
    if not index_name and len(indexes) > 1:
        raise UsageError(
            f"{path} has {len(indexes)} indexes", hint=f"Name one: {os.path.join(path, indexes[0])}"
        )
    index_name = index_name or (indexes[0] if indexes else "")
    held = ExitStack()
    try:
        return _opened(folder, index_name, names, held)
    except BaseException:
        held.close()
        raise


def _opened(folder: str, index_name: str, names: list[str], held: ExitStack) -> Foreign:
    index = _read_index(os.path.join(folder, index_name)) if index_name else None
    shards = [name for name in names if name.endswith(".safetensors")]
    problems: list[str] = []
    notes: list[str] = []
    if index is None:
        notes.append(f"no index: all of its {len(shards)} safetensors files") if shards[
            1:
        ] else None
    else:
        wanted = dict.fromkeys(index.weight_map.values())
        strange = [name for name in wanted if os.path.basename(name) != name or name in ("", "..")]
        if strange:
            raise DamagedObject(index_name, f"it names a file elsewhere: {strange[0][:200]!r}")
        problems += [f"the shard {name[:200]!r} is missing" for name in wanted if name not in names]
        if extra := [name for name in shards if name not in wanted]:
            notes.append(f"{len(extra):,} safetensors files are not in the index: {extra[0][:200]}")
        shards = [name for name in wanted if name in names]
    if len(shards) > _MAX_SHARDS:
        raise DamagedObject(folder, f"it has {len(shards):,} shards, more than any real one")
    files: dict[str, ForeignFile] = {}
    found: dict[str, str] = {}
    for name in shards:
        try:
            with FileSource(os.path.join(folder, name)) as source:
                files[name] = describe_safetensors(source)
        except DamagedObject as error:
            problems.append(f"{name}: {error.reason}")
            continue
        for leaf in files[name].leaves:
            if leaf.path in found:
                problems.append(f"{leaf.path[:200]!r} is in {found[leaf.path]} and in {name}")
            found[leaf.path] = name
    leaves = [leaf for file in files.values() for leaf in file.leaves]
    if index is not None:
        problems += _against_index(index, files, found, sum(leaf.nbytes for leaf in leaves))
    file = ForeignFile(
        "safetensors (sharded)" if index or shards[1:] else "safetensors",
        sum(file.nbytes for file in files.values()),
        leaves=tuple(leaves),
        values=tuple((f"{n}/{k}", v) for n, f in files.items() for k, v in f.values),
        notes=(*notes, *(f"{n}: {note}" for n, f in files.items() for note in f.notes)),
        problems=tuple(problems),
    )

    def build() -> Tree:
        tree: dict[str, ForeignTensor] = {}
        for number, name in enumerate(files):
            path = os.path.join(folder, name)
            source: Source = held.enter_context(
                FileSource(path) if number < _OPEN_SHARDS else Reopened(path)
            )
            tree |= _tensors(source)
        return tree

    return Foreign(file, _SHARDED_PROOF, build, nothing_more, held=held)


class Reopened:
    """A file that is opened for each read: of thousands, all cannot be open at once."""

    def __init__(self, path: str) -> None:
        self.name = path
        with FileSource(path) as source:
            self.nbytes = source.nbytes

    def read(self, offset: int, nbytes: int) -> bytes:
        with FileSource(self.name) as source:
            return source.read(offset, nbytes)

    def __enter__(self) -> Reopened:
        return self

    def __exit__(self, *_: object) -> None: ...


def _read_index(path: str) -> _Index:
    with FileSource(path) as source:
        if source.nbytes > _MAX_INDEX_BYTES:
            raise DamagedObject(path, "it is longer than any real index")
        data = source.read(0, source.nbytes)
    try:
        return msgspec.json.decode(data, type=_Index)
    except (ValueError, RecursionError) as error:
        raise DamagedObject(path, f"it is no index of safetensors files ({error})") from None


def _against_index(
    index: _Index, files: dict[str, ForeignFile], found: dict[str, str], nbytes: int
) -> Iterator[str]:
    for name, shard in index.weight_map.items():
        if shard in files and found.get(name) != shard:
            where = f"it is in {found[name]}" if name in found else "it is in no shard"
            yield f"{name[:200]!r} should be in {shard[:200]}, but {where}"
    for name, shard in found.items():
        if name not in index.weight_map:
            yield f"{name[:200]!r}, in {shard}, is not in the index"
    total = index.metadata.get("total_size")
    if isinstance(total, int) and total != nbytes and len(files) == len(set(found.values())):
        yield f"the index says {total:,} bytes, its tensors have {nbytes:,}"


# -- NumPy ----------------------------------------------------------------------


def open_npy(source: Source, file: ForeignFile) -> Foreign:
    def build() -> Tree:
        head = source.read(0, min(source.nbytes, 10_100))
        code, shape, fortran, start = read_array_header(source.name, head, source.nbytes)
        data = Span(source, start, source.nbytes - start)
        made = code and numpy_tensor(code, shape, data, source.nbytes - start, fortran)
        return {"array": made or ForeignObject("an array of Python objects or records")}

    return Foreign(file, _NPY_PROOF, build, nothing_more)


def open_npz(archive: Archive, file: ForeignFile) -> Foreign:
    def build() -> Tree:
        tree: dict[str, Tree] = {}
        for name, entry in archive.entries.items():
            head = archive.read(name, max_bytes=10_100)
            if not head.startswith(MAGIC):
                tree[name] = ForeignObject("an entry that is no array")
                continue
            where = f"{archive.source.name}: {name}"
            code, shape, fortran, start = read_array_header(where, head, entry.nbytes)
            nbytes = entry.nbytes - start
            made = code and numpy_tensor(code, shape, archive.data(name, start), nbytes, fortran)
            made = made or ForeignObject("an array of Python objects or records")
            tree[name.removesuffix(".npy")] = made
        return tree

    return Foreign(file, _NPZ_PROOF, build, archive.check, ratio=PACKED_RATIO)
