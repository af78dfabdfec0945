"""Destinations that hold a box of a larger leaf: what is read for them, and what comes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdfast.core.adapters import Destination
from holdfast.core.arrays import MemoryDestination, raw_view
from holdfast.core.leaves import chunks_for
from holdfast.core.plan import Part, overlap
from holdfast.core.records import Leaf, Manifest
from holdfast.core.tree import TreeDecoder
from holdfast.errors import DamagedObject
from holdfast.manager import CheckpointManager, reader
from holdfast.manager.reader import ChunkReader
from holdfast.manager.restore import fill
from holdfast.repo import keys
from holdfast.repo.repo import Repo
from holdfast.stores.open import open_store
from holdfast.torch.memory import TensorDestination
from tests.support.jobs import fresh_address
from tests.support.recut import by_columns, recut
from tests.support.tilings import SHAPES, parts_of, tilings

DTYPES = ["?", "u1", "<i2", "<f4", "<c8", "<f8", "<c16", "<M8[s]", "S3"]


def opened(address: str) -> tuple[ChunkReader, Manifest]:
    repo = Repo(open_store(address))
    record = repo.records()[-1]
    manifest = repo.manifest(record)
    return ChunkReader(repo, record, manifest), manifest


def saved_as(array: np.ndarray, parts: Sequence[Part], compress: bool = False) -> str:
    """A run whose only leaf is `array`, cut in these boxes."""
    whole, cut = fresh_address(), fresh_address()
    with CheckpointManager(whole) as manager:
        manager.save(1, {"x": array}).result()

    def by(leaf: Leaf) -> Sequence[Part]:
        if leaf.path != "x":  # random states
            return [((0,) * len(leaf.shape), leaf.shape)] if prod(leaf.shape) else []
        # What has no name has its bytes as last dimension, which nobody cuts.
        more = leaf.shape[array.ndim :]
        return [((*start, *(0,) * len(more)), (*shape, *more)) for start, shape in parts]

    recut(whole, cut, by, compress=compress)
    return cut


def part_of(array: np.ndarray, part: Part) -> np.ndarray:
    start, shape = part
    return array[(*(slice(a, a + n) for a, n in zip(start, shape, strict=True)), ...)]


def random_array(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed)
    nbytes = prod(shape) * np.dtype(dtype).itemsize
    top = 2 if dtype == "?" else 256
    return drawn.integers(0, top, nbytes, np.uint8).view(dtype).reshape(shape)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SHAPES.filter(lambda shape: len(shape) > 0), st.sampled_from(DTYPES), st.data())
def test_an_array_that_holds_a_part(
    shape: tuple[int, ...], dtype: str, data: st.DataObject
) -> None:
    array = random_array(shape, dtype, data.draw(st.integers(0, 99)))
    address = saved_as(array, data.draw(tilings(shape)), data.draw(st.booleans()))
    part = data.draw(parts_of(shape))
    wanted = part_of(array, part)
    ours = np.full(wanted.shape, 1, dtype)
    if data.draw(st.booleans()):
        ours = ours.T.copy().T  # not in C order
    more = raw_view(ours).shape[ours.ndim :]
    box: Part = ((*part[0], *(0,) * len(more)), (*part[1], *more))
    chunks, manifest = opened(address)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "_HOLE_BYTES", 0)
        chunks.fetch([(0, MemoryDestination(ours, part=box))])
    assert ours.tobytes() == wanted.tobytes()
    reached = [c for c in manifest.leaves[0].chunks if overlap(c.start, c.shape, *box)]
    assert chunks.bytes_read == sum(chunk.nbytes for chunk in reached)


@settings(max_examples=60, deadline=None)
@given(
    SHAPES.filter(lambda shape: len(shape) > 0),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.complex128, torch.bool]),
    st.data(),
)
def test_a_tensor_that_holds_a_part(
    shape: tuple[int, ...], dtype: torch.dtype, data: st.DataObject
) -> None:
    """Of whole chunks, and of those that lie in it in part; contiguous, and not."""
    whole = torch.randint(0, 2, shape).to(dtype)
    part = data.draw(parts_of(shape))
    index = tuple(slice(a, a + n) for a, n in zip(*part, strict=True))
    ours = torch.ones(whole[index].shape, dtype=dtype)
    if data.draw(st.booleans()):
        ours = (
            ours.mT.contiguous().mT
            if ours.ndim > 1
            else torch.ones(2 * len(ours), dtype=dtype)[::2]
        )
    more = (16,) if dtype == torch.complex128 else ()
    zeros = (0,) * len(more)
    to = TensorDestination(ours, part=((*part[0], *zeros), (*part[1], *more)))
    for start, extent in data.draw(tilings(shape)):
        box = whole[tuple(slice(a, a + n) for a, n in zip(start, extent, strict=True))]
        content = memoryview(box.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        to.write((*start, *zeros), (*extent, *more), content)
    assert torch.equal(ours, whole[index])


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.data())
def test_a_tensor_takes_boxes_of_any_shape(shape: tuple[int, ...], data: st.DataObject) -> None:
    whole = torch.arange(prod(shape)).reshape(shape)
    ours = torch.zeros_like(whole)
    to = TensorDestination(ours)
    for start, extent in data.draw(tilings(shape)):
        box = whole[tuple(slice(a, a + n) for a, n in zip(start, extent, strict=True))]
        to.write(start, extent, memoryview(box.contiguous().numpy().tobytes()))
    assert torch.equal(ours, whole)


def test_a_part_must_have_the_shape_of_what_holds_it() -> None:
    with pytest.raises(ValueError, match="no box"):
        MemoryDestination(np.zeros((2, 3)), part=((0, 0), (3, 2)))
    with pytest.raises(ValueError, match="no box"):
        MemoryDestination(np.zeros(2, "c16"), part=((0,), (2,)))
    MemoryDestination(np.zeros(2, "c16"), part=((0, 0), (2, 16)))
    with pytest.raises(ValueError, match="no box"):
        TensorDestination(torch.zeros(2, 3), part=((0, 0), (2,)))


def test_destinations_without_a_part_need_every_chunk() -> None:
    _, manifest = opened(saved_as(np.arange(6), [((3,), (3,)), ((0,), (3,))]))
    leaf = manifest.leaves[0]
    none: list[Destination] = [
        MemoryDestination(np.zeros(6)),
        TensorDestination(torch.zeros(6)),
        _Nothing(),
    ]
    for destination in none:
        assert list(chunks_for(leaf, destination)) == list(leaf.chunks)
    assert not chunks_for(leaf, MemoryDestination(np.zeros(0), part=((2,), (0,))))


class _Nothing:
    def write(self, start: Sequence[int], shape: Sequence[int], data: memoryview) -> None: ...


def test_packs_that_hold_nothing_of_a_part_are_not_asked_for() -> None:
    """One is gone: who does not need it does not know."""
    array = np.arange(24.0).reshape(4, 6)
    address = saved_as(array, [((0, 3), (4, 3)), ((0, 0), (4, 3))])
    store = open_store(address)
    chunks, manifest = opened(address)
    right, left = [manifest.packs[chunk.pack] for chunk in manifest.leaves[0].chunks]
    assert right != left
    store.delete([keys.pack_key(right.name)])
    ours = np.zeros((2, 2))
    chunks.fetch([(0, MemoryDestination(ours, part=((1, 1), (2, 2))))])
    assert (ours == array[1:3, 1:3]).all()
    with pytest.raises(DamagedObject, match="packs/"):
        chunks.fetch([(0, MemoryDestination(np.zeros((2, 2)), part=((1, 2), (2, 2))))])


def test_a_restore_of_parts_reads_no_header_of_other_packs() -> None:
    array = np.arange(24.0).reshape(4, 6)
    address = saved_as(array, [((0, 3), (4, 3)), ((0, 0), (4, 3))])
    _, manifest = opened(address)
    repo = Repo(open_store(address))
    [right, _] = manifest.leaves[0].chunks
    repo.store.delete([keys.pack_key(manifest.packs[right.pack].name)])
    ours = np.zeros((2, 2))
    for part, there in (((1, 1), (2, 2)), True), (((1, 2), (2, 2)), False):
        decoder = TreeDecoder(manifest.leaves)
        decoder.request(0, MemoryDestination(ours, part=part))
        if there:
            fill(repo, repo.records()[-1], manifest, decoder, heads="needed")
            assert (ours == array[1:3, 1:3]).all()
        else:
            with pytest.raises(DamagedObject, match="packs/"):
                fill(repo, repo.records()[-1], manifest, decoder, heads="needed")


def test_damage_in_a_chunk_that_is_reached_in_part_is_found() -> None:
    array = np.arange(24.0).reshape(4, 6)
    address = saved_as(array, [((0, 3), (4, 3)), ((0, 0), (4, 3))])
    chunks, manifest = opened(address)
    [bad, _] = manifest.leaves[0].chunks
    name = keys.pack_key(manifest.packs[bad.pack].name)
    store: Any = open_store(address)
    content = bytearray(store.get(name, max_bytes=1 << 20))
    content[bad.offset + bad.nbytes - 1] ^= 1  # of its last row
    store.delete([name])
    assert store.put_new(name, [content])
    ours = np.zeros((1, 1))
    with pytest.raises(DamagedObject, match="digest"):
        chunks.fetch([(0, MemoryDestination(ours, part=((0, 3), (1, 1))))])
    assert ours[0, 0] == 0
    chunks.fetch([(0, MemoryDestination(ours, part=((1, 1), (1, 1))))])
    assert ours[0, 0] == array[1, 1]


def test_columns_have_two_boxes() -> None:
    """What the tests of readers rely on: these are not in C order."""
    leaf = Leaf("x", "U8", (3, 4), ())
    assert by_columns(leaf) == [((0, 2), (3, 2)), ((0, 0), (3, 2))]
