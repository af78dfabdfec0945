"""Parts of the list of checkpoints that are objects of their own, as `layout` divides it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from holdfast.core.records import Record, Segment, SegmentRef
from holdfast.core.sealed import seal, unseal
from holdfast.core.types import MiB
from holdfast.errors import DamagedObject, ObjectNotFound
from holdfast.repo import keys
from holdfast.repo.layout import Layout, Part, problem_with
from holdfast.stores.base import Store

# Of entries and segments alike: the format's limit.
ENTRY_MAX_BYTES = 256 * MiB


class Segments:
    """Reads and writes them, and keeps those it has seen. Not thread-safe, as the log."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._seen: dict[str, tuple[Record, ...]] = {}
        """As they are stored, by name."""

    def read(self, ref: SegmentRef) -> tuple[Record, ...]:
        """Every record of one, as it was written. Raises DamagedObject, also if it is missing."""
        if (seen := self._seen.get(ref.name)) is not None:
            return seen
        key = keys.segment_key(ref.name)
        if not keys.is_name(ref.name):
            raise DamagedObject(key, "it has an unsafe name")
        try:
            id, segment = unseal(self._store.get(key, max_bytes=ENTRY_MAX_BYTES), Segment, key)
        except ObjectNotFound:
            raise DamagedObject(key, "it is missing") from None
        if id != ref.id:
            raise DamagedObject(key, "it is not the segment that the log names")
        if problem := problem_with(ref, segment.records):
            raise DamagedObject(key, problem)
        self._seen[ref.name] = segment.records
        return segment.records

    def put(
        self, layout: Layout, name: Callable[[], str] | None, run: str
    ) -> tuple[SegmentRef, ...]:
        """References to all parts of the list, once those that are new are written, each
        under a `name()`. Raises as `Store.put_new`."""

        def put(part: Part) -> SegmentRef:
            if part.ref is not None:
                return part.ref
            assert name is not None  # a guest's layout has none
            return self._put_one(name(), part.records, run)

        return tuple(map(put, layout.parts))

    def _put_one(self, name: str, records: tuple[Record, ...], run: str) -> SegmentRef:
        id, data = seal(Segment(run=run, records=records))
        if not self._store.put_new(keys.segment_key(name), [data]):
            self._store.settle(keys.segment_key(name))
        self._seen[name] = records
        return SegmentRef(name=name, id=id, count=len(records))

    def forget(self, names: Iterable[str]) -> None:
        """Drop those that are no longer listed."""
        for name in names:
            self._seen.pop(name, None)
