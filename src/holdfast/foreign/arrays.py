"""NumPy's `.npy` files, and `.npz`, which is a zip archive of them: their headers."""

from __future__ import annotations

import ast
from math import prod

from holdfast.errors import DamagedObject
from holdfast.foreign.contents import Budget, runs_of
from holdfast.foreign.described import ForeignFile, ForeignLeaf
from holdfast.foreign.harmless import numpy_dtype
from holdfast.foreign.machine import MAX_PICKLE_BYTES
from holdfast.foreign.source import Source
from holdfast.foreign.zips import Archive

MAGIC = b"\x93NUMPY"
_MAX_HEADER_BYTES = 10_000  # NumPy's own limit, since a longer one can crash a parser
_DIMENSIONS = 64
_LARGEST = 1 << 62
_ITEMSIZE = {"?": 1, "U": 4}
_OBJECTS = "pickled objects"


def describe_npy(source: Source) -> ForeignFile:
    """A `.npy` file. Raises DamagedObject."""
    head = source.read(0, min(source.nbytes, _MAX_HEADER_BYTES + 12))
    leaf, start = _array(source.name, head, source.nbytes, "")
    runs: list[str] = []
    if leaf.note == _OBJECTS:
        data = source.read(start, min(source.nbytes - start, MAX_PICKLE_BYTES))
        runs = _runs(data, Budget())
    return ForeignFile("NumPy array", source.nbytes, leaves=(leaf,), runs=tuple(runs))


def describe_npz(archive: Archive) -> ForeignFile:
    """A `.npz` file. Raises DamagedObject."""
    source = archive.source
    leaves: list[ForeignLeaf] = []
    runs: list[str] = []
    values: list[tuple[str, str]] = []
    budget, nbytes_left = Budget(), MAX_PICKLE_BYTES
    for name, entry in archive.entries.items():
        path = name.removesuffix(".npy")
        head = archive.read(name, max_bytes=_MAX_HEADER_BYTES + 12)
        # By its first bytes, as numpy.load goes by them and not by the name.
        if not head.startswith(MAGIC):
            values.append((name, f"<{entry.nbytes:,} bytes>"))
            continue
        leaf, start = _array(source.name, head, entry.nbytes, path)
        leaves.append(leaf)
        if leaf.note == _OBJECTS:
            data = archive.read(name, max_bytes=nbytes_left)[start:]
            nbytes_left = max(0, nbytes_left - len(data))
            runs += _runs(data, budget)
    return ForeignFile(
        "NumPy archive",
        source.nbytes,
        leaves=tuple(leaves),
        values=tuple(values),
        runs=tuple(dict.fromkeys(runs)),
        notes=archive.notes,
    )


def _runs(data: bytes, budget: Budget) -> list[str]:
    walked = budget.walk(data)
    found = runs_of(walked)
    return [*found, f"<unknown: {walked.problem}>"] if walked.problem else found


def _array(name: str, head: bytes, nbytes: int, path: str) -> tuple[ForeignLeaf, int]:
    """(the array whose file starts with `head`, where its data starts)."""
    where = f"{name}: {path}" if path else name
    descr, shape, _, start = _header(where, head)
    if isinstance(descr, str):
        if "O" in descr:
            return ForeignLeaf(path, "objects", shape, nbytes - start, _OBJECTS), start
        dtype = numpy_dtype(descr)
        expected = prod(shape) * _itemsize(descr)
        if _itemsize(descr) and expected != nbytes - start:
            raise DamagedObject(
                where, f"{dtype}{list(shape)} does not fit its {nbytes - start:,} bytes"
            )
    else:
        dtype = "record"
        if "'O'" in repr(descr) or "|O" in repr(descr):
            return ForeignLeaf(path, dtype, shape, nbytes - start, _OBJECTS), start
    return ForeignLeaf(path, dtype, shape, nbytes - start), start


def read_array_header(
    where: str, head: bytes, nbytes: int
) -> tuple[str, tuple[int, ...], bool, int]:
    """(NumPy's code of the dtype, shape, whether in Fortran's order, where the data starts).

    The code is "" for records. Raises DamagedObject.
    """
    descr, shape, fortran, start = _header(where, head)
    if start > nbytes:
        raise DamagedObject(where, "its header is cut off")
    return descr if isinstance(descr, str) else "", shape, fortran, start


def _header(where: str, head: bytes) -> tuple[object, tuple[int, ...], bool, int]:
    if len(head) < 10 or not head.startswith(MAGIC):
        raise DamagedObject(where, "it is no NumPy array")
    size = 2 if head[6] == 1 else 4
    start = 8 + size + int.from_bytes(head[8 : 8 + size], "little")
    if start - 8 - size > _MAX_HEADER_BYTES:
        raise DamagedObject(where, "its header is longer than any real one")
    if start > len(head):
        raise DamagedObject(where, "its header is cut off")
    try:
        # A literal only: nothing is evaluated. No longer than NumPy itself would take.
        header = ast.literal_eval(head[8 + size : start].decode("latin1").strip())
        descr, shape = header["descr"], tuple(header["shape"])
        fortran = header.get("fortran_order") is True
    except (
        *(ValueError, SyntaxError, KeyError, TypeError, AttributeError),
        *(MemoryError, RecursionError),
    ) as error:
        raise DamagedObject(where, "its header is malformed") from error
    if len(shape) > _DIMENSIONS or not all(type(n) is int and 0 <= n < _LARGEST for n in shape):
        raise DamagedObject(where, "its shape cannot be")
    return descr, shape, fortran, start


def _itemsize(descr: str) -> int:
    """Bytes of an element; 0 where they are not known here."""
    kind, digits = descr.lstrip("<>|=")[:1], descr.lstrip("<>|=")[1:]
    if kind in ("M", "m"):
        return 8
    if not digits.isdigit() or len(digits) > 9:
        return _ITEMSIZE.get(kind, 0) if not digits else 0
    return int(digits) * (4 if kind == "U" else 1)
