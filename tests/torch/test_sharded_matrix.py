"""Every layout restores into every other, down to bits: a property test over random tensors.

What a rank should have is made here by cutting the whole tensor with torch.chunk.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed

from tests.support import ranks
from tests.support.exhaustive import EXHAUSTIVE
from tests.support.joined import Captured, Joined, captured, restore

SEEDS = range(3)
SIZES = range(1, 9)
PAIRS = [(4, 1), (1, 3), (3, 2), (2, 4), (5, 8), (8, 6), (6, 7), (7, 5)]
"""(saved, live) sizes that are always tried."""
TURNS = 3
DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float64,
    torch.int16,
    torch.bool,
    torch.complex64,
    torch.complex128,  # has no name in safetensors files: one more dimension, of bytes
]


def wholes(seed: int) -> list[torch.Tensor]:
    """Random tensors of random bits, of one to three dimensions, some of them too small to give
    each rank a row."""
    rng = np.random.default_rng(seed)
    found: list[torch.Tensor] = []
    for dtype in DTYPES:
        shape = rng.integers(1, 8, rng.integers(1, 4)).tolist()
        count = int(np.prod(shape)) * dtype.itemsize
        raw = torch.from_numpy(rng.integers(0, 2 if dtype is torch.bool else 256, count, np.uint8))
        found.append(raw.view(dtype).reshape(shape))
    found.append(torch.tensor(float(seed)))
    found.append(torch.zeros(3, 0))
    return found


Layout = tuple[tuple[int, ...], str]
"""Shape of the mesh; a letter for each of its dimensions: R, or the dimension of the tensor that
it cuts, or F: dimension 0, and cut after what is right of it, as FSDP2 does over a TP model."""


def layouts(size: int) -> list[Layout | None]:
    one: list[Layout | None] = [((size,), letter) for letter in ("R", "0", "1", "2")]
    two: list[Layout | None] = []
    if size >= 4 and size % 2 == 0:
        two += (((2, size // 2), both) for both in ("R0", "0R", "R1", "01", "00", "10", "F0"))
    if size == 8:
        two += (((4, 2), both) for both in ("0R", "00", "F0", "10"))
        two += (((2, 2, 2), three) for three in ("R00", "0R1", "010", "012", "00R"))
    return [None, *one, *two]


def placed(whole: torch.Tensor, layout: Layout | None, rank: int, *, zero: bool = False) -> Any:
    """`whole` in this layout; None: as a plain tensor. All zeros if `zero`."""
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    if layout is None:
        return torch.zeros_like(whole) if zero else whole.clone()
    shape, letters = layout
    dims = [{"R": None, "F": 0}.get(letter, letter) for letter in letters]
    dims = [None if dim is None or int(dim) >= whole.ndim else int(dim) for dim in dims]
    local = local_part(whole, layout, rank)
    local = torch.zeros_like(local) if zero else local.clone()
    placements = [Replicate() if dim is None else Shard(dim) for dim in dims]
    if letters == "F0" and whole.ndim:
        placements[0] = _StridedShard(0, split_factor=shape[1])
    return DTensor.from_local(
        local, mesh_of(shape), placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


@cache
def mesh_of(shape: tuple[int, ...]) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape)


def local_part(whole: torch.Tensor, layout: Layout, rank: int) -> torch.Tensor:
    shape, letters = layout
    at = np.unravel_index(rank, shape)
    order = reversed(range(len(shape))) if letters == "F0" else range(len(shape))
    part = whole
    for mesh_dim in order:
        letter = letters[mesh_dim].replace("F", "0")
        if letter == "R" or int(letter) >= whole.ndim:
            continue
        dim = int(letter)
        chunks = part.chunk(shape[mesh_dim], dim)
        place = int(at[mesh_dim])
        empty = part.narrow(dim, 0, 0)
        part = chunks[place] if place < len(chunks) else empty
    return part


def state(size: int, rank: int, *, turn: int = 0, zero: bool = False) -> dict[str, Any]:
    """All tensors in layouts of this world, each tensor `turn` layouts further than in the
    checkpoint. Names tell the tensor alone."""
    choices = layouts(size)
    found: dict[str, Any] = {}
    for seed in SEEDS:
        for number, whole in enumerate(wholes(seed)):
            for variant in range(COPIES):
                layout = choices[(seed + number + variant + turn) % len(choices)]
                if layout is None and not zero:
                    layout = ((size,), "R")  # plain tensors of the program are each rank's own
                found[f"{seed}.{number}.{variant}"] = placed(whole, layout, rank, zero=zero)
    return found


COPIES = 3


def world() -> tuple[int, int]:
    mesh_of.cache_clear()  # of another process group
    return distributed.get_world_size(), distributed.get_rank()


def capture_all() -> Captured:
    size, rank = world()
    return captured(state(size, rank))


def restore_all(checkpoint: Joined, turns: list[int], seed: int | None) -> int:
    """Into this world. How many tensors were compared."""
    size, rank = world()
    compared = 0
    for turn in turns:
        live = state(size, rank, turn=turn, zero=True)
        restore(checkpoint, live, seed=seed)
        expected = state(size, rank, turn=turn)
        for name, tensor in live.items():
            whole = expected[name]
            if not hasattr(tensor, "_local_tensor"):
                number = [int(part) for part in name.split(".")]
                assert same(tensor, wholes(number[0])[number[1]]), name
            else:
                assert same(tensor._local_tensor, whole._local_tensor), (name, tensor.placements)
                assert tensor.placements == whole.placements
            compared += 1
    return compared


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    bits = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*bits)


@cache
def checkpoint_of(size: int) -> Joined:
    return Joined.of(ranks.call(capture_all, size))


@pytest.mark.parametrize(("saved", "live"), list(product(SIZES, SIZES)) if EXHAUSTIVE else PAIRS)
def test_layouts_restore_into_each_other(saved: int, live: int) -> None:
    count = len(layouts(live))
    turns = list(range(count) if EXHAUSTIVE else range(saved % 2, count, -(-count // TURNS)))
    compared = ranks.call(restore_all, live, checkpoint_of(saved), turns, None)
    assert set(compared) == {len(turns) * COPIES * len(SEEDS) * len(wholes(0))}


def test_chunks_need_not_be_those_of_a_process() -> None:
    ranks.call(restore_all, 4, checkpoint_of(3), [0, 3, 7], 5)


def test_one_process_reads_whole_tensors() -> None:
    values, _ = restore(checkpoint_of(4))
    for seed in SEEDS:
        for number, whole in enumerate(wholes(seed)):
            for variant in range(COPIES):
                assert same(values[f"{seed}.{number}.{variant}"], whole)


def wanted_bytes(checkpoint: Joined) -> tuple[int, int]:
    """What a rank asks for, and what it has."""
    size, rank = world()
    live = state(size, rank, zero=True)
    _, wanted = restore(checkpoint, live)
    locals_ = [getattr(tensor, "_local_tensor", tensor) for tensor in live.values()]
    return wanted, sum(tensor.nbytes for tensor in locals_)


def test_a_rank_reads_what_it_has() -> None:
    for wanted, has in ranks.call(wanted_bytes, 4, checkpoint_of(4)):
        assert wanted == has
