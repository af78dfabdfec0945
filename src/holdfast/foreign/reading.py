"""Which kind of file it is, by its first bytes; never by its name."""

from __future__ import annotations

from dataclasses import replace

from holdfast.core.packing import header_bytes, read_header
from holdfast.errors import DamagedObject, UnknownFile
from holdfast.foreign import boosters, hdf5
from holdfast.foreign.arrays import MAGIC as NPY_MAGIC
from holdfast.foreign.arrays import describe_npy, describe_npz
from holdfast.foreign.described import ForeignFile, ForeignLeaf
from holdfast.foreign.pickles import (
    describe_pickle,
    describe_tar,
    describe_torch,
    is_program,
    looks_like_tar,
)
from holdfast.foreign.source import Source
from holdfast.foreign.zips import read_archive

_KNOWN = (
    "safetensors (one file, or a folder or index of several), PyTorch (.pt, .pth, .bin, the "
    "index of several, a folder by its DCP), pickles, NumPy's .npy and .npz, Keras's .keras and "
    ".weights.h5, models of XGBoost (.ubj, .json) and LightGBM (text)"
)
_OTHERS = {
    b"GGUF": "a GGUF file",
    b"\x1f\x8b": "a gzip file: unpack it first",
    b"PAR1": "a Parquet file",
}


def describe(source: Source) -> ForeignFile:
    """What the file in `source` holds; nothing in it is run.

    Where a pickle is damaged, what was found until there is in the result, with
    `problems`. Raises DamagedObject where nothing can be told; UnknownFile for a file of
    another kind.
    """
    head = source.read(0, min(source.nbytes, 512))
    if head.startswith(b"PK\3\4"):
        archive = read_archive(source)
        names = archive.entries
        arrays = any(name.endswith(".npy") for name in names)
        if any(map(is_program, names)):
            file = describe_torch(archive)
            note = "it has NumPy's arrays, too: programs disagree about what it is"
            return replace(file, notes=(*file.notes, note)) if arrays else file
        if arrays:
            return describe_npz(archive)
        if hdf5.is_keras(archive):
            return hdf5.describe_keras(archive)
        raise _unknown(source, "a zip archive, but neither PyTorch's nor NumPy's nor Keras's")
    if head.startswith(NPY_MAGIC):
        return describe_npy(source)
    if _looks_like_safetensors(source, head):
        return _with_tar(source, head, describe_safetensors(source))
    if head.startswith(hdf5.MAGIC):
        return hdf5.describe_hdf5(source)
    if boosters.is_lightgbm(head):
        return boosters.describe_lightgbm(source)
    if boosters.is_ubjson(head) or boosters.is_json(head):
        return boosters.describe_xgboost(source, text=boosters.is_json(head))
    if looks_like_tar(head) and head[:1] != b"\x80":
        return describe_tar(source)
    for magic, kind in _OTHERS.items():
        if head.startswith(magic):
            raise _unknown(source, kind)
    if (file := describe_pickle(source)) is not None:
        return _with_tar(source, head, file)
    raise _unknown(source, "of an unknown kind")


def _with_tar(source: Source, head: bytes, file: ForeignFile) -> ForeignFile:
    """A tar archive starts with a name, which can be anything; `torch.load` tries it first."""
    if not looks_like_tar(head):
        return file
    tar = describe_tar(source)
    note = "it is a tar archive, too: programs disagree about what it is"
    runs = tuple(dict.fromkeys((*file.runs, *tar.runs)))
    return replace(file, runs=runs, notes=(*file.notes, note))


def _unknown(source: Source, kind: str) -> UnknownFile:
    return UnknownFile(f"{source.name} is {kind}", hint=f"It can be one of these: {_KNOWN}.")


def _looks_like_safetensors(source: Source, head: bytes) -> bool:
    """A length, and JSON. One that cannot be its length is still one, damaged."""
    return len(head) >= 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 48


def describe_safetensors(source: Source) -> ForeignFile:
    """A `.safetensors` file. Raises DamagedObject, UnknownFile."""
    end = header_bytes(source.read(0, min(source.nbytes, 8)), source.nbytes, source.name)
    try:
        header = read_header(source.read(0, end), source.nbytes, source.name)
    except DamagedObject as error:
        if error.reason.startswith("unknown dtype"):  # the format may have grown
            text = f"a safetensors file with an {error.reason} ({error.leaf[:200]!r})"
            raise _unknown(source, text) from error
        raise
    leaves = tuple(
        ForeignLeaf(name, entry.dtype, entry.shape, entry.nbytes)
        for name, entry in sorted(header.entries.items(), key=lambda item: item[1].offset)
    )
    data_end = max((e.offset + e.nbytes for e in header.entries.values()), default=end)
    notes: list[str] = []
    if data_end < source.nbytes:
        notes.append(f"{source.nbytes - data_end:,} bytes belong to no tensor")
    # At most what a header of safetensors' size can hold, and cut for people.
    values = tuple(
        (f"metadata/{key}"[:200], text if len(text) <= 200 else text[:200] + "…")
        for key, text in header.metadata.items()
    )
    return ForeignFile("safetensors", source.nbytes, leaves, values, notes=tuple(notes))
