"""What a run and its copy have to do with each other: whether one is a copy of the other, and
what the copy's list says."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import msgspec

from holdfast.core.records import Manifest, Record
from holdfast.errors import CorruptionError, DamagedObject, NoStore, OtherRun, UsageError
from holdfast.repo import keys
from holdfast.repo.check import MANIFEST_MAX_BYTES
from holdfast.repo.head import REBUILT, Head
from holdfast.repo.lending import is_fork_pin
from holdfast.repo.record import untag
from holdfast.repo.repo import Repo, manifest_of
from holdfast.repo.run_info import check_run
from holdfast.stores.addresses import real_address


class Source(NamedTuple):
    """The run that is copied, as of one look at its log."""

    head: Head
    records: tuple[Record, ...]

    def record(self, id: str) -> Record | None:
        return next((record for record in self.records if record.id == id), None)


def as_copied(record: Record, manifest: Manifest) -> Record:
    """The record of a copy: it holds every pack itself, also those that the source borrows
    from a run it was forked from. Pins of runs that were forked from the source are no
    concern of the copy."""
    return msgspec.structs.replace(
        record,
        packs={pack.name: pack.nbytes for pack in manifest.packs},
        borrowed=(),
        pins=tuple(pin for pin in record.pins if not is_fork_pin(pin)),
    )


def merged(old: Record, new: Record) -> Record:
    """What the target lists as `old`, with what the source's log says now. Pins are added and
    never taken: they may be the target's own."""
    pins = {*old.pins, *(pin for pin in new.pins if not is_fork_pin(pin))}
    return msgspec.structs.replace(
        old,
        metrics=new.metrics,
        odd_metrics=new.odd_metrics,
        tags=new.tags,
        note=new.note,
        pins=old.pins if pins == set(old.pins) else tuple(sorted(pins)),
    )


def with_copy(records: Sequence[Record], copy: Record) -> tuple[Record, ...]:
    """The list with `copy` in its place: where it is already, else by its ordinal."""
    others = untag(records, copy.tags) if copy.tags else list(records)
    for at, record in enumerate(records):
        if record.id == copy.id:
            new = merged(record, copy)
            others[at] = msgspec.structs.replace(new, packs=copy.packs, borrowed=())
            return tuple(others)
    at = len(others)
    while at and others[at - 1].ordinal > copy.ordinal:
        at -= 1
    return (*others[:at], copy, *others[at:])


def updated(
    records: Sequence[Record], source: Sequence[Record], ids: Collection[str] | None = None
) -> tuple[Record, ...]:
    """The target's list with what the source's log says now, of all copies or of `ids`."""
    new = {r.id: r for r in source if ids is None or r.id in ids}
    tags = {tag for r in new.values() for tag in r.tags}
    others = untag(records, tags) if tags else records
    return tuple(
        merged(before, new[before.id]) if before.id in new else other
        for before, other in zip(records, others, strict=True)
    )


def changes_of(
    of: Source,
    head: Head,
    before: Sequence[Record],
    after: Sequence[Record],
    keep: str | None,
) -> dict[str, Any]:
    """The other fields of the target's next entry."""
    newest = after[-1].id if after else ""
    changes: dict[str, Any] = {
        "ordinal": max(head.entry.ordinal, max((r.ordinal for r in after), default=0)),
        "keep": of.head.entry.keep if keep is None else keep,
    }
    # Whether the run is finished is said of its newest checkpoint.
    if of.records and newest == of.records[-1].id:
        changes["finished"] = of.head.entry.finished
    elif not before or newest != before[-1].id:
        changes["finished"] = False
    return changes


# -- source and target -----------------------------------------------------------------


def look_at(source: Repo) -> Source:
    """The newest entry of the run to copy. Raises NoStore; CorruptionError where no list
    can be read."""
    source.info()
    head, records = source.listed()
    if head is None:
        raise NoStore(f"the run in {source.address} has no checkpoints yet")
    return Source(head, records)


def check_target(source: Repo, target: Repo, of: Source) -> tuple[Record, ...]:
    """What a copy of the run lists, none where there is no run yet.

    Raises UsageError if the two are one; OtherRun if the target is no copy of the run.
    """
    if real_address(source.address) == real_address(target.address):
        raise UsageError(
            f"{source.address} is the source and the target", hint="Name another address."
        )
    try:
        found = target.info()
    except (NoStore, CorruptionError):
        return ()  # whoever opens it finds out
    check_run(found.run, source.info(), target.address)
    try:
        head, records = target.listed()
    except CorruptionError:
        return ()
    if head is not None and head.id == of.head.id:
        raise UsageError(
            f"{target.address} is {source.address} under another name",
            hint="Name another address.",
        )
    check_line(target.address, of, records)
    return records


def check_line(address: str, of: Source, records: Sequence[Record]) -> None:
    """Raise OtherRun if the target has checkpoints that the source never had: both went on
    from the same ones."""
    ids = {record.id for record in of.records}
    taken = {record.ordinal for record in of.records}
    strange = [
        record
        for record in records
        if record.id not in ids
        and (record.ordinal > of.head.entry.ordinal or record.ordinal in taken)
    ]
    if strange and of.head.damage:
        raise DamagedObject(
            "the log of the run to copy", f"it does not list what {address} has", hint=REBUILT
        )
    if strange:
        steps = ", ".join(f"{record.step:,}" for record in strange[:4])
        raise OtherRun(
            f"{address} went on by itself: the source never had its checkpoint(s) at step {steps}",
            hint="Copy to another address. If these are not needed, remove them (holdfast rm).",
        )


def put_manifest(target: Repo, id: str, data: bytes) -> None:
    """Have the target hold this manifest, durable, in place of a damaged one."""
    key = keys.manifest_key(id)
    if target.store.put_new(key, [data]):
        return
    try:
        target.store.settle(key)
        manifest_of(id, target.store.get(key, max_bytes=MANIFEST_MAX_BYTES))
    except DamagedObject:
        target.store.delete([key])
        target.store.put_new(key, [data])
        target.store.settle(key)
