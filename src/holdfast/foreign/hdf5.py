"""HDF5 files (Keras's `.weights.h5`) and Keras's `.keras` archives.

HDF5 is read by the HDF5 library, through h5py: never by Keras. Links to other files, virtual
and external data and filters of third parties are not followed, so nothing is loaded
that the file names.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import ExitStack
from math import prod
from typing import Any

import msgspec

from holdfast.core.types import KiB, MiB
from holdfast.errors import DamagedObject, HoldfastError
from holdfast.foreign.contents import MAX_LEAVES, MAX_VALUES
from holdfast.foreign.data import ForeignObject, ForeignTensor, Swapped, Tree
from holdfast.foreign.described import ForeignFile, ForeignLeaf
from holdfast.foreign.harmless import SIZES, numpy_dtype
from holdfast.foreign.open_pickles import ZIP_PROOF
from holdfast.foreign.opened import PACKED_RATIO, Foreign, Proof, flat
from holdfast.foreign.source import Source
from holdfast.foreign.zips import Archive

MAGIC = b"\x89HDF\r\n\x1a\n"
WEIGHTS = "model.weights.h5"
CONFIG = "config.json"
_MAX_CONFIG_BYTES = 16 * MiB
_MAX_ATTRIBUTE_BYTES = 64 * KiB  # HDF5's own limit, but for what is kept elsewhere
_MAX_CHUNK_BYTES = 512 * MiB  # it is unpacked whole
_BLOCK_BYTES = 8 * MiB
_DEPTH = 64
_TEXT = 200
# deflate, shuffle, fletcher32, szip, nbit, scaleoffset, and h5py's LZF.
_FILTERS = frozenset((1, 2, 3, 4, 5, 6, 32000))
_PACKED = 1100  # see opened.PACKED_RATIO
_LAMBDA = "Lambda layers: code in config.json, if Keras is told to trust it (safe_mode=False)"
_PROOF = Proof(
    (
        "the file's own structure",
        "every dataset can be read to its end, and has the checksums that it was written with",
    ),
    ("the bytes of datasets without checksums: Keras writes none",),
)
_KERAS_PROOF = Proof((*ZIP_PROOF.checked[:2], *_PROOF.checked), ZIP_PROOF.unchecked)


def describe_hdf5(source: Source) -> ForeignFile:
    """An HDF5 file. Raises DamagedObject; HoldfastError without h5py."""
    with ExitStack() as held:
        return _described(source, _open(source, held))[0]


def open_hdf5(source: Source, file: ForeignFile) -> Foreign:
    held = ExitStack()
    opened = _open(source, held)

    def build() -> Tree:
        return _described(source, opened)[1]

    return Foreign(file, _PROOF, build, lambda: _survey(build()), ratio=PACKED_RATIO, held=held)


def is_keras(archive: Archive) -> bool:
    return WEIGHTS in archive.entries and CONFIG in archive.entries


def describe_keras(archive: Archive) -> ForeignFile:
    """A `.keras` archive. Raises DamagedObject; HoldfastError without h5py."""
    with ExitStack() as held:
        part = _weights(archive)
        inner, _ = _described(part, _open(part, held))
    values = [
        (path.removesuffix("/"), _text(value))
        for name in ("metadata.json", CONFIG)
        for path, value in flat({name: _config(archive, name)})
    ]
    lambdas = any(value == "Lambda" for _, value in values)
    return ForeignFile(
        "Keras model (zip)",
        archive.source.nbytes,
        leaves=inner.leaves,
        values=(*values[:MAX_VALUES], *inner.values),
        runs=(_LAMBDA,) if lambdas else (),
        notes=(*archive.notes, *inner.notes),
        problems=inner.problems,
    )


def open_keras(archive: Archive, file: ForeignFile) -> Foreign:
    held = ExitStack()
    part = _weights(archive)
    opened = _open(part, held)

    def weights() -> Tree:
        return _described(part, opened)[1]

    def build() -> Tree:
        names = [name for name in ("metadata.json", CONFIG) if name in archive.entries]
        about = {name.removesuffix(".json"): _config(archive, name) for name in names}
        return {"weights": weights(), **about}

    def survey() -> Iterator[str]:
        yield from archive.check()
        yield from _survey(weights())

    return Foreign(file, _KERAS_PROOF, build, survey, ratio=PACKED_RATIO, held=held)


def _weights(archive: Archive) -> Source:
    part = archive.part(WEIGHTS)
    if part is None:
        raise DamagedObject(
            archive.source.name, f"its {WEIGHTS} is compressed, as Keras writes none"
        )
    return part


def _config(archive: Archive, name: str) -> Any:
    if name not in archive.entries:
        return {}
    data = archive.read(name, max_bytes=_MAX_CONFIG_BYTES + 1)
    if len(data) > _MAX_CONFIG_BYTES:
        raise DamagedObject(archive.source.name, f"its {name} is longer than any real one")
    # A bomb of empty containers takes 64 bytes of memory for each three of the file.
    if data.count(b"[") + data.count(b"{") > 1_000_000:
        raise DamagedObject(archive.source.name, f"its {name} has more parts than any real one")
    try:
        return msgspec.json.decode(data)
    except (ValueError, RecursionError) as error:
        raise DamagedObject(archive.source.name, f"its {name} is malformed ({error})") from None


# -- h5py -----------------------------------------------------------------------


class _Readable(io.RawIOBase):
    """A source as h5py wants a file."""

    def __init__(self, source: Source) -> None:
        self._source, self._at = source, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._source.nbytes)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, into: Any) -> int:
        view = memoryview(into).cast("B")
        count = max(0, min(len(view), self._source.nbytes - self._at))
        view[:count] = self._source.read(self._at, count)
        self._at += count
        return count


def _h5py() -> Any:
    try:
        import h5py  # pyright: ignore[reportMissingTypeStubs]
    except ModuleNotFoundError as error:
        if error.name != "h5py":
            raise
        raise HoldfastError(
            "HDF5 files (.h5, .weights.h5, .keras) are read with h5py, which is not installed",
            hint="pip install 'holdfast[h5]'",
        ) from None
    return h5py


def _open(source: Source, held: ExitStack) -> Any:
    h5py = _h5py()
    try:
        return held.enter_context(h5py.File(_Readable(source), "r"))
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise DamagedObject(source.name, f"HDF5 cannot open it ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return f"{error}"[:_TEXT]


def _described(source: Source, opened: Any) -> tuple[ForeignFile, Tree]:
    """(what is said of it, its values)."""
    walk = _Walk(source, _h5py())
    try:
        tree = walk.root(opened)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise DamagedObject(source.name, f"HDF5 cannot read it ({_reason(error)})") from error
    keras = "layers" in tree or "_layer_checkpoint_dependencies" in tree
    file = ForeignFile(
        "Keras weights (HDF5)" if keras else "HDF5",
        source.nbytes,
        leaves=tuple(walk.leaves),
        values=tuple(walk.values),
        notes=tuple(walk.notes),
        problems=tuple(walk.problems),
    )
    return file, tree


class _Walk:
    def __init__(self, source: Source, h5py: Any) -> None:
        self._source = source
        self._h5py = h5py
        self._seen: dict[Any, str] = {}
        self.leaves: list[ForeignLeaf] = []
        self.values: list[tuple[str, str]] = []
        self.notes: list[str] = []
        self.problems: list[str] = []

    def root(self, group: Any) -> dict[str, Tree]:
        self._seen[self._h5py.h5o.get_info(group.id).addr] = "all of it"
        return self.group(group, "", 0)

    def group(self, group: Any, path: str, depth: int) -> dict[str, Tree]:
        tree: dict[str, Tree] = {}
        self._attributes(group, path)
        for name in group:
            below = f"{path}/{name}" if path else name
            if len(self.leaves) + len(self.values) >= MAX_LEAVES or depth > _DEPTH:
                self.problems.append("it has more in it than is looked at")
                break
            link = group.get(name, getlink=True)
            if not isinstance(link, self._h5py.HardLink):
                self.values.append((below, "<a link, not followed>"))
                tree[name] = ForeignObject("a link to another place")
                continue
            try:
                item = group[name]
                where = self._h5py.h5o.get_info(item.id).addr
            except (OSError, RuntimeError, ValueError, KeyError) as error:
                self.problems.append(f"{below[:_TEXT]}: it cannot be opened ({_reason(error)})")
                continue
            if (first := self._seen.setdefault(where, below)) != below:
                self.values.append((below, f"<the same as {first}>"))
                tree[name] = ForeignObject(f"another name of {first}")
            elif isinstance(item, self._h5py.Group):
                tree[name] = self.group(item, below, depth + 1)
            elif isinstance(item, self._h5py.Dataset):
                self._attributes(item, below)
                tree[name] = self._dataset(item, below)
            else:
                tree[name] = ForeignObject("a type")
        return tree

    def _attributes(self, item: Any, path: str) -> None:
        for name in item.attrs:
            if len(self.values) >= MAX_VALUES:
                return
            where = f"{path}@{name}"
            try:
                attribute = self._h5py.h5a.open(item.id, name.encode())
                small = attribute.get_storage_size() <= _MAX_ATTRIBUTE_BYTES
                text = _text(item.attrs[name]) if small else "<a long attribute>"
            except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
                text = f"<unreadable: {_reason(error)}>"
            self.values.append((where[: 2 * _TEXT], text))

    def _dataset(self, item: Any, path: str) -> Tree:
        shape = tuple(int(n) for n in item.shape or ())
        code, size = item.dtype.str, int(item.dtype.itemsize)
        name = numpy_dtype(code if code[0] != ">" else f"<{code[1:]}")
        marked = item.attrs.get("dtype") if item.dtype.kind == "V" and size == 2 else None
        if marked == "bfloat16":
            name = "BF16"
        why = "" if name in SIZES and item.shape is not None else f"of dtype {item.dtype}"
        why = why or self._refused(item, shape, size)
        nbytes = prod(shape) * size
        self.leaves.append(ForeignLeaf(path, name, shape, nbytes, why[:_TEXT]))
        if why:
            return ForeignObject(f"a dataset {why}")
        data: Any = _Rows(item, path, shape, size)
        if code[0] == ">" and size > 1:
            data = Swapped(data, size // 2 if item.dtype.kind == "c" else size)
        return ForeignTensor(name, shape, data, numpy=name != "BF16", itemsize=size)

    def _refused(self, item: Any, shape: tuple[int, ...], size: int) -> str:
        """Why the data of a dataset are left alone; "" if they are not."""
        nbytes = prod(shape) * size
        if nbytes >= 1 << 62:
            self.problems.append(f"the shape of {item.name[:_TEXT]} cannot be")
            return "with a shape that cannot be"
        if item.is_virtual or item.external:
            return "whose data are in other files"
        plist = item.id.get_create_plist()
        filters = {plist.get_filter(i)[0] for i in range(plist.get_nfilters())}
        if not filters <= _FILTERS:
            return "packed by a filter of a third party"
        stored = item.id.get_storage_size()
        if item.chunks is not None and prod(item.chunks) * size > _MAX_CHUNK_BYTES:
            return "in chunks that are too large"
        if nbytes > max(MiB, stored * (_PACKED if filters else 1)):
            self.problems.append(
                f"{item.name[:_TEXT]} has {nbytes:,} bytes, of which {stored:,} are stored"
            )
            return "without its data"
        return ""


class _Rows:
    """A dataset's bytes."""

    def __init__(self, item: Any, path: str, shape: tuple[int, ...], size: int) -> None:
        self._item, self._path, self._size = item, path, size
        self._shape = shape
        # Each read is of whole rows: indices of the dimensions before `cut`, a range of it.
        self._cut = 0
        while self._cut < len(shape) - 1 and prod(shape[self._cut + 1 :]) * size > _BLOCK_BYTES:
            self._cut += 1

    def read(self, offset: int, into: memoryview) -> None:
        try:
            self._read(offset, into)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise DamagedObject(self._path, f"HDF5 cannot read it ({_reason(error)})") from error

    def _read(self, offset: int, into: memoryview) -> None:
        if not self._shape:
            into[:] = self._item[()].tobytes()[offset : offset + len(into)]
            return
        row_bytes = prod(self._shape[self._cut + 1 :]) * self._size
        rows = self._shape[self._cut]
        done = 0
        while done < len(into):
            row, skip = divmod(offset + done, row_bytes)
            outer, low = divmod(row, rows)
            most = -(-(skip + len(into) - done) // row_bytes)
            high = min(rows, low + min(most, max(1, _BLOCK_BYTES // row_bytes)))
            index: list[Any] = []
            for extent in reversed(self._shape[: self._cut]):
                outer, at = divmod(outer, extent)
                index.insert(0, at)
            data = self._item[(*index, slice(low, high))].tobytes()[skip:]
            data = data[: len(into) - done]
            into[done : done + len(data)] = data
            done += len(data)


def _survey(tree: Tree) -> Iterator[str]:
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    for path, value in flat(tree):
        if not isinstance(value, ForeignTensor):
            continue
        try:
            for at in range(0, value.nbytes, _BLOCK_BYTES):
                value.data.read(at, buffer[: min(_BLOCK_BYTES, value.nbytes - at)])
        except DamagedObject as error:
            yield f"{path[:_TEXT]}: {error.reason}"


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    if isinstance(value, bool) or value is None:
        return {None: "none", True: "yes", False: "no"}[value]
    text = value if isinstance(value, str) else f"{value}"
    return text if len(text) <= _TEXT else f"{text[:_TEXT]}…"
