"""What a loss of power can leave of one file or folder: see crashfs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

BLOCK_BYTES = 4096
SECTOR_BYTES = 512
GARBAGE = bytes(range(1, 256)) * 17  # what a reused block may hold


@dataclass
class File:
    """What is in it now, and what of that is on the disk for certain."""

    inode: int
    content: bytearray = field(default_factory=bytearray)
    synced: bytes = b""
    writes: list[tuple[int, bytes]] = field(default_factory=list)
    """(offset, bytes) since the last sync, no piece crossing a block."""
    size: int = 0
    """The largest size since the last sync."""
    lost: bool = False
    """A sync failed: its blocks count as written, and no later sync writes them."""

    def is_clean(self) -> bool:
        return not self.writes and self.size == len(self.synced)


@dataclass
class Folder:
    """The names in it now, and those that are on the disk for certain."""

    inode: int
    parent: Folder | None
    names: dict[str, File | Folder] = field(default_factory=dict)
    synced: dict[str, File | Folder] = field(default_factory=dict)
    changes: list[tuple[str, File | Folder | None]] = field(default_factory=list)
    """(name, what it names now or None) since the last sync."""


def variants(node: File | Folder, chance: random.Random) -> list[object]:
    """What can be left of one file or folder: from nothing unsynced to all of it."""
    if isinstance(node, Folder):
        return list(_folder_variants(node, chance))
    return list(dict.fromkeys(_file_variants(node, chance)))


def _folder_variants(node: Folder, chance: random.Random) -> Iterator[dict[str, File | Folder]]:
    for kept in subsets(len(node.changes), chance):
        names = dict(node.synced)
        for (name, now), is_there in zip(node.changes, kept, strict=True):
            if not is_there:
                continue
            if now is None:
                names.pop(name, None)
            else:
                names[name] = now
        yield names


def _file_variants(node: File, chance: random.Random) -> Iterator[bytes]:
    if node.is_clean():
        yield node.synced
        return
    for kept in subsets(len(node.writes), chance):
        for torn in {None, *(index for index, is_there in enumerate(kept) if is_there)}:
            for fill in (b"", GARBAGE):
                for is_long in (False, True):
                    yield _content(node, kept, torn, fill, is_long)
    yield bytes(node.content)


def _content(
    node: File, kept: Sequence[bool], torn: int | None, fill: bytes, is_long: bool
) -> bytes:
    size = max(node.size, len(node.synced))
    content = bytearray(node.synced.ljust(size, b"\0"))
    for at in range(len(node.synced), size if fill else 0, BLOCK_BYTES):
        piece = fill[: min(BLOCK_BYTES, size - at)]
        content[at : at + len(piece)] = piece
    end = len(node.synced)
    for index, ((offset, data), is_there) in enumerate(zip(node.writes, kept, strict=True)):
        if not is_there:
            continue
        piece = data[: max(1, min(SECTOR_BYTES, len(data) // 2))] if index == torn else data
        content[offset : offset + len(piece)] = piece
        end = max(end, offset + len(data))
    return bytes(content if is_long else content[:end])


def subsets(count: int, chance: random.Random, most: int = 64) -> Iterator[tuple[bool, ...]]:
    """Which of `count` things are there: none first, all last; sampled if too many."""
    if 2**count <= most:
        yield from itertools.product((False, True), repeat=count)
        return
    for index in range(0, count, max(1, count // 16)):  # prefixes
        yield tuple(at < index for at in range(count))
    for index in range(0, count, max(1, count // 16)):  # one missing
        yield tuple(at != index for at in range(count))
    for _ in range(16):
        yield tuple(chance.random() < 0.5 for _ in range(count))
    yield (True,) * count


def choices(counts: Sequence[int], limit: int, chance: random.Random) -> Iterator[tuple[int, ...]]:
    """Indices into lists of these lengths."""
    total = 1
    for count in counts:
        total *= count
    if total <= limit * 4:  # many give the same disk
        yield from itertools.product(*(range(count) for count in counts))
        return
    lowest = [0] * len(counts)
    highest = [count - 1 for count in counts]
    yield tuple(lowest)
    yield tuple(highest)
    for at, count in enumerate(counts):
        for index in range(count):
            for others in (highest, lowest):
                yield (*others[:at], index, *others[at + 1 :])
    for _ in range(limit * 4):
        yield tuple(chance.randrange(count) for count in counts)
