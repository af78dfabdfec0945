"""A state as a file of `torch.save`, or as a folder of torch.distributed.checkpoint.

Both hold plain values and tensors only, so that they are read without any class of the program
or of Holdfast: `torch.load(file, weights_only=True)`. Tensors are in a file while they are
written (see `backing`), not in memory.
"""

from __future__ import annotations

import inspect
import os
import random
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path, PurePath
from typing import Any, cast

import numpy as np
import torch

from holdfast.core.classes import Record
from holdfast.core.stored import StoredDirectory, StoredFile
from holdfast.errors import StateError, UsageError
from holdfast.manager.tensors import sync_file
from holdfast.torch.backing import file_backed
from holdfast.torch.dtypes import DTYPES, describe

_PLAIN = (type(None), bool, int, float, complex, str, bytes, bytearray)
_TORCH = (torch.Size, torch.dtype, torch.device, torch.layout)

Read = Callable[[], Any]
"""Reads and verifies the state; what it decodes is new."""


def write_pt(read: Read, file: Path) -> tuple[list[str], list[str]]:
    """Write what `read` gives to `file`, and sync it: (names of tensors, what is left out).

    Raises OSError for a full disk; StateError if the result cannot be read as weights only.
    """
    with file_backed(file.parent):
        plain = _Plain("/")
        state = plain.whole(read())
        try:
            torch.save(state, file)
        except RuntimeError as error:
            _raise_os_error(file)
            raise StateError(f"torch.save failed: {error}") from error
    sync_file(file)
    try:
        torch.load(file, weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:  # whatever its unpickler raises
        raise StateError(
            f"torch.load(weights_only=True) would refuse the file: {error}",
            hint="Export a part of the state: --only NAME.",
        ) from error
    return plain.tensors, plain.left_out


def write_dcp(read: Read, folder: Path, target: Path) -> tuple[list[str], list[str]]:
    """As `write_pt`, to `folder`, which will be at `target`. Names are joined with points."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    class Writer(FileSystemWriter):
        def storage_meta(self) -> Any:
            meta: Any = super().storage_meta()
            meta.checkpoint_id = str(target)  # not the scratch folder
            return meta

    with file_backed(folder.parent):
        plain = _Plain(".", dense=True)
        state = plain.whole(read())
        try:
            _save_alone(state, Writer(folder))
        except CheckpointException as failed:  # no subclass of Exception
            error = next((cause for cause, _ in failed.failures.values()), failed)
            if isinstance(error, OSError) or not isinstance(error, Exception):
                raise error from None  # a full disk, Ctrl-C
            if isinstance(error, ValueError) and "duplicated" in str(error):
                raise UsageError(
                    f"two names of the state are one, joined with points ({error})",
                    hint="Export a part of it: --only NAME.",
                ) from None
            for path in folder.iterdir():
                _raise_os_error(path)
            raise StateError(f"torch.distributed.checkpoint failed: {error}") from error
    for path in folder.iterdir():
        sync_file(path)
    return plain.tensors, plain.left_out


def _save_alone(state: Any, writer: Any) -> None:
    """Without the other processes of a job, if this is one of several."""
    from torch.distributed.checkpoint import state_dict_saver

    with warnings.catch_warnings():
        # "assuming the intent is to save in a single process": it is.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        if "no_dist" in inspect.signature(state_dict_saver.save).parameters:
            state_dict_saver.save(state, storage_writer=writer, no_dist=True)
        else:  # torch 2.6
            warnings.filterwarnings("ignore", "`save_state_dict` is deprecated")
            warnings.filterwarnings("ignore", "TypedStorage is deprecated")
            state_dict_saver.save_state_dict(state, writer, no_dist=True)


def _raise_os_error(path: Path) -> None:
    """torch says of a failed write only that it failed. The disk that is full for it is full
    for this, too."""
    if path.is_file():
        with open(path, "ab") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())


class _Plain:
    """Values as plain ones; notes tensors, and what has no such form."""

    def __init__(self, between: str, *, dense: bool = False) -> None:
        """`between` joins keys in the names of tensors."""
        self._between = between
        self.tensors: list[str] = []
        self.left_out: list[str] = []
        self._dense = dense
        # By id, with the value, which keeps it: what is there twice is one object again.
        self._known: dict[int, tuple[Any, Any]] = {}

    def whole(self, state: Any) -> Any:
        """The plain form of all of it. Raises UsageError if it has none."""
        plain = self.of(state, "")
        if plain is _NOTHING:
            raise UsageError(
                f"there is no form for{self.left_out[0].removeprefix(':')}",
                hint="Name another part of the state: --only NAME.",
            )
        return plain

    def of(self, value: Any, path: str) -> Any:
        """`value`'s plain form, or `_NOTHING` after it was noted."""
        kind = type(value)
        if kind in _PLAIN or isinstance(value, _TORCH):
            return value
        if id(value) in self._known:
            return self._known[id(value)][1]
        plain = self._tensor(value, path) if _is_array(value) else self._other(value, path)
        self._known[id(value)] = (value, plain)
        return plain

    def _join(self, path: str, key: object) -> str:
        return f"{path}{self._between}{key}" if path else str(key)

    def _other(self, value: Any, path: str) -> Any:
        if isinstance(value, Mapping):
            return self._mapping(cast(Mapping[Any, Any], value), path)
        if isinstance(value, list | tuple | deque):
            items = [self.of(item, self._join(path, n)) for n, item in enumerate(value)]
            # Without one its neighbours would be at other places.
            items = [None if item is _NOTHING else item for item in items]
            return tuple(items) if isinstance(value, tuple) else items
        if isinstance(value, set | frozenset) and all(map(_is_key, value)):
            return set(value)
        if isinstance(value, Enum):
            return self.of(value.value, path)
        if isinstance(value, Record) or is_dataclass(value):
            return self._fields(value, path)
        if isinstance(value, PurePath):
            return str(value)
        if isinstance(value, torch.Generator):
            return self._tensor(value.get_state(), path)
        if (state := _generator_state(value)) is not None:
            return self.of(state, path)
        what = "a file" if isinstance(value, StoredFile | StoredDirectory) else None
        self.left_out.append(f"{path}: {what or f'a {_words(type(value))}'}")
        return _NOTHING

    def _mapping(self, value: Mapping[Any, Any], path: str) -> Any:
        plain: dict[Any, Any] = OrderedDict() if isinstance(value, OrderedDict) else {}
        for key, item in value.items():
            name = self._join(path, key)
            if not _is_key(key):
                self.left_out.append(f"{name}: its key is a {_words(type(key))}")
            elif (made := self.of(item, name)) is not _NOTHING:
                plain[key] = made
        metadata = getattr(value, "_metadata", None)
        if isinstance(metadata, Mapping):  # of a module's state_dict: versions of its parts
            plain._metadata = self.of(metadata, path)  # type: ignore[attr-defined]
        return plain

    def _fields(self, value: Any, path: str) -> Any:
        if isinstance(value, Record):
            return self._mapping(value.fields, path)
        return self._mapping({one.name: getattr(value, one.name) for one in fields(value)}, path)

    def _tensor(self, value: Any, path: str) -> Any:
        if isinstance(value, np.generic) and not value.shape:
            plain = value.item()
            if type(plain) in _PLAIN:
                return plain
        tensor = value.detach() if isinstance(value, torch.Tensor) else _from_array(value)
        if tensor is None or torch.nn.parameter.is_lazy(tensor):
            what = "uninitialized" if tensor is not None else f"{np.asarray(value).dtype} array"
            self.left_out.append(f"{path}: {what}")
            return _NOTHING
        if self._dense and tensor.layout is not torch.strided:
            self.left_out.append(f"{path}: a {describe(tensor)}")
            return _NOTHING
        self.tensors.append(path)
        return tensor


_NOTHING = object()


def _is_key(key: object) -> bool:
    if type(key) is tuple:
        return all(map(_is_key, cast(tuple[object, ...], key)))
    return type(key) in _PLAIN


def _words(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")


def _generator_state(value: object) -> Any:
    """What a random generator's own methods give and take."""
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.RandomState):
        return value.get_state(legacy=False)
    if isinstance(value, np.random.Generator):
        value = value.bit_generator
    return value.state if isinstance(value, np.random.BitGenerator) else None


def _is_array(value: object) -> bool:
    return isinstance(value, torch.Tensor | np.ndarray | np.generic) or hasattr(value, "__array__")


def _from_array(value: Any) -> torch.Tensor | None:
    """A NumPy or JAX array as a tensor; None if torch has no such dtype."""
    array = np.asarray(value)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    dtype = DTYPES.get(array.dtype.name)
    if dtype is None or array.dtype.itemsize != dtype.itemsize:
        return None
    array = np.require(array, requirements=("C", "W"))  # of one that is not to be written it warns
    raw = torch.from_numpy(np.atleast_1d(array).reshape(-1).view(np.uint8))
    return raw.view(dtype).reshape(array.shape)
