"""safetensors and NumPy's files, opened."""

from __future__ import annotations

from holdfast.core.packing import header_bytes, read_header
from holdfast.foreign.arrays import MAGIC, read_array_header
from holdfast.foreign.data import ForeignObject, ForeignTensor, Span, Tree
from holdfast.foreign.described import ForeignFile
from holdfast.foreign.opened import PACKED_RATIO, Foreign, Proof, nothing_more
from holdfast.foreign.source import Source
from holdfast.foreign.trees import numpy_tensor
from holdfast.foreign.zips import Archive

_NUMPY_FORMATS = frozenset(("np", "numpy", "flax", "tf", "mlx"))
_NUMPY_DTYPES = frozenset(
    ("BOOL", *(f"{kind}{bits}" for kind in "IU" for bits in (8, 16, 32, 64)), "F16", "F32", "F64")
)
_SAFETENSORS_PROOF = Proof(
    ("the header is well formed", "every tensor lies in the file, and none over another"),
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
