"""A checkpoint of several processes without the machinery that saves one: what each of them
captured, put together; and restores from it.

    piece = captured({"model": model})                # in each rank
    checkpoint = Joined.of(call(piece, 4))            # checks that the pieces are a checkpoint
    restore(checkpoint, {"model": other})             # in each rank of another group
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import msgspec
import numpy as np
from torch import distributed

from holdfast.core.digest import digest
from holdfast.core.group import Ranks
from holdfast.core.placement import Placement
from holdfast.core.plan import itemsize, slices
from holdfast.core.records import Chunk, Leaf
from holdfast.core.tree import TreeDecoder, TreeEncoder
from holdfast.torch.adapter import adapter


@dataclass
class Piece:
    """Of one leaf, in one rank."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    placement: Placement | None
    data: bytes = field(repr=False)


@dataclass
class Captured:
    """Of one rank."""

    tree: bytes
    pieces: list[Piece]

    def placements(self) -> dict[str, Placement | None]:
        return {piece.path: piece.placement for piece in self.pieces}


def captured(state: Mapping[str, Any], own: Any = None) -> Captured:
    """What this rank would write."""
    ranks = Ranks(distributed.get_rank(), distributed.get_world_size())
    encoder = TreeEncoder(ranks=ranks, own=own)
    adapter.mark_common(state, encoder)
    tree = encoder.encode(dict(state), "")
    pieces: list[Piece] = []
    for leaf in encoder.leaves:
        source = leaf.source
        data = bytearray(source.nbytes)
        source.copy_range(0, memoryview(data))
        source.close()
        pieces.append(Piece(leaf.path, source.dtype, source.shape, leaf.placement, bytes(data)))
    return Captured(msgspec.json.encode(tree), pieces)


@dataclass
class Joined:
    """A checkpoint as a reader sees it: the tree of rank 0, and whole leaves in chunks."""

    tree: bytes
    leaves: list[Leaf]
    chunks: list[list[tuple[Chunk, bytes]]] = field(repr=False)

    @staticmethod
    def of(ranks: list[Captured]) -> Joined:
        """Each element of a shared leaf must have been captured by each of the ranks that are
        said to hold it, with the same bytes, and by nobody else."""
        leaves: list[Leaf] = []
        all_chunks: list[list[tuple[Chunk, bytes]]] = []
        for pieces in zip(*(rank.pieces for rank in ranks), strict=True):
            first = pieces[0]
            assert {piece.path for piece in pieces} == {first.path}
            assert {piece.dtype for piece in pieces} == {first.dtype}
            if first.placement is None:
                assert all(piece.placement is None for piece in pieces), first.path
                shape, boxes = first.shape, {(0,) * len(first.shape): first}
            else:
                shape, boxes = first.placement.shape, _boxes(pieces)
            chunks = [
                (Chunk(start, piece.shape, 0, 0, len(piece.data), digest(piece.data)), piece.data)
                for start, piece in boxes.items()
            ]
            all_chunks.append(chunks)
            leaves.append(Leaf(first.path, first.dtype, shape, tuple(chunk for chunk, _ in chunks)))
        joined = Joined(ranks[0].tree, leaves, all_chunks)
        decoder = TreeDecoder(leaves)
        for number in range(len(leaves)):
            decoder.spec(number)  # the chunks tile it: every element is there once
        return joined

    @property
    def nbytes(self) -> int:
        return sum(chunk.nbytes for chunks in self.chunks for chunk, _ in chunks)


def _boxes(pieces: tuple[Piece, ...]) -> dict[tuple[int, ...], Piece]:
    """One piece for each box of a shared leaf that is not empty."""
    found: dict[tuple[int, ...], Piece] = {}
    held_by: dict[tuple[tuple[int, ...], tuple[int, ...]], set[int]] = {}
    first = pieces[0].placement
    assert first is not None, pieces[0].path
    for rank, piece in enumerate(pieces):
        where = piece.placement
        assert where is not None, piece.path
        assert where.shape == first.shape, piece.path
        for start, one in _parts(piece):
            assert rank in where.holders, piece.path
            held_by.setdefault((start, one.shape), set()).add(rank)
            twin = found.setdefault(start, one)
            assert twin.shape == one.shape, piece.path
            assert twin.data == one.data, piece.path
    for rank, piece in enumerate(pieces):
        for start, one in _parts(piece):
            assert one.placement is not None
            assert set(one.placement.holders) == held_by[start, one.shape], (piece.path, rank)
    return found


def _parts(piece: Piece) -> list[tuple[tuple[int, ...], Piece]]:
    """The boxes of a piece that are not empty, by where they begin."""
    found: list[tuple[tuple[int, ...], Piece]] = []
    at = 0
    assert piece.placement is not None
    for start, shape in piece.placement.parts(piece.shape):
        count = prod(shape) * itemsize(piece.dtype)
        data = piece.data[at : at + count]
        at += count
        if count:
            found.append((start, Piece(piece.path, piece.dtype, shape, piece.placement, data)))
    assert at == len(piece.data), piece.path
    return found


def restore(
    checkpoint: Joined,
    into: MutableMapping[str, Any] | None = None,
    *,
    seed: int | None = None,
    **selection: Any,
) -> tuple[dict[str, Any], int]:
    """The values, and how many bytes were asked for: those of chunks that reach into what a
    destination wants. With a `seed` the leaves come in other chunks than they were saved in."""
    decoder = TreeDecoder(checkpoint.leaves)
    values = decoder.apply(msgspec.json.decode(checkpoint.tree), into, **selection)
    decoder.report()
    wanted = 0
    for leaf, destination in decoder.requests:
        chunks = checkpoint.chunks[leaf]
        if seed is not None:
            chunks = _cut_again(checkpoint, leaf, np.random.default_rng([seed, leaf]))
        part = getattr(destination, "part", None)
        for chunk, data in chunks:
            if part is not None and not _meet(chunk, part):
                continue
            wanted += chunk.nbytes
            destination.write(chunk.start, chunk.shape, memoryview(data))
    decoder.run()
    return values, wanted


def _meet(chunk: Chunk, part: Any) -> bool:
    return all(
        first < start + size and start < first + count
        for first, count, start, size in zip(chunk.start, chunk.shape, *part, strict=True)
    )


def _cut_again(
    checkpoint: Joined, leaf: int, rng: np.random.Generator
) -> list[tuple[Chunk, bytes]]:
    """The leaf in halves along random dimensions."""
    record = checkpoint.leaves[leaf]
    size = itemsize(record.dtype)
    whole = np.zeros(record.shape, f"V{size}")
    for chunk, data in checkpoint.chunks[leaf]:
        whole[slices(chunk.start, chunk.shape)] = np.frombuffer(data, f"V{size}").reshape(
            chunk.shape
        )
    boxes = [((0,) * whole.ndim, whole.shape)] if whole.size else []
    for _ in range(int(rng.integers(4)) if whole.ndim else 0):
        start, shape = boxes.pop(int(rng.integers(len(boxes)))) if boxes else ((), ())
        if not shape:
            break
        dim = int(rng.integers(whole.ndim))
        half = shape[dim] // 2
        for low, count in ((0, half), (half, shape[dim] - half)):
            if count:
                boxes.append(
                    (
                        (*start[:dim], start[dim] + low, *start[dim + 1 :]),
                        (*shape[:dim], count, *shape[dim + 1 :]),
                    )
                )
    rng.shuffle(boxes)
    found: list[tuple[Chunk, bytes]] = []
    for start, shape in boxes:
        start, shape = tuple(map(int, start)), tuple(map(int, shape))
        data = whole[slices(start, shape)].tobytes()
        found.append((Chunk(start, shape, 0, 0, len(data), digest(data)), data))
    return found
