"""Data whose order is drawn from a seed: arrays, and datasets of batches by number."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import keras
import numpy as np
from keras import tree

from holdfast.errors import StateError
from holdfast.keras.others import Attributes, is_index
from holdfast.keras.passes import Data

# Keras does not export what it makes of the data that `fit` is given.
from keras.src.trainers.data_adapters import array_slicing  # isort: skip


class _Seeded(Data):
    """Its order is drawn from a seed, which is drawn from NumPy's global generator."""

    def __init__(self, iterator: Any) -> None:
        super().__init__(iterator)
        self._seed: int | None = None
        self._again: tuple[int, int] | None = None
        self._start = 0

    def identity(self) -> dict[str, Any]:
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        return {**self.identity(), "seed": self._seed}

    def go_on(self, saved: dict[str, Any], taken: int) -> None:
        super().go_on(saved, taken)
        changed = [
            f"{name} was {saved.get(name)!r}, is {value!r}"
            for name, value in self.identity().items()
            if saved.get(name) != value
        ]
        if changed:
            raise StateError(
                "the data changed, and the run stopped inside an epoch of it: "
                f"{'; '.join(changed)}",
                hint="Put it back as it was, or start the run at another address.",
            )
        self._again = None if saved["seed"] is None else (saved["seed"], taken)

    def _begin(self) -> np.random.Generator:
        if self._again is not None:
            self._seed, self._start = self._again
            self._again = None
        else:
            self._seed, self._start = int(np.random.randint(1 << 31)), 0
        return np.random.default_rng(self._seed)


class Arrays(_Seeded):
    """Arrays of any make, in an order that Keras would draw (`shuffle=`)."""

    kind = "arrays"

    def __init__(self, iterator: Any) -> None:
        super().__init__(iterator)
        self._inputs: Any = None
        if keras.backend.backend() == "tensorflow":
            iterator._get_iterator = self._tensorflow
        elif keras.backend.backend() == "jax":
            self.adapter.get_jax_iterator = partial(self._begun, "jax")
        else:
            self.adapter.get_torch_dataloader = partial(self._begun, "torch")

    def identity(self) -> dict[str, Any]:
        one = self.adapter
        shuffle = one._shuffle if one._shuffle == "batch" else bool(one._shuffle)
        return {"samples": one._num_samples, "batch_size": one._batch_size, "shuffle": shuffle}

    def _order(self) -> np.ndarray[Any, Any] | None:
        """The samples in their order; None: as they are."""
        rng = self._begin()
        size, total = self.adapter._batch_size, self.adapter._num_samples
        if self.adapter._shuffle == "batch":
            return np.concatenate(
                [
                    first + rng.permutation(min(size, total - first))
                    for first in range(0, total, size)
                ]
            )
        return rng.permutation(total) if self.adapter._shuffle else None

    def _sliceable(self, target: str) -> Any:
        if self._inputs is None:
            self._inputs = array_slicing.convert_to_sliceable(
                self.adapter._inputs, target_backend=target
            )
        return self._inputs

    def _begun(self, target: str) -> Iterator[Any]:
        return self._batches(target, self._order(), self._start)

    def _batches(self, target: str, order: Any, start: int) -> Iterator[Any]:
        inputs = self._sliceable(target)
        size, total = self.adapter._batch_size, self.adapter._num_samples
        for first in range(start * size, total, size):
            last = min(first + size, total)
            which = slice(first, last) if order is None else order[first:last]

            def cut(one: Any, which: Any = which) -> Any:
                if one is None:
                    return None
                part = one[which]
                if target == "jax":
                    return one.convert_to_jax_compatible(part)
                return keras.ops.convert_to_tensor(one.convert_to_torch_compatible(part))

            yield tree.map_structure(cut, inputs)

    def _tensorflow(self) -> Any:
        import tensorflow as tf

        inputs = tree.lists_to_tuples(self._sliceable("tensorflow"))
        order, size = self._order(), self.adapter._batch_size
        if order is None:
            order = np.arange(self.adapter._num_samples)

        def gather(which: Any, data: Any) -> Any:
            def one(value: Any) -> Any:
                if isinstance(value, array_slicing.TensorflowSparseWrapper):
                    return array_slicing.slice_tensorflow_sparse_wrapper(value, which)
                if isinstance(value, list | tuple | dict):
                    return None  # go into it
                return tf.gather(value, which, axis=0) if tf.is_tensor(value) else value

            return tree.traverse(one, data)

        which = tf.data.Dataset.from_tensor_slices(order[self._start * size :]).batch(size)
        batches = tf.data.Dataset.zip((which, tf.data.Dataset.from_tensors(inputs).repeat()))
        batches = batches.map(gather, num_parallel_calls=tf.data.AUTOTUNE)
        batches = batches.prefetch(tf.data.AUTOTUNE)
        return self.iterator._distribute_strategy.experimental_distribute_dataset(batches)


class DatasetState:
    """What a `PyDataset` keeps from pass to pass: its `state_dict`, or what has changed of its
    numbers, indices and generators since this was made."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._asked = hasattr(dataset, "load_state_dict")
        skip = ("_workers", "_use_multiprocessing", "_max_queue_size")
        self._attributes = Attributes(dataset, skip=skip, wanted=is_index)

    def state(self) -> Any:
        return self._dataset.state_dict() if self._asked else self._attributes.changed()

    def put_back(self, saved: Any) -> None:
        if self._asked:
            self._dataset.load_state_dict(saved)
        else:
            self._attributes.put_back(saved)


class Sequence(_Seeded):
    """A `PyDataset`: batches by number. What was consumed is not made again."""

    kind = "PyDataset"

    def __init__(self, iterator: Any) -> None:
        super().__init__(iterator)
        adapter = self.adapter
        self.dataset = adapter.py_dataset
        self._kept = DatasetState(self.dataset)
        self._shuffle = bool(adapter.shuffle) and self.dataset.num_batches is not None
        self._view = _View(self.dataset)
        self._resumed = False
        adapter.py_dataset, adapter.shuffle = self._view, False
        if adapter.enqueuer is not None:
            adapter.enqueuer.py_dataset, adapter.enqueuer.shuffle = self._view, False
            if iterator.steps_per_epoch:
                self.known = "its workers do not keep their place from one epoch to the next"
        self._on_epoch_begin = adapter.on_epoch_begin
        adapter.on_epoch_begin = self._epoch_begins
        # TensorFlow's pipeline has the adapter's own already, which looks at the view.
        owner = iterator if keras.backend.backend() == "tensorflow" else adapter
        self._get = owner._get_iterator
        owner._get_iterator = self._begun

    def identity(self) -> dict[str, Any]:
        return {"batches": self.dataset.num_batches, "shuffle": self._shuffle}

    def state(self) -> dict[str, Any]:
        return {**super().state(), "dataset": self._kept.state()}

    def rest(self, saved: dict[str, Any], taken: int) -> None:
        self._kept.put_back(saved["dataset"])

    def go_on(self, saved: dict[str, Any], taken: int) -> None:
        super().go_on(saved, taken)
        self._resumed = taken > 0 and not self.iterator.steps_per_epoch

    def stop(self) -> None:
        if self.adapter.enqueuer is not None:
            self.adapter.enqueuer.stop()

    def _epoch_begins(self) -> None:
        if self.adapter.enqueuer is not None:
            # Batches that were made ahead of the last pass, to look at their shapes.
            self.adapter.enqueuer.ready_queue.queue.clear()
        # Workers start with it: they must know the order.
        if not self.iterator.steps_per_epoch:
            self._order()
        self._view.quiet = self._resumed  # the process before has called it
        self._resumed = False
        self._on_epoch_begin()
        self._view.quiet = False

    def _order(self) -> None:
        rng, total = self._begin(), self.dataset.num_batches
        order = rng.permutation(total) if self._shuffle else None
        self._view.set(order, self._start)

    def _begun(self) -> Any:
        if self.iterator.steps_per_epoch:
            self._order()
        return self._get()


class _View(keras.utils.PyDataset):
    """A dataset in another order, from a place inside it."""

    def __init__(self, dataset: Any) -> None:
        super().__init__()
        self._dataset = dataset
        self._order: Any = None
        self._start = 0
        self.quiet = False

    def set(self, order: Any, start: int) -> None:
        self._order, self._start = order, start

    @property
    def num_batches(self) -> int | None:
        total = self._dataset.num_batches
        return None if total is None else total - self._start

    def __getitem__(self, index: int) -> Any:
        index += self._start
        return self._dataset[index if self._order is None else int(self._order[index])]

    def on_epoch_begin(self) -> None:
        if not self.quiet:
            self._dataset.on_epoch_begin()

    def on_epoch_end(self) -> None:
        self._dataset.on_epoch_end()
