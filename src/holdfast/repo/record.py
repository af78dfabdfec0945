"""From a manifest to the record that the log keeps of it."""

from __future__ import annotations

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
