"""Checkpoints whose leaves are cut in boxes, as several processes write them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path

import msgspec
import numpy as np

from holdfast.core.arrays import MemoryDestination
from holdfast.core.codecs import ZSTD
from holdfast.core.digest import digest
from holdfast.core.packing import PackChunk, pack_header
from holdfast.core.plan import Part, itemsize
from holdfast.core.records import Chunk, Holder, Leaf, Manifest
from holdfast.core.shuffle_zstd import Encoder
from holdfast.manager.reader import ChunkReader
from holdfast.repo.repo import Repo
from holdfast.repo.writer import Writer
from holdfast.stores.open import open_store
from tests.support.tilings import halves

Cut = Callable[[Leaf], Sequence[Part]]


def recut(
    source: str | Path,
    target: str | Path,
    cut: Cut,
    *,
    packs: int = 2,
    compress: bool = False,
    holder: Holder | None = None,
) -> Manifest:
    """The newest checkpoint of a run, as the only one of a new run, which `holder` writes:
    each leaf in the boxes that `cut` says, dealt to several packs in turn."""
    repo = Repo(open_store(source))
    record = repo.records()[-1]
    manifest = repo.manifest(record)
    reader = ChunkReader(repo, record, manifest)
    writer = Writer.open(Repo(open_store(target)), holder=holder)
    work = writer.begin()
    entries: list[list[PackChunk]] = [[] for _ in range(packs)]
    contents: list[list[bytes]] = [[] for _ in range(packs)]
    leaves: list[list[tuple[Part, int, int, str, str]]] = []
    dealt = 0
    for number, leaf in enumerate(manifest.leaves):
        leaves.append([])
        whole = read_whole(reader, number, leaf)
        for start, shape in cut(leaf):
            box = whole[(*(slice(a, a + n) for a, n in zip(start, shape, strict=True)), ...)]
            data = box.tobytes()
            name = f"{leaf.path}@{','.join(map(str, start))}"
            entry, stored, codec = PackChunk(name, leaf.dtype, shape, len(data)), data, ""
            if compress and (small := _compressed(data, itemsize(leaf.dtype))):
                entry, stored, codec = entry.encoded(ZSTD, len(small)), small, ZSTD
            pack = dealt % packs
            leaves[-1].append(((start, shape), pack, len(contents[pack]), digest(data), codec))
            entries[pack].append(entry)
            contents[pack].append(stored)
            dealt += 1
    heads = [pack_header(listed, {}) for listed in entries]
    made = [
        writer.put_pack(work, head, data) for (head, _), data in zip(heads, contents, strict=True)
    ]
    new = msgspec.structs.replace(
        manifest,
        run=writer.run,
        epoch=writer.epoch,
        nonce=work.nonce,
        ordinal=work.ordinal,
        leaves=tuple(
            msgspec.structs.replace(
                leaf,
                chunks=tuple(
                    Chunk(
                        start,
                        shape,
                        pack,
                        heads[pack][1][at],
                        len(contents[pack][at]),
                        content,
                        codec,
                    )
                    for (start, shape), pack, at, content, codec in found
                ),
            )
            for leaf, found in zip(manifest.leaves, leaves, strict=True)
        ),
        packs=tuple(made),
    )
    writer.commit(work, new, retire=lambda records: ())
    writer.close()
    return new


def read_whole(reader: ChunkReader, number: int, leaf: Leaf) -> np.ndarray:
    whole = np.zeros(leaf.shape, f"<u{itemsize(leaf.dtype)}")
    reader.fetch([(number, MemoryDestination(whole))])
    return whole


def by_columns(leaf: Leaf) -> list[Part]:
    """As processes that have columns of it; of one dimension, the last element first."""
    if not prod(leaf.shape):
        return []
    long = [dimension for dimension, size in enumerate(leaf.shape) if size > 1]
    if not long:
        return [((0,) * len(leaf.shape), leaf.shape)]
    last = long[-1]
    size = leaf.shape[last]
    found: list[Part] = []
    for first, end in ((size // 2, size), (0, size // 2)):
        start, shape = [0] * len(leaf.shape), list(leaf.shape)
        start[last], shape[last] = first, end - first
        found.append((tuple(start), tuple(shape)))
    return found


def at_random(seed: int, most: int = 9) -> Cut:
    """Each leaf cut in two, in any dimension, again and again, and shuffled."""

    def cut(leaf: Leaf) -> list[Part]:
        if not prod(leaf.shape):
            return []
        drawn = random.Random(f"{seed} {leaf.path}")
        found: list[Part] = [((0,) * len(leaf.shape), leaf.shape)]
        for _ in range(drawn.randrange(most)):
            number = drawn.randrange(len(found))
            shape = found[number][1]
            long = [dimension for dimension, size in enumerate(shape) if size > 1]
            if long:
                dimension = drawn.choice(long)
                count = drawn.randrange(1, shape[dimension])
                found[number : number + 1] = halves(found[number], dimension, count)
        drawn.shuffle(found)
        return found

    return cut


def _compressed(data: bytes, size: int) -> bytes | None:
    room = bytearray(len(data))
    nbytes = Encoder().encode(memoryview(data), size, memoryview(room))
    return bytes(room[:nbytes]) if nbytes is not None and nbytes < len(data) else None
