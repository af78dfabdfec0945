"""Checks of a manifest's own arithmetic, before anything is allocated or read.

A manifest's digest proves that it is what somebody wrote, not that it is sane: a
store can be hostile. After these checks the bytes that a restore allocates are
bounded by the bytes of the packs, times what the best compression can do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from holdfast.core.codecs import CODECS, MAX_RATIO, RAW
from holdfast.core.plan import is_inside, itemsize, tiles
from holdfast.core.records import Chunk, Leaf, Manifest, Pack
from holdfast.core.types import GiB
from holdfast.errors import DamagedObject, FormatTooNew, HoldfastError
from holdfast.repo import keys

MANIFEST_MAX_BYTES = 2 * GiB
"""Of a manifest as it is stored; a larger object is none."""
_DIMENSIONS = 64


def check_manifest(manifest: Manifest, key: str) -> None:
    """Raise DamagedObject unless every leaf is tiled by chunks inside its packs;
    FormatTooNew if one is stored in a way that a later version brought.

    Ranges of a pack must not overlap, so that a small pack cannot pose as a large
    state.
    """
    for pack in manifest.packs:
        if not keys.is_name(pack.name):
            raise DamagedObject(key, f"it names an unsafe pack {pack.name!r}")
        if not 0 <= pack.head_nbytes <= pack.nbytes:
            raise DamagedObject(key, f"pack {pack.name} has an impossible size")
    ranges = [[(0, pack.head_nbytes)] for pack in manifest.packs]
    seen: set[str] = set()
    for leaf in manifest.leaves:
        if leaf.path in seen:
            raise DamagedObject(key, "two leaves have this path", leaf=leaf.path)
        seen.add(leaf.path)
        _check_codecs(leaf, key)
        problem = _leaf_problem(leaf, manifest, ranges)
        if problem:
            raise DamagedObject(key, problem, leaf=leaf.path)
    for pack, used in zip(manifest.packs, ranges, strict=True):
        used.sort()
        if any(first[1] > second[0] for first, second in pairwise(used)):
            raise DamagedObject(key, f"chunks overlap in pack {pack.name}")


def leaf_nbytes(leaf: Leaf) -> int:
    """Logical bytes of a leaf. Raises HoldfastError for an unknown dtype."""
    return math.prod(leaf.shape) * itemsize(leaf.dtype)


def _check_codecs(leaf: Leaf, key: str) -> None:
    for chunk in leaf.chunks:
        if chunk.codec not in CODECS:
            raise FormatTooNew(
                f"{leaf.path!r} in {key} has a chunk with the codec {chunk.codec!r}, which this "
                "Holdfast does not know",
                hint="Upgrade: pip install -U holdfast",
            )


def _leaf_problem(leaf: Leaf, manifest: Manifest, ranges: list[list[tuple[int, int]]]) -> str:
    try:
        size = itemsize(leaf.dtype)
    except HoldfastError as error:
        return error.message
    if len(leaf.shape) > _DIMENSIONS or any(n < 0 for n in leaf.shape):
        return f"its shape {leaf.shape} is impossible"
    if not tiles(leaf.shape, [(chunk.start, chunk.shape) for chunk in leaf.chunks]):
        return _tiling_problem(leaf)
    for chunk in leaf.chunks:
        problem = _chunk_problem(chunk, math.prod(chunk.shape) * size, manifest.packs)
        if problem:
            return problem
        ranges[chunk.pack].append((chunk.offset, chunk.offset + chunk.nbytes))
    return ""


def _tiling_problem(leaf: Leaf) -> str:
    """For people: why its chunks do not tile a leaf."""
    elements = 0
    for chunk in leaf.chunks:
        if len(chunk.start) != len(leaf.shape) or len(chunk.shape) != len(leaf.shape):
            return "a chunk has other dimensions than the leaf"
        if not is_inside(leaf.shape, chunk.start, chunk.shape):
            return f"a chunk at {chunk.start} is empty, or lies outside its shape {leaf.shape}"
        elements += math.prod(chunk.shape)
    if elements < math.prod(leaf.shape):
        return "its chunks do not cover it"
    return "its chunks do not tile it"


def _chunk_problem(chunk: Chunk, nbytes: int, packs: Sequence[Pack]) -> str:
    if not 0 <= chunk.pack < len(packs):
        return f"it names pack {chunk.pack} of {len(packs)}"
    if chunk.codec == RAW:
        fits = chunk.nbytes == nbytes
    else:
        fits = 0 < chunk.nbytes < nbytes <= chunk.nbytes * MAX_RATIO
    if not fits:
        return "a chunk's bytes do not fit its shape"
    if chunk.offset < 0 or chunk.offset + chunk.nbytes > packs[chunk.pack].nbytes:
        return "a chunk lies outside its pack"
    return ""
