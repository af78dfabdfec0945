"""Live objects as they are now, to be put back after something else was restored into them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from math import prod
from typing import Any

from holdfast.core.adapters import Destination
from holdfast.core.aside import aside
from holdfast.core.frameworks import loaded_adapters
from holdfast.core.placement import Placement
from holdfast.core.plan import boxes, itemsize
from holdfast.core.records import Chunk, Leaf
from holdfast.core.rng import apply_rng, capture_rng
from holdfast.core.tree import TreeDecoder, TreeEncoder
from holdfast.manager.snapshot import HeldLeaf, SnapshotMemory, Way


class LiveState:
    """A copy of what `objects` hold, in memory, and every random state of the process: after
    `with` they are what they were, bit for bit, whatever was done and raised inside.

    So are training modes and `requires_grad` of modules, and gradients, which are taken away
    meanwhile so that nothing is added to them. Of a tensor of several processes it is what this
    one has. Raises UnsupportedValue, with nothing changed.
    """

    def __init__(self, objects: MutableMapping[str, Any], *, allow_pickle: bool = False) -> None:
        self._objects = objects
        self._allow_pickle = allow_pickle
        encoder = TreeEncoder(allow_pickle=allow_pickle, stays=True)
        try:
            self._tree = encoder.encode(dict(objects), "")
            self._placements = [leaf.placement for leaf in encoder.leaves]
            memory = SnapshotMemory()
            self._held, overlap = memory.take(encoder.leaves, lambda source, path: Way.COPIED)
            overlap.reach()
            self._rng = capture_rng()
        except BaseException:
            encoder.close()
            raise
        adapters: list[Any] = [a for a in loaded_adapters() if hasattr(a, "attributes")]
        self._attributes = [(adapter, adapter.attributes(objects)) for adapter in adapters]
        self._gradients: list[Callable[[], None]] = []

    def __enter__(self) -> LiveState:
        try:
            self._take_gradients()
        except BaseException:  # a signal's handler: it has come to its end nevertheless
            self._give_gradients()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._put_back()

    @aside
    def _take_gradients(self) -> None:
        self._gradients = self._no_gradients()

    def _no_gradients(self) -> list[Callable[[], None]]:
        verbs = [getattr(adapter, "gradients_aside", None) for adapter in loaded_adapters()]
        return [verb(self._objects) for verb in verbs if verb is not None]

    def _give_gradients(self) -> None:
        for put_back in self._gradients:
            put_back()

    def begin(self) -> None:
        """Before something is done with the objects: all random states and training modes are
        what they were, and there are no gradients."""
        for adapter, values in self._attributes:
            adapter.put_attributes(self._objects, values)
        self._no_gradients()
        apply_rng(self._rng)

    @aside
    def _put_back(self) -> None:
        leaves = tuple(map(_leaf, self._held, self._placements))
        decoder = TreeDecoder(leaves, allow_pickle=self._allow_pickle)
        try:
            decoder.apply(self._tree, self._objects)
            decoder.report()
            for index, destination in decoder.requests:
                _deliver(self._held[index], self._placements[index], destination)
        except BaseException:
            decoder.discard()
            raise
        decoder.run()
        for adapter, values in self._attributes:
            adapter.put_attributes(self._objects, values)
        self._give_gradients()
        apply_rng(self._rng)
        for held in self._held:
            if held.data is None:
                held.source.close()


def _leaf(held: HeldLeaf, placement: Placement | None) -> Leaf:
    """As if all of it were held: where only a part is, no more is asked for."""
    source = held.source
    shape = tuple(source.shape if placement is None else placement.shape)
    nbytes = prod(shape) * itemsize(source.dtype)
    whole = Chunk((0,) * len(shape), shape, 0, 0, nbytes, "")
    return Leaf(held.path, source.dtype, shape, (whole,) if nbytes else ())


def _deliver(held: HeldLeaf, placement: Placement | None, destination: Destination) -> None:
    for start, shape, data in _pieces(held, placement):
        destination.write(start, shape, data)


def _pieces(
    held: HeldLeaf, placement: Placement | None
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], memoryview]]:
    source, begin = held.source, 0
    size = itemsize(source.dtype)
    place = placement or Placement(source.shape, (0,) * len(source.shape), ())
    for first, extent in place.parts(source.shape):
        for inner, shape, inside, nbytes in boxes(extent, size):
            start = tuple(map(sum, zip(inner, first, strict=True)))
            offset = begin + inside
            if held.data is not None:
                yield start, shape, held.data[offset : offset + nbytes]
            else:  # a tracked file's copy
                data = memoryview(bytearray(nbytes))
                source.copy_range(offset, data)
                yield start, shape, data
        begin += prod(extent) * size
