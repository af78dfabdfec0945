"""Folders of `torch.distributed.checkpoint` (DCP): what `.metadata` says, and `.distcp` files.

`.metadata` is a pickle, followed by the machine that runs nothing. It names, for each
tensor, boxes of it and for each box a range of a `.distcp` file, which is what
`torch.save` wrote: a zip archive with one tensor. Other values are ranges of that kind, too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import prod
from typing import Any, cast

from holdfast.errors import DamagedObject, UnknownFile
from holdfast.foreign.contents import runs_of
from holdfast.foreign.data import Box, Boxes, Data, ForeignTensor, Tree
from holdfast.foreign.described import ForeignFile, ForeignLeaf
from holdfast.foreign.harmless import DTYPES, SIZES
from holdfast.foreign.machine import MAX_PICKLE_BYTES, Items, Made, Name, Pairs, Value, walk
from holdfast.foreign.open_pickles import torch_tree
from holdfast.foreign.opened import Foreign, Proof
from holdfast.foreign.pickles import describe_torch
from holdfast.foreign.source import FileSource, PartSource, Reopened, Source
from holdfast.foreign.trees import MAX_DEPTH, attributes_of
from holdfast.foreign.zips import Archive, read_archive

METADATA = ".metadata"
_OWN = "torch.distributed.checkpoint."
_LARGEST = 1 << 62
_MAX_DIMENSIONS = 64
_OPEN_FILES = 200
_PROOF = Proof(
    (
        "every range of .metadata is in its file",
        "each is an archive whose entries have their sizes and CRC-32s",
        "each tensor's boxes have its dtype and their shapes, and cover it",
    ),
    (
        ".metadata itself: it has no checksum",
        "a CRC-32 finds accidents, and not who changed a file on purpose: there is no digest",
    ),
)


def is_dcp(path: str) -> bool:
    """Whether `path` is a folder that DCP wrote."""
    return os.path.isfile(os.path.join(path, METADATA))


@dataclass
class _Range:
    """What is at some bytes of a file."""

    file: str
    offset: int
    nbytes: int
    transformed: bool = False


@dataclass
class _Entry:
    """A tensor, or any other value (`dtype` is "")."""

    name: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(
        default_factory=list[tuple[tuple[int, ...], tuple[int, ...]]]
    )


@dataclass
class _Metadata:
    entries: dict[str, _Entry]
    ranges: dict[tuple[str, tuple[int, ...]], _Range]
    """By name, and where a box starts."""
    paths: dict[str, tuple[str | int, ...]]
    runs: tuple[str, ...]


def open_dcp(folder: str) -> Foreign:
    """A folder that `torch.distributed.checkpoint` wrote. Raises DamagedObject."""
    path = os.path.join(folder, METADATA)
    with FileSource(path) as source:
        nbytes = source.nbytes
        if nbytes > MAX_PICKLE_BYTES:
            raise DamagedObject(path, "it is longer than any real one")
        data = source.read(0, nbytes)
    try:
        metadata = _read(data, path)
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise DamagedObject(path, f"it is no metadata of a checkpoint ({error})"[:300]) from error
    files: dict[str, int] = {}
    problems: list[str] = []
    for name in dict.fromkeys(one.file for one in metadata.ranges.values()):
        if os.path.basename(name) != name or name in ("", ".", ".."):
            raise DamagedObject(path, f"it names a file elsewhere: {name[:200]!r}")
        try:
            with FileSource(os.path.join(folder, name)) as source:
                files[name] = source.nbytes
        except FileNotFoundError:
            problems.append(f"{name} is missing")
    problems += _overlaps(metadata)
    # What is missing is said for each value otherwise, too.
    spoilt = bool(problems)
    problems += _problems(metadata, files)
    held = ExitStack()
    sources = _Sources(folder, held)
    leaves: list[ForeignLeaf] = []
    values: list[tuple[str, str]] = []
    runs = dict.fromkeys(metadata.runs)
    for entry in metadata.entries.values():
        where = "/".join(map(str, metadata.paths.get(entry.name, (entry.name,))))
        if entry.dtype:
            size = prod(entry.shape) * SIZES.get(entry.dtype, 0)
            note = f"in {len(entry.boxes):,} boxes" if len(entry.boxes) > 1 else ""
            leaves.append(ForeignLeaf(where, entry.dtype, entry.shape, size, note))
            continue
        try:
            # Where ranges overlap, a small file could hold any number of large pickles.
            if spoilt:
                continue
            inner = _looked_at(metadata, entry, files, sources)
        except (DamagedObject, UnknownFile) as error:
            values.append((where, "<unreadable>"))
            problems.append(f"{entry.name[:200]}: {error.message}")
            continue
        runs |= dict.fromkeys(inner.runs)
        leaves += [replace(leaf, path=_join(where, leaf.path)) for leaf in inner.leaves]
        values += [(_join(where, path), text) for path, text in inner.values]
        problems += [f"{entry.name[:200]}: {problem}" for problem in inner.problems]
    file = ForeignFile(
        "PyTorch DCP (folder)",
        nbytes + sum(files.values()),
        leaves=tuple(leaves),
        values=tuple(values),
        runs=tuple(runs),
        problems=tuple(dict.fromkeys(problems)),
    )
    return Foreign(
        file,
        _PROOF,
        lambda: _tree(metadata, sources),
        lambda: _survey(metadata, sources),
        held=held,
    )


def _looked_at(
    metadata: _Metadata, entry: _Entry, files: dict[str, int], sources: _Sources
) -> ForeignFile:
    """What a value is, whose pickle PyTorch loads without restrictions."""
    one = metadata.ranges.get((entry.name, ()))
    if one is None or one.file not in files:
        return ForeignFile("", 0)  # said already
    return describe_torch(_archive(one, entry.name, sources))


def _join(path: str, key: str) -> str:
    return f"{path}/{key}" if key else path


class _Sources:
    def __init__(self, folder: str, held: ExitStack) -> None:
        self._folder = folder
        self._held = held
        self._open: dict[str, Source] = {}

    def part(self, one: _Range) -> PartSource:
        source = self._open.get(one.file)
        if source is None:
            path = os.path.join(self._folder, one.file)
            fits = len(self._open) < _OPEN_FILES
            try:
                source = self._held.enter_context(FileSource(path)) if fits else Reopened(path)
            except FileNotFoundError:
                raise DamagedObject(one.file, "it is missing") from None
            self._open[one.file] = source
        return PartSource(source, one.offset, one.nbytes, f"{one.file} at {one.offset:,}")


# -- .metadata ------------------------------------------------------------------


def _read(data: bytes, name: str) -> _Metadata:
    walked = walk(data)
    if walked.problem:
        raise DamagedObject(name, walked.problem)
    if _class_of(walked.value) != f"{_OWN}metadata.Metadata":
        raise DamagedObject(name, "it is no metadata of a checkpoint")
    fields = attributes_of(walked.value)
    entries = {
        key: _entry(key, value)
        for key, value in _pairs(fields.get("state_dict_metadata"))
        if isinstance(key, str)
    }
    ranges: dict[tuple[str, tuple[int, ...]], _Range] = {}
    for key, value in _pairs(fields.get("storage_data")):
        index, info = attributes_of(key), attributes_of(value)
        named, offset = index["fqn"], index.get("offset")
        if not isinstance(named, str) or not isinstance(file := info["relative_path"], str):
            raise ValueError("a range without a name")
        start = () if offset is None else _sizes(offset)
        changed = info.get("transform_descriptors") is not None
        found = _Range(file, _size(info["offset"]), _size(info["length"]), changed)
        ranges[named, start] = found
    paths: dict[str, tuple[str | int, ...]] = {}
    for key, value in _pairs(fields.get("planner_data")):
        if isinstance(key, str) and isinstance(value, Items) and value.items:
            parts = value.items
            if all(isinstance(part, str) or type(part) is int for part in parts):
                paths[key] = tuple(parts)  # type: ignore[arg-type]
    runs = [one for one in runs_of(walked) if not one.startswith(_OWN)]
    return _Metadata(entries, ranges, paths, tuple(runs))


def _entry(name: str, value: Value) -> _Entry:
    kind = _class_of(value)
    if kind == f"{_OWN}metadata.BytesStorageMetadata":
        return _Entry(name)
    if kind != f"{_OWN}metadata.TensorStorageMetadata":
        raise ValueError(f"{name[:80]!r} is a {kind[:80]}")
    fields = attributes_of(value)
    state = fields["properties"]
    # TensorProperties pickles itself as (dtype, layout, requires_grad, format, pinned).
    first = state.state[0] if isinstance(state, Made) and state.state else None
    dtype = first.items[0] if isinstance(first, Items) else attributes_of(state)["dtype"]
    if not isinstance(dtype, Name):
        raise ValueError("a tensor without a dtype")
    entry = _Entry(
        name, DTYPES.get(dtype.text.removeprefix("torch."), dtype.text), _sizes(fields["size"])
    )
    chunks = fields["chunks"]
    for chunk in chunks.items if isinstance(chunks, Items) else []:
        box = attributes_of(chunk)
        entry.boxes.append((_sizes(box["offsets"]), _sizes(box["sizes"])))
    return entry


def _class_of(value: Value) -> str:
    return value.by.text if isinstance(value, Made) and isinstance(value.by, Name) else ""


def _pairs(value: Value) -> list[tuple[Value, Value]]:
    return value.pairs if isinstance(value, Pairs) else []


def _sizes(value: Value) -> tuple[int, ...]:
    if isinstance(value, Made) and value.args:  # torch.Size
        value = value.args[0]
    if not isinstance(value, Items) or len(value.items) > _MAX_DIMENSIONS:
        raise ValueError("no sizes")
    return tuple(_size(item) for item in value.items)


def _size(value: Value) -> int:
    if type(value) is not int or not 0 <= value < _LARGEST:
        raise ValueError("no size")
    return value


def _overlaps(metadata: _Metadata) -> Iterator[str]:
    placed = [(one.file, one.offset, one.nbytes, name)
              for (name, _), one in metadata.ranges.items() if one.nbytes]  # fmt: skip
    for before, after in pairwise(sorted(placed)):
        if before[0] == after[0] and before[1] + before[2] > after[1]:
            yield f"{before[0]}: the bytes of {before[3][:200]} and {after[3][:200]} overlap"
            return


def _problems(metadata: _Metadata, files: dict[str, int]) -> Iterator[str]:
    """What is wrong with it that needs no look into the files."""
    for (name, _), one in metadata.ranges.items():
        if one.file in files and one.offset + one.nbytes > files[one.file]:
            yield f"{name[:200]}: its bytes are beyond the end of {one.file}"
    for entry in metadata.entries.values():
        if not entry.dtype:
            if (entry.name, ()) not in metadata.ranges:
                yield f"{entry.name[:200]}: its bytes are nowhere"
            continue
        count = 0
        for start, shape in entry.boxes:
            count += prod(shape)
            if (entry.name, start) not in metadata.ranges and prod(shape):
                yield f"{entry.name[:200]}: the bytes of a part are nowhere"
            if len(start) != len(entry.shape) or len(shape) != len(entry.shape):
                yield f"{entry.name[:200]}: a part has other dimensions than it"
            elif any(a + n > m for a, n, m in zip(start, shape, entry.shape, strict=True)):
                yield f"{entry.name[:200]}: a part is outside of it"
        if count != prod(entry.shape):
            yield f"{entry.name[:200]}: its parts have {count:,} elements of {prod(entry.shape):,}"


# -- values ---------------------------------------------------------------------


def _tree(metadata: _Metadata, sources: _Sources) -> Tree:
    root: dict[Any, Any] = {}
    for entry in metadata.entries.values():
        if entry.dtype:
            value = _tensor(entry, metadata, sources)
        else:
            value = _saved(metadata.ranges[entry.name, ()], entry.name, sources)
        path = metadata.paths.get(entry.name, (entry.name,))
        at = root
        for part in path[:-1]:
            below: Any = at.setdefault(part, {})
            if not isinstance(below, dict):
                raise DamagedObject(METADATA, f"{entry.name[:200]!r} is below a value")
            at = cast("dict[Any, Any]", below)
        at[path[-1]] = value
    return _with_lists(root, 0)


def _with_lists(value: Any, depth: int) -> Any:
    """Dicts whose keys are the numbers from 0 on are the lists that DCP took apart."""
    if not isinstance(value, dict) or depth > MAX_DEPTH:
        return cast("object", value)
    known = cast("dict[Any, Any]", value)
    items = {key: _with_lists(item, depth + 1) for key, item in known.items()}
    numbers = [key for key in items if type(key) is int]
    if items and len(numbers) == len(items) and sorted(numbers) == list(range(len(items))):
        return [items[index] for index in range(len(items))]
    return items


def _tensor(entry: _Entry, metadata: _Metadata, sources: _Sources) -> ForeignTensor:
    boxes: list[Box] = []
    for start, shape in entry.boxes:
        if prod(shape):
            one = metadata.ranges[entry.name, start]
            boxes.append(Box(start, shape, _Later(one, entry, shape, sources)))
    size = SIZES.get(entry.dtype, 0)
    if not size:
        raise UnknownFile(f"{entry.name[:200]!r} has the unknown dtype {entry.dtype[:80]!r}")
    whole = len(boxes) == 1 and boxes[0].shape == entry.shape
    data = boxes[0].data if whole else Boxes(entry.name, entry.shape, size, boxes)
    return ForeignTensor(entry.dtype, entry.shape, data)


class _Later:
    """A box's bytes: its archive is opened when they are first asked for."""

    def __init__(
        self, one: _Range, entry: _Entry, shape: tuple[int, ...], sources: _Sources
    ) -> None:
        self._one, self._entry, self._shape, self._sources = one, entry, shape, sources
        self._data: Data | None = None

    def read(self, offset: int, into: memoryview) -> None:
        if self._data is None:
            self._data = self.opened()
        self._data.read(offset, into)

    def opened(self) -> Data:
        found = _saved(self._one, self._entry.name, self._sources)
        if (
            not isinstance(found, ForeignTensor)
            or found.dtype != self._entry.dtype
            or found.shape != self._shape
        ):
            said = f"{self._entry.dtype}{list(self._shape)}"
            raise DamagedObject(self._one.file, f"{self._entry.name[:200]!r} is not {said} there")
        return found.data


def _saved(one: _Range, name: str, sources: _Sources) -> Tree:
    """What `torch.save` wrote at some bytes of a file."""
    return torch_tree(_archive(one, name, sources))


def _archive(one: _Range, name: str, sources: _Sources) -> Archive:
    if one.transformed:
        raise UnknownFile(
            f"{name[:200]!r} was transformed when it was written (compressed, perhaps)",
            hint="Load it with PyTorch's own torch.distributed.checkpoint.",
        )
    part = sources.part(one)
    if part.read(0, min(4, part.nbytes)) != b"PK\3\4":
        raise DamagedObject(one.file, f"what is at {one.offset:,} is not what torch.save writes")
    return read_archive(part)


def _survey(metadata: _Metadata, sources: _Sources) -> Iterator[str]:
    for (name, start), one in metadata.ranges.items():
        try:
            entry = metadata.entries.get(name)
            shapes = dict(entry.boxes) if entry else {}
            if entry is not None and entry.dtype:
                _Later(one, entry, shapes.get(start, ()), sources).opened()
            else:
                _saved(one, name, sources)
            for problem in read_archive(sources.part(one)).check():
                yield f"{one.file}: {name[:200]}: {problem}"
        except (DamagedObject, UnknownFile) as error:
            reason = error.reason if isinstance(error, DamagedObject) else error.message
            yield f"{one.file}: {name[:200]}: {reason}"
