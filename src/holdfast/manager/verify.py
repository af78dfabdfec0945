"""Verification: every byte of a checkpoint is read and compared with its digest."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from holdfast.core.records import Record
from holdfast.core.retention import ordered
from holdfast.core.units import format_list
from holdfast.errors import CheckpointRemoved, CorruptionError, NoIntactCheckpoint
from holdfast.manager.info import Verification, info_of
from holdfast.manager.reader import ChunkReader, Wanted, pack_heads
from holdfast.repo.repo import Repo

logger = logging.getLogger("holdfast")


def verify(repo: Repo, record: Record, address: str) -> Verification:
    """Check manifest, packs and every chunk. Damage is in the result, not raised.

    Raises CheckpointRemoved if a prune took the checkpoint meanwhile; StoreUnavailable.
    """
    info = info_of(address, record)
    try:
        manifest = repo.manifest(record)
        reader = ChunkReader(repo, record, manifest)
        reader.check_packs(manifest.leaves)
    except CorruptionError as error:
        return Verification(info, False, (error.message,), 0)
    wanted = [Wanted(leaf, chunk, _drop) for leaf in manifest.leaves for chunk in leaf.chunks]
    wanted += pack_heads(manifest)
    problems = reader.survey(wanted)
    lines = tuple(sorted(problem.message for problem in problems))
    return Verification(info, not lines, lines, reader.bytes_read)


def newest_intact(
    repo: Repo, records: Iterable[Record], address: str
) -> tuple[str, frozenset[str]]:
    """The id of the newest of `records` that is intact, and those of the damaged after it.

    Reads from the newest backwards, no further than it must. Raises NoIntactCheckpoint;
    CheckpointRemoved if others removed them all meanwhile; StoreUnavailable.
    """
    damaged: dict[str, str] = {}
    removed: CheckpointRemoved | None = None
    for record in reversed(ordered(records)):
        try:
            found = verify(repo, record, address)
        except CheckpointRemoved as error:
            removed = error
            continue
        if found.ok:
            for line in damaged.values():
                logger.error("%s", line)
            return record.id, frozenset(damaged)
        damaged[record.id] = f"checkpoint {found.info.ref} is damaged: {found.problems[0]}"
    if removed is not None and not damaged:
        raise removed
    raise NoIntactCheckpoint(
        f"none of the {len(damaged)} checkpoint(s) of {address} is intact, so none was removed:"
        + format_list(list(damaged.values())),
        hint=f"Look at the damage: holdfast verify {address}. What is whole in one of them "
        "may be all that is left.",
    )


def _drop(start: Sequence[int], shape: Sequence[int], data: memoryview) -> None:
    """Verified is all that is asked."""
