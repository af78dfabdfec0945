"""How the list of live checkpoints is laid out: old records in segments, new ones in the entry.

Pure: what is read and written, and when, is the caller's. A commit adds a record or two to a
list of thousands, so an entry refers to the segments that its base has and says only what
became of their records since: which are gone (`SegmentRef.removed`), which have changed
(`Entry.edited`). New segments are written by the run's writer alone, when

- the tail has grown by a segment's worth. It takes in every segment before it that is no
  longer than itself, so segments get shorter towards the newest, each record is rewritten
  about log2(1024 / 64) times, and 10,000 checkpoints need about a dozen references;
- a record in one has changed;
- little of one is left, or what is left lies in many places.

A guest writes none: until its entry exists nothing refers to the segment, and the writer's
gc could take it for an orphan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

from holdfast.core.records import Entry, Record, SegmentRef

# A record is about 0.3 kB: an entry with 95 of them is some 35 KiB, however long the list.
TAIL_RECORDS = 32
SEGMENT_RECORDS = 64
# The longest that merging makes: 350 kB, written once in a thousand saves.
LONGEST_SEGMENT = 1024
# A segment is written anew when its live records lie in more places than this.
MOST_GAPS = 16
# Compared at once: comparing equal tuples of the same objects takes next to no time.
_BLOCK = 64

Stored = Callable[[SegmentRef], tuple[Record, ...]]
"""Every record of a segment as it was written, those that are gone since included."""


class Part(NamedTuple):
    """Live records that lie in one segment."""

    ref: SegmentRef | None
    """None: the segment is yet to be written."""
    records: tuple[Record, ...]


class Layout(NamedTuple):
    """How an entry says what is live."""

    parts: tuple[Part, ...]
    edited: tuple[Record, ...]
    tail: tuple[Record, ...]


def live_count(ref: SegmentRef) -> int:
    """How many records of the segment are live."""
    return ref.count - sum(end - first for first, end in ref.removed)


def problem_with(ref: SegmentRef, stored: Sequence[Record]) -> str:
    """What is wrong with a reference to a segment that has been read; "" = nothing."""
    if len(stored) != ref.count:
        return f"it has {len(stored)} records, not {ref.count}"
    at = 0
    for first, end in ref.removed:
        if not at <= first < end <= ref.count:
            return "the log names records that it does not have"
        at = end
    return ""


def read_parts(entry: Entry, stored: Stored) -> Iterator[tuple[Record, ...]]:
    """The live records of `entry` in parts, the newest part first; each is oldest first."""
    yield entry.records
    edited = {record.id: record for record in entry.edited}
    for ref in reversed(entry.segments):
        records = stored(ref)
        if ref.removed:
            records = tuple(records[i] for i in _positions(ref))
        if edited:
            records = tuple([edited.get(record.id, record) for record in records])
        yield records


def lay_out(
    base: Entry,
    before: tuple[Record, ...],
    after: tuple[Record, ...],
    stored: Stored,
    *,
    writes: bool,
) -> Layout:
    """How an entry made from `base`, which lists `before`, lists `after`.

    `writes`: new segments may be written (by the run's writer).
    """
    edits = {record.id: record for record in base.edited}
    parts: list[Part] = []
    at = was = 0
    for ref in base.segments:
        count = live_count(ref)
        old = before[was : was + count]
        was += count
        live = after[at : at + count]
        if live != old:
            ref, live = _follow(ref, old, stored(ref), after[at : at + count], edits)
        at += len(live)
        if live:
            parts.append(Part(ref, live))
    tail = after[at:]
    while parts and len(parts[-1].records) + len(tail) <= TAIL_RECORDS:
        tail = parts.pop().records + tail
    if edits and tail:
        for record in tail:
            edits.pop(record.id, None)
    if not writes:
        return Layout(tuple(parts), tuple(edits.values()), tail)
    parts = [Part(None, p.records) if _is_due(p, edits) else p for p in parts]
    if len(tail) >= TAIL_RECORDS + SEGMENT_RECORDS:
        full = (len(tail) - TAIL_RECORDS) // SEGMENT_RECORDS * SEGMENT_RECORDS
        for i in range(0, full, LONGEST_SEGMENT):
            parts.append(Part(None, tail[i : min(i + LONGEST_SEGMENT, full)]))
        tail = tail[full:]
    if any(part.ref is None for part in parts):
        parts = _merged(parts)
    return Layout(tuple(parts), (), tail)


def _follow(
    ref: SegmentRef,
    old: tuple[Record, ...],
    stored: tuple[Record, ...],
    after: tuple[Record, ...],
    edits: dict[str, Record],
) -> tuple[SegmentRef, tuple[Record, ...]]:
    """What is left of a segment's live records `old`: those that `after` starts with."""
    live: list[Record] = []
    positions = list(_positions(ref))
    gone = {i for first, end in ref.removed for i in range(first, end)}
    for start in range(0, len(old), _BLOCK):
        block = old[start : start + _BLOCK]
        if block == after[len(live) : len(live) + len(block)]:
            live += block
            continue
        for i, record in zip(positions[start:], block, strict=False):
            new = after[len(live)] if len(live) < len(after) else None
            if new is None or new.id != record.id:
                gone.add(i)
                edits.pop(record.id, None)
                continue
            live.append(new)
            if new == stored[i]:
                edits.pop(new.id, None)
            else:
                edits[new.id] = new
    return SegmentRef(ref.name, ref.id, ref.count, _ranges(sorted(gone))), tuple(live)


def _is_due(part: Part, edits: dict[str, Record]) -> bool:
    """Whether the writer should write the segment anew."""
    ref = part.ref
    assert ref is not None
    if len(ref.removed) > MOST_GAPS or 2 * len(part.records) < ref.count:
        return True
    return bool(edits) and any(record.id in edits for record in part.records)


def _merged(parts: Sequence[Part]) -> list[Part]:
    """`parts` with each that is no longer than the one after it joined to that one."""
    newest_first: list[Part] = []
    for part in reversed(parts):
        if newest_first:
            after = newest_first[-1].records
            both = len(part.records) + len(after)
            if len(part.records) <= len(after) and both <= LONGEST_SEGMENT:
                newest_first[-1] = Part(None, part.records + after)
                continue
        newest_first.append(part)
    return newest_first[::-1]


def _positions(ref: SegmentRef) -> Iterator[int]:
    """Where the live records of a segment are, ascending."""
    ends = (0, *(end for _, end in ref.removed))
    firsts = (*(first for first, _ in ref.removed), ref.count)
    return chain.from_iterable(map(range, ends, firsts))


def _ranges(positions: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Ascending positions as [first, end) ranges.

    >>> _ranges([0, 1, 5])
    ((0, 2), (5, 6))
    """
    ranges: list[tuple[int, int]] = []
    for i in positions:
        if ranges and ranges[-1][1] == i:
            ranges[-1] = (ranges[-1][0], i + 1)
        else:
            ranges.append((i, i + 1))
    return tuple(ranges)


def difference(
    before: tuple[Record, ...], after: tuple[Record, ...]
) -> tuple[list[Record], list[Record]]:
    """(records of `before` whose ids `after` does not list, those that only `after` lists)."""
    gone: list[Record] = []
    at = 0
    for i in range(0, len(before), _BLOCK):
        block = before[i : i + _BLOCK]
        if block == after[at : at + len(block)]:
            at += len(block)
            continue
        for record in block:
            if at < len(after) and after[at].id == record.id:
                at += 1
            else:
                gone.append(record)
    new = list(after[at:])
    moved = {record.id for record in gone} & {record.id for record in new}
    if moved:  # they only have other places
        gone = [record for record in gone if record.id not in moved]
        new = [record for record in new if record.id not in moved]
    return gone, new
