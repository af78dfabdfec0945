"""From a manifest to the record that the log keeps of it, and what records say together."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import msgspec

from holdfast.core.records import Manifest, Record
from holdfast.repo.check import leaf_nbytes


def record_of(
    id: str,
    manifest: Manifest,
    *,
    metrics: dict[str, float] | None = None,
    odd_metrics: dict[str, str] | None = None,
    tags: tuple[str, ...] = (),
    note: str = "",
) -> Record:
    """The log's record of a manifest."""
    return Record(
        id=id,
        step=manifest.step,
        ordinal=manifest.ordinal,
        time_s=manifest.time_s,
        nbytes=sum(map(leaf_nbytes, manifest.leaves)),
        new_bytes=sum(
            pack.nbytes for pack in manifest.packs if pack.born == manifest.ordinal and not pack.run
        ),
        packs={pack.name: pack.nbytes for pack in manifest.packs if not pack.run},
        borrowed=tuple(sorted({pack.run for pack in manifest.packs if pack.run})),
        metrics=metrics or {},
        odd_metrics=odd_metrics or {},
        tags=tags,
        note=note,
        pickled=manifest.pickled,
    )


def not_held(
    record: Record,
    records: Sequence[Record],
    own: Collection[str],
    borrowing: Collection[str] = (),
) -> list[str]:
    """The packs, and the parents' runs, that `record` needs and nothing holds: neither a
    checkpoint of `records` nor this save, which wrote `own` and borrows from `borrowing`."""
    packs = set(record.packs).difference(own)
    runs = set(record.borrowed).difference(borrowing)
    for other in reversed(records):  # mostly the newest one holds them all
        if not packs and not runs:
            break
        packs.difference_update(other.packs)
        runs.difference_update(other.borrowed)
    return [*packs, *runs]


def untag(records: Iterable[Record], tags: Collection[str]) -> list[Record]:
    """A tag names one checkpoint: the newest that was given it."""
    taken = set(tags)
    return [
        r
        if not r.tags or taken.isdisjoint(r.tags)
        else msgspec.structs.replace(r, tags=tuple(tag for tag in r.tags if tag not in taken))
        for r in records
    ]


def localized(manifest: Manifest, own: Collection[str]) -> Manifest:
    """`manifest` with the packs named in `own` taken as this run's, whatever it says: a copy
    of a forked run holds the packs that the fork borrows, under an unchanged manifest."""
    if not any(pack.run and pack.name in own for pack in manifest.packs):
        return manifest
    packs = [
        msgspec.structs.replace(pack, run="") if pack.name in own else pack
        for pack in manifest.packs
    ]
    return msgspec.structs.replace(manifest, packs=tuple(packs))
