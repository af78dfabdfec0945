"""What is done all the time costs the same with 10 and with 10,000 live checkpoints.

Counted in calls, bytes and looks at records, not in seconds: each of these tests fails when
somebody makes its operation linear again.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec
import pytest

from holdfast.core.records import Record
from holdfast.core.retention import parse_keep
from holdfast.core.retiring import Retiring
from holdfast.core.types import Buffer
from holdfast.manager.listing import Listing
from holdfast.repo import keys
from holdfast.repo.head import Draft
from holdfast.repo.layout import SEGMENT_RECORDS
from holdfast.repo.log import KEEP_ENTRIES
from holdfast.repo.repo import Repo
from holdfast.repo.writer import Retire, Writer
from holdfast.stores.base import ObjectInfo
from holdfast.stores.memory import MemoryStore
from tests.repo.support import dead, process, save

FEW, MANY = 10, 10_000


class Counting(MemoryStore):
    """Counts calls and bytes, by operation and folder."""

    def __init__(self) -> None:
        super().__init__("long")
        self.calls: Counter[str] = Counter()
        self.nbytes: Counter[str] = Counter()

    def get(self, key: str, *, max_bytes: int) -> bytes:
        data = super().get(key, max_bytes=max_bytes)
        self._count("get", key, len(data))
        return data

    def put_new(self, key: str, parts: Sequence[Buffer]) -> bool:
        self._count("put", key, sum(memoryview(part).nbytes for part in parts))
        return super().put_new(key, parts)

    def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectInfo]:
        found = [*super().list(prefix, after=after)]
        self._count("list", prefix, len(found))
        return iter(found)

    def delete(self, keys: Iterable[str]) -> None:
        keys = tuple(keys)
        for key in keys:
            self._count("delete", key, 0)
        super().delete(keys)

    def _count(self, operation: str, key: str, amount: int) -> None:
        what = f"{operation} {key.partition('/')[0]}"
        self.calls[what] += 1
        self.nbytes[what] += amount


def long_run(count: int) -> tuple[Counting, Writer]:
    """A run that lists `count` checkpoints: one that was saved, and copies of its record."""
    store = Counting()
    writer = Writer.open(Repo(store), holder=process(), alive=dead)
    first = save(writer, 0, metrics={"loss": 1.0})

    def copy(step: int) -> Record:
        return msgspec.structs.replace(
            first,
            id=f"{step:063x}f",
            step=step,
            ordinal=step,
            time_s=float(step),
            packs={keys.pack_name(1, f"{step:016x}", 0, 0): 100},
            metrics={"loss": 1 / (step + 1)},
        )

    for at in range(0, count, 1000):
        steps = range(at + 1, min(at + 1000, count) + 1)
        writer.amend("copy", lambda records, steps=steps: [*records, *map(copy, steps)])
    writer.amend("drop", lambda records: records[1:])
    # New checkpoints come after the copies.
    writer._commit(lambda head, records: Draft(records, "count", {"ordinal": count}), None)
    for _ in range(KEEP_ENTRIES):  # as many entries as a log has
        writer.amend("settle", lambda records: records)
    return store, writer


@pytest.fixture
def runs() -> dict[int, tuple[Counting, Writer]]:
    return {count: long_run(count) for count in (FEW, MANY)}


def cost(store: Counting, work: Callable[[], object]) -> tuple[Counter[str], int]:
    """(calls, bytes read and written) of `work`."""
    store.calls.clear()
    store.nbytes.clear()
    work()
    nbytes = sum(n for what, n in store.nbytes.items() if not what.startswith("list"))
    return Counter(store.calls), nbytes


def newest(store: Counting, _: Writer) -> None:
    assert Listing("x", store=store).latest() is not None


def the_one_at_its_step(store: Counting, writer: Writer) -> None:
    listing = Listing("x", store=store)
    info = listing.latest()
    assert info is not None
    assert listing.info(info.step) == info
    assert listing.info(info.id) == info


def a_tag(_: Counting, writer: Writer) -> None:
    """By the writer's own process, which has read its list."""
    writer.amend("tag", lambda r: [*r[:-1], msgspec.structs.replace(r[-1], tags=("t",))])


READS = {"newest": newest, "at its step": the_one_at_its_step, "a tag": a_tag}


@pytest.mark.parametrize("what", READS)
def test_the_newest_checkpoint_is_found_in_the_newest_entry(
    what: str, runs: dict[int, tuple[Counting, Writer]]
) -> None:
    few, few_bytes = cost(runs[FEW][0], lambda: READS[what](*runs[FEW]))
    many, many_bytes = cost(runs[MANY][0], lambda: READS[what](*runs[MANY]))
    assert many == few
    # The tail of a long run's entry is fuller, and it has some references.
    assert many_bytes < few_bytes + 30_000 * (many["get log"] + many["put log"])
    assert {call.split()[1] for call in many} <= {"log", "holdfast.json"}


@pytest.mark.parametrize(
    "keep", [None, "last={n}", "last={n} every=7 best=3:loss", "within={n}s", "size={n}00B"]
)
def test_a_save_costs_the_same(keep: str | None, runs: dict[int, tuple[Counting, Writer]]) -> None:
    """In requests, bytes, and calls of functions: a loop over all records makes thousands."""
    saves = 2 * SEGMENT_RECORDS
    requests: dict[int, float] = {}
    nbytes: dict[int, float] = {}
    calls: dict[int, float] = {}
    for count, (store, writer) in runs.items():
        retire = Retiring(parse_keep(keep.format(n=count) if keep else None)).ids
        steps = itertools.count(count + 1)

        def once(writer: Writer = writer, retire: Retire = retire, steps=steps) -> None:  # type: ignore[no-untyped-def]
            save(writer, next(steps), retire=retire, metrics={"loss": 2.0})

        def often(once: Callable[[], None] = once) -> None:
            for _ in range(saves):
                once()

        once()  # looks at all records
        made, moved = cost(store, often)
        assert not {"list packs", "list manifests", "list segments", "get segments"} & made.keys()
        requests[count], nbytes[count] = made.total() / saves, moved / saves
        calls[count] = median_calls(once)
    assert requests[MANY] < requests[FEW] + 0.2  # a segment now and then
    assert nbytes[MANY] < nbytes[FEW] + 60_000  # the tail is fuller: written, and read once
    assert calls[MANY] < calls[FEW] + 1500  # one segment is looked through


def median_calls(work: Callable[[], object]) -> float:
    """How many functions, of C too, `work` calls."""
    counts: list[int] = []
    for _ in range(9):
        seen = 0

        def count(frame: object, event: str, arg: object) -> None:
            nonlocal seen
            seen += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            work()
        finally:
            sys.setprofile(None)
        counts.append(seen)
    return statistics.median(counts)


def test_a_process_that_opens_a_run_reads_a_few_segments(
    runs: dict[int, tuple[Counting, Writer]],
) -> None:
    store, _ = runs[MANY]
    calls, _ = cost(store, lambda: Repo(store).records())
    assert calls["get segments"] <= 16
    calls, _ = cost(store, lambda: Writer.open(Repo(store), holder=process(), alive=dead))
    assert calls["get segments"] <= 16
    assert calls["put segments"] == calls["list packs"] == calls["list manifests"] == 0
