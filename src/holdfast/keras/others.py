"""What other callbacks, and datasets, keep in their attributes."""

from __future__ import annotations

import csv
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np
from keras import callbacks as kc

from holdfast.run.randomness import libraries, owner_of

# What changes in Keras' own callbacks. All else in them is how they were made, which a
# program may change from one start to the next.
_KNOWN: dict[str, tuple[str, ...]] = {
    "EarlyStopping": ("wait", "stopped_epoch", "best", "best_epoch", "best_weights"),
    "ReduceLROnPlateau": ("wait", "cooldown_counter", "best"),
    "ModelCheckpoint": (
        "best",
        "_batches_seen_since_last_saving",
        "_last_batch_seen",
        "_current_epoch",
    ),
    "History": ("history", "epoch"),
    "SwapEMAWeights": ("_ema_weights_in_model",),
    "TensorBoard": ("_global_train_batch", "_global_test_batch"),
}
# `min_delta` changes its sign when the first value is looked at, in each process.
_NEVER = frozenset({"model", "_model", "params", "monitor_op", "min_delta"})
_LARGE = 1 << 24  # an index of more entries is left alone


class Others:
    """The state of the callbacks beside ours."""

    def __init__(self, callbacks: Iterable[Any]) -> None:
        counts: Counter[str] = Counter()
        self._callbacks: dict[str, Any] = {}
        self._attributes: dict[str, Attributes] = {}
        for callback in callbacks:
            name = type(callback).__qualname__
            key = f"{name}-{counts[name]}"
            counts[name] += 1
            self._callbacks[key] = callback
            if not (_ours(callback) or hasattr(callback, "load_state_dict")):
                self._attributes[key] = Attributes(callback, skip=_NEVER)

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, callback in self._callbacks.items():
            if hasattr(callback, "load_state_dict"):
                state = callback.state_dict()
            else:
                state = {
                    name: _copy(getattr(callback, name))
                    for name in _known(callback)
                    if hasattr(callback, name)
                }
                if key in self._attributes:
                    state.update(self._attributes[key].changed())
            if state:
                found[key] = state
        return found

    def put_back(self, saved: dict[str, Any]) -> None:
        """Callbacks that the checkpoint does not know stay as they are."""
        for key, state in saved.items():
            callback = self._callbacks.get(key)
            if callback is None:
                continue
            if hasattr(callback, "load_state_dict"):
                callback.load_state_dict(state)
            elif key in self._attributes:
                self._attributes[key].put_back(state)
            else:
                for name, value in state.items():
                    setattr(callback, name, _copy(value))


class Attributes:
    """The plain attributes of an object that have changed since this was made: numbers, texts,
    arrays, generators of random numbers, and lists, tuples and dicts of them."""

    def __init__(
        self,
        owner: Any,
        *,
        skip: Iterable[str] = (),
        wanted: Callable[[Any], bool] = lambda value: True,
    ) -> None:
        self._owner = owner
        self._skip = frozenset(skip)
        self._wanted = wanted
        self._libraries = libraries()
        self._first = {name: _digest(value) for name, value in self._plain()}

    def changed(self) -> dict[str, Any]:
        return {
            name: _copy(value)
            for name, value in self._plain()
            if self._first.get(name) != _digest(value)
        }

    def put_back(self, saved: dict[str, Any]) -> None:
        for name, value in saved.items():
            live = getattr(self._owner, name, None)
            if (library := owner_of(live, self._libraries)) is not None:
                library.write(live, value)
            elif isinstance(live, np.ndarray) and live.shape == np.shape(value):
                live[...] = value  # others may hold the same one
            else:
                setattr(self._owner, name, _copy(value))

    def _plain(self) -> Iterator[tuple[str, Any]]:
        for name, value in vars(self._owner).items():
            if name in self._skip:
                continue
            if (library := owner_of(value, self._libraries)) is not None:
                yield name, library.read(value)
            elif _is_plain(value) and self._wanted(value):
                yield name, value


def is_index(value: Any) -> bool:
    """Whether it may say in which order a dataset hands out its data: no data itself."""
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and value.dtype.kind in "iu" and value.size < _LARGE
    if isinstance(value, list | tuple):
        return len(value) < _LARGE and all(isinstance(one, int) for one in value)
    return not isinstance(value, dict)


def keep_rows(callbacks: Iterable[Any]) -> None:
    """Before `on_train_begin` of a run that goes on: `CSVLogger` would empty its file."""
    for callback in callbacks:
        if isinstance(callback, kc.CSVLogger):
            callback.append = True


def drop_rows(callbacks: Iterable[Any], epoch: int) -> None:
    """Rows of epochs that will be run again leave the files of `CSVLogger`."""
    for callback in callbacks:
        if not isinstance(callback, kc.CSVLogger) or not os.path.exists(callback.filename):
            continue
        with open(callback.filename, newline="") as file:
            rows = list(csv.reader(file, delimiter=callback.sep))
        kept = list(rows)
        while kept and kept[-1][:1] and kept[-1][0].isdigit() and int(kept[-1][0]) >= epoch:
            kept.pop()
        if kept == rows:
            continue
        beside = f"{callback.filename}.tmp"
        with open(beside, "w", newline="") as file:
            csv.writer(file, delimiter=callback.sep).writerows(kept)
        opened = callback.csv_file
        if opened and not opened.closed:
            opened.close()
        os.replace(beside, callback.filename)
        callback.append_header = not kept
        callback.csv_file = open(callback.filename, "a")  # noqa: SIM115 -- it closes it


def _known(callback: Any) -> tuple[str, ...]:
    for kind in type(callback).__mro__:
        if kind.__name__ in _KNOWN and kind is getattr(kc, kind.__name__, None):
            return _KNOWN[kind.__name__]
    return ()


def _ours(callback: Any) -> bool:
    """Whether all of its state is known here: it is a class of Keras itself."""
    return type(callback).__module__.split(".")[0] == keras.__name__


def _is_plain(value: Any, depth: int = 4) -> bool:
    if value is None or isinstance(value, bool | int | float | str | np.generic):
        return True
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biufc"
    if depth and type(value) in (list, tuple):
        return all(_is_plain(one, depth - 1) for one in value)
    if depth and type(value) is dict:
        return all(isinstance(key, str) and _is_plain(value[key], depth - 1) for key in value)
    return False


def _copy(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple):
        return type(value)([_copy(one) for one in value])
    if isinstance(value, dict):
        return {key: _copy(one) for key, one in value.items()}
    return value


def _digest(value: Any) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    _feed(found, value)
    return found.digest()


def _feed(found: Any, value: Any) -> None:
    if isinstance(value, np.ndarray):
        found.update(f"{value.dtype}{value.shape}".encode())
        found.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, list | tuple):
        found.update(f"[{len(value)}".encode())
        for one in value:
            _feed(found, one)
    elif isinstance(value, dict):
        found.update(f"{{{len(value)}".encode())
        for key, one in value.items():
            found.update(repr(key).encode())
            _feed(found, one)
    else:
        found.update(f"{type(value).__name__}{value!r}".encode())
