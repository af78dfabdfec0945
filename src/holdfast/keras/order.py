"""In which order `fit` goes through its data, and how it goes on inside a pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import tree

from holdfast.keras.passes import Data, Unknown
from holdfast.keras.seeded import Arrays, DatasetState, Sequence
from holdfast.run.iterables import open_feed

# Keras does not export what it makes of the data that `fit` is given.
from keras.src.trainers.data_adapters import (  # isort: skip
    array_data_adapter,
    generator_data_adapter,
    py_dataset_adapter,
    tf_dataset_adapter,
    torch_data_loader_adapter,
)


class Fed(Data):
    """A generator or a torch DataLoader: what was consumed is drawn again, or found by index."""

    kind = "feed"

    def __init__(self, iterator: Any, source: Any, settings: Callable[[Any], None]) -> None:
        super().__init__(iterator)
        if keras.distribution.distribution() is not None:
            self.known = f"a {type(source).__name__} of a distribution"
            return
        self._feed = open_feed(source)
        settings(self._feed)
        self.peeks = self._feed.length() is None
        self._open = False
        self._resumed = False
        self._before: dict[str, Any] | None = None
        self._buffer: deque[Any] = deque()
        iterator._get_iterator = self._begun

    def state(self) -> dict[str, Any]:
        if self.known:
            return {}
        return {"feed": self._feed.state() if self._before is None else self._before}

    def rest(self, saved: dict[str, Any], taken: int) -> None:
        if not self.known and saved["feed"]["at"] != "inside":
            self._feed.open(saved["feed"])

    def go_on(self, saved: dict[str, Any], taken: int) -> None:
        self.rest(saved, taken)
        if saved["feed"]["at"] == "inside":
            self._feed.open(saved["feed"], fixed="fit() has counted the batches of an epoch")
            self._open = self._resumed = True

    def peek(self, batches: int) -> bool:
        self._before = None
        if not self.peeks:
            return True
        before = self._feed.state()
        while len(self._buffer) < batches:
            try:
                self._buffer.append(self._take())
            except StopIteration:
                break
        self._before = before
        return bool(self._buffer)

    def ended(self, *, whole: bool) -> None:
        self._before = None
        if whole and not self.known and self._open:
            self._buffer.clear()
            self._feed.close()
            self._open = False

    def stop(self) -> None:
        if not self.known:
            self._feed.shutdown()

    def next(self) -> Any:
        return self._buffer.popleft() if self._buffer else self._take()

    def _begun(self) -> Any:
        if not self._resumed:
            self.ended(whole=True)
        self._resumed = False
        return _Pass(self)

    def _take(self) -> Any:
        if not self._open:
            self._feed.open(None)
            self._open = True
        return tree.map_structure(_converted, self._feed.take())


class _Pass(Iterator[Any]):
    def __init__(self, data: Fed) -> None:
        self._data = data

    def __next__(self) -> Any:
        return self._data.next()


class Pipeline(Data):
    """A `tf.data.Dataset` that draws nothing, or only from seeds."""

    kind = "tf.data"

    def __init__(self, iterator: Any) -> None:
        super().__init__(iterator)
        self._dataset = self.adapter._dataset
        self.known = _unknown(self._dataset)
        self._passes = 0
        self._skip = 0
        if self.known:
            return
        if keras.backend.backend() == "tensorflow":
            iterator._get_iterator = self._begun
        else:
            self.adapter._dataset = self  # it iterates over it, from batch to batch

    def state(self) -> dict[str, Any]:
        return {"passes": self._passes}

    def rest(self, saved: dict[str, Any], taken: int) -> None:
        # A shuffle has another order each time that it is begun.
        for _ in range(saved["passes"]):
            iter(self._dataset)
        self._passes = saved["passes"]

    def go_on(self, saved: dict[str, Any], taken: int) -> None:
        self.rest({"passes": saved["passes"] - 1}, taken)
        self._skip = taken

    def __iter__(self) -> Iterator[Any]:
        return iter(self._begun())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)

    def _begun(self) -> Any:
        self._passes += 1
        skip, self._skip = self._skip, 0
        if not skip:
            return self._dataset
        return self._dataset.skip(skip)


def data_of(iterator: Any, settings: Callable[[Any], None]) -> Data:
    """How the data of Keras' `EpochIterator` can be gone on with. It is changed for that."""
    adapter = iterator.data_adapter
    if isinstance(adapter, array_data_adapter.ArrayDataAdapter):
        return Arrays(iterator)
    if isinstance(adapter, py_dataset_adapter.PyDatasetAdapter):
        return Sequence(iterator)
    if isinstance(adapter, torch_data_loader_adapter.TorchDataLoaderAdapter):
        return Fed(iterator, adapter._dataloader, settings)
    if isinstance(adapter, generator_data_adapter.GeneratorDataAdapter):
        return Fed(iterator, adapter.generator(), settings)
    if isinstance(adapter, tf_dataset_adapter.TFDatasetAdapter):
        return Pipeline(iterator)
    return Unknown(iterator, f"nobody can tell the order of {type(adapter).__qualname__}")


class Validation:
    """The data that each epoch of a `fit` is validated with: Keras begins it anew each time.

    goes_on: it is a generator, of which each takes what the last one left.
    """

    def __init__(self, iterator: Any, saved: Any, training: Data) -> None:
        adapter = iterator.data_adapter
        self.goes_on = isinstance(adapter, generator_data_adapter.GeneratorDataAdapter)
        self._kept: DatasetState | None = None
        if not isinstance(adapter, py_dataset_adapter.PyDatasetAdapter):
            return
        if adapter.py_dataset is not training.dataset:  # else its state is that of the training
            self._kept = DatasetState(adapter.py_dataset)
            if saved is not None:
                self._kept.put_back(saved)
                adapter.on_epoch_end()  # with which Keras begins each validation

    def state(self) -> Any:
        return None if self._kept is None else self._kept.state()


def _converted(value: Any) -> Any:
    if value is None:
        return None
    if keras.backend.backend() == "jax":
        return np.asarray(value.cpu() if hasattr(value, "cpu") else value)
    return keras.ops.convert_to_tensor(value)


def _unknown(dataset: Any) -> str:
    """Why the order of a `tf.data.Dataset`, or what it does to its items, cannot be known."""
    todo, seen = [dataset], set[int]()
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        name = type(one).__name__.strip("_")
        if "Shuffle" in name and not (_is_set(one, "_seed") or _is_set(one, "_seed2")):
            return "its shuffle has no seed (keras.utils.set_random_seed, before it is made)"
        if "Generator" in name or "Random" in name:
            return f"nobody can tell what {name} does"
        for function in one._functions():
            for operation in function.function.graph.get_operations():
                if operation._is_stateful:
                    return f"{operation.type} in a function of it draws, or runs Python"
        todo.extend(one._inputs())
    return ""


def _is_set(dataset: Any, name: str) -> bool:
    value = getattr(dataset, name, None)
    return value is not None and int(value) != 0
