"""However a list changes, its entries and segments say what is live, and stay short."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.records import Entry, Record, SegmentRef
from holdfast.repo import layout
from holdfast.repo.layout import (
    LONGEST_SEGMENT,
    SEGMENT_RECORDS,
    TAIL_RECORDS,
    difference,
    lay_out,
    live_count,
    problem_with,
    read_parts,
)
from tests.core.policy_records import record


class Lists:
    """Entries after entries, their segments kept in a dict."""

    def __init__(self) -> None:
        self.stored: dict[str, tuple[Record, ...]] = {}
        self.entry = Entry(
            run="r", number=0, commit="", parent=None, epoch=1, time_s=0.0, action=""
        )
        self.records: tuple[Record, ...] = ()

    def commit(self, records: tuple[Record, ...], *, writes: bool = True) -> int:
        """Make it the list; how many segments were written."""
        found = lay_out(self.entry, self.records, records, self._stored, writes=writes)
        count = 0
        refs: list[SegmentRef] = []
        for ref, live in found.parts:
            if ref is None:
                count += 1
                ref = SegmentRef(f"s{len(self.stored)}", "", len(live))
                self.stored[ref.name] = live
            assert not problem_with(ref, self.stored[ref.name])
            assert live_count(ref) == len(live) > 0
            refs.append(ref)
        self.entry = msgspec.structs.replace(
            self.entry, segments=tuple(refs), edited=found.edited, records=found.tail
        )
        self.records = records
        assert self.read() == records
        return count

    def read(self) -> tuple[Record, ...]:
        parts = list(read_parts(self.entry, self._stored))
        return tuple(record for part in reversed(parts) for record in part)

    def _stored(self, ref: SegmentRef) -> tuple[Record, ...]:
        return self.stored[ref.name]


@st.composite
def changes(draw: st.DrawFn, records: tuple[Record, ...], fresh: int) -> tuple[Record, ...]:
    """What some transaction makes of a list."""
    new = tuple(record(fresh + i) for i in range(draw(st.integers(0, 5))))
    kind = draw(st.sampled_from(["add", "remove", "edit", "untag", "reorder", "rebuild"]))
    if kind == "add" or not records:
        return records + new
    chosen = draw(st.sets(st.integers(0, len(records) - 1), max_size=8))
    if kind == "remove":
        return tuple(r for i, r in enumerate(records) if i not in chosen) + new
    if kind == "edit":
        tag = draw(st.sampled_from(["", "gold"]))
        tags = (tag,) if tag else ()
        return tuple(
            msgspec.structs.replace(r, tags=tags) if i in chosen else r
            for i, r in enumerate(records)
        )
    if kind == "untag":
        return tuple(msgspec.structs.replace(r, tags=()) if r.tags else r for r in records)
    if kind == "reorder":
        return new + tuple(draw(st.permutations(records)))
    # As read anew by another process: equal records, other objects.
    return tuple(msgspec.structs.replace(r) for r in records) + new


@given(st.data())
def test_what_is_laid_out_reads_back(data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in [
            ("TAIL_RECORDS", 2),
            ("SEGMENT_RECORDS", 2),
            ("LONGEST_SEGMENT", 8),
            ("MOST_GAPS", 2),
            ("_BLOCK", 3),
        ]:
            patch.setattr(layout, name, value)
        lists = Lists()
        for turn in range(data.draw(st.integers(1, 12))):
            before = lists.records
            after = data.draw(changes(before, 100 * turn + 1))
            writes = data.draw(st.booleans())
            written = lists.commit(after, writes=writes)
            assert written == 0 or writes
            assert not writes or (len(lists.entry.records) < 4 and not lists.entry.edited)
            gone, new = difference(before, after)
            assert {r.id for r in gone} == {r.id for r in before} - {r.id for r in after}
            assert {r.id for r in new} == {r.id for r in after} - {r.id for r in before}


def test_ten_thousand_saves_write_little_and_leave_few_references() -> None:
    lists = Lists()
    written = rewritten = 0
    for step in range(1, 10_001):
        before = set(lists.stored)
        written += lists.commit((*lists.records, record(step)))
        rewritten += sum(len(lists.stored[name]) for name in lists.stored.keys() - before)
        assert len(lists.entry.segments) <= 16
        assert len(lists.entry.records) < TAIL_RECORDS + SEGMENT_RECORDS
    assert written <= 10_000 / SEGMENT_RECORDS
    assert rewritten <= 5 * 10_000  # log2(LONGEST_SEGMENT / SEGMENT_RECORDS) + 1
    assert max(map(len, lists.stored.values())) == LONGEST_SEGMENT


def test_a_run_that_keeps_the_newest_thousands_rewrites_nothing_for_the_oldest() -> None:
    lists = Lists()
    for step in range(1, 3001):
        lists.commit((*lists.records, record(step)))
    written = sum(lists.commit((*lists.records[1:], record(3000 + i))) for i in range(1, 641))
    # One per SEGMENT_RECORDS that are new, and one when half of the oldest is gone.
    assert written <= 640 / SEGMENT_RECORDS + 1
    assert len(msgspec.json.encode(lists.entry)) < 40_000


def test_a_guest_changes_old_records_with_a_few_bytes() -> None:
    lists = Lists()
    for step in range(1, 3001):
        lists.commit((*lists.records, record(step)))
    size = len(msgspec.json.encode(lists.entry))
    records = list(lists.records)
    records[1500] = msgspec.structs.replace(records[1500], tags=("gold",))
    del records[700]
    assert lists.commit(tuple(records), writes=False) == 0
    assert len(msgspec.json.encode(lists.entry)) < size + 600
    # The writer's next commit puts the changed record into a segment again.
    assert lists.commit((*records, record(3001))) >= 1
    assert lists.entry.edited == ()


@pytest.mark.parametrize("removed", [((0, 3),), ((1, 1),), ((-1, 1),), ((1, 2), (0, 1)), ((2, 1),)])
def test_a_reference_to_records_that_are_not_there_is_damage(
    removed: tuple[tuple[int, int], ...],
) -> None:
    stored = (record(1), record(2))
    assert problem_with(SegmentRef("s", "", 2, removed), stored)
    assert problem_with(SegmentRef("s", "", 3), stored)
    assert not problem_with(SegmentRef("s", "", 2, ((0, 1), (1, 2))), stored)
