"""From a path to what is there: a file, or a folder of several."""

from __future__ import annotations

import os
from typing import NoReturn

from holdfast.errors import UnknownFile, UsageError
from holdfast.foreign import boosters, dcp, hdf5
from holdfast.foreign.open_arrays import open_npy, open_npz, open_safetensors
from holdfast.foreign.open_pickles import open_pickle, open_torch
from holdfast.foreign.opened import Foreign
from holdfast.foreign.reading import describe
from holdfast.foreign.shards import is_sharded, open_sharded
from holdfast.foreign.source import FileSource, Source
from holdfast.foreign.zips import read_archive


def is_foreign(path: str) -> bool:
    """Whether `path` is a file, or a folder that is known here. A run is neither.

    >>> is_foreign("/nowhere")
    False
    """
    if os.path.isdir(path):
        return not os.path.exists(os.path.join(path, "holdfast.json")) and (
            dcp.is_dcp(path) or is_sharded(path)
        )
    return os.path.isfile(path)


def open_foreign(path: str) -> Foreign:
    """What is at `path`, described, with its values to be read; nothing in it is run.

    Raises DamagedObject where nothing can be told, UnknownFile for another kind, OSError.
    """
    if os.path.isdir(path):
        if dcp.is_dcp(path):
            return dcp.open_dcp(path)
        if is_sharded(path):
            return open_sharded(path)
        raise UsageError(
            f"{path} is a folder, of neither safetensors files, nor shards with an index, nor a "
            "checkpoint by PyTorch's DCP",
            hint="Name a file in it.",
        )
    if is_sharded(path):
        return open_sharded(path)
    source = FileSource(path)
    try:
        found = _open(source)
    except BaseException:
        source.close()
        raise
    found.held.callback(source.close)
    return found


def _open(source: Source) -> Foreign:
    file = describe(source)
    kind = file.kind
    if kind in ("PyTorch (zip)", "NumPy archive", "Keras model (zip)"):
        archive = read_archive(source)
        opens = {"PyTorch (zip)": open_torch, "NumPy archive": open_npz}
        return opens.get(kind, hdf5.open_keras)(archive, file)
    if kind == "TorchScript (zip)":
        foreign = open_torch(read_archive(source), file)
        foreign.build = lambda: _no_values(source, kind)
        return foreign
    if kind == "safetensors":
        return open_safetensors(source, file)
    if kind == "NumPy array":
        return open_npy(source, file)
    if kind in ("pickle", "PyTorch (before 1.6)"):
        return open_pickle(source, file)
    if kind.startswith("XGBoost"):
        return boosters.open_xgboost(source, file)
    if kind.startswith("LightGBM"):
        return boosters.open_lightgbm(source, file)
    if "HDF5" in kind:
        return hdf5.open_hdf5(source, file)
    return _no_values(source, kind)


def _no_values(source: Source, kind: str) -> NoReturn:
    raise UnknownFile(
        f"{source.name} is {kind}: it can be shown, and not more",
        hint="Load it with the program that wrote it, and save its state_dict.",
    )
