"""Verification: every byte of a checkpoint is read and compared with its digest."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import replace

from holdfast.core.address import shell_word
from holdfast.core.records import Record
from holdfast.core.retention import ordered
from holdfast.core.units import format_list
from holdfast.errors import (
    CheckpointRemoved,
    CorruptionError,
    DamagedObject,
    NoIntactCheckpoint,
    ObjectNotFound,
    UsageError,
)
from holdfast.manager.info import Verification, info_of
from holdfast.manager.reader import ChunkReader, Wanted, pack_heads
from holdfast.repo import keys
from holdfast.repo.mend import Mended, mend_manifest, mend_packs
from holdfast.repo.repo import Repo
from holdfast.stores.addresses import real_address
from holdfast.stores.open import open_store

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


def verify_all(
    repo: Repo,
    records: Sequence[Record],
    address: str,
    repair_from: str | os.PathLike[str] | None = None,
) -> list[Verification]:
    """As `verify`, of all `records`, after what is damaged of them was replaced by what is
    whole in the run at `repair_from`.

    Raises UsageError if the two runs are one; NoStore where the other is none; StoreReadOnly,
    StoreFull.
    """
    if repair_from is None:
        return [verify(repo, record, address) for record in records]
    store = open_store(repair_from)
    if real_address(repo.address) == real_address(store.address):
        raise UsageError(f"{address} cannot be repaired from itself", hint="Name a copy of it.")
    with closing(Repo(store, clock=repo.clock)) as other:
        other.info()  # before anything is read for long
        results = [verify(repo, record, address) for record in records]
        damaged = [r for r, found in zip(records, results, strict=True) if not found.ok]
        if not damaged:
            return results
        repo.store.prepare_writing()
        mended = _mend(repo, other, damaged)
    if all(m.problem for done in mended.values() for m in done):
        return [_with(result, mended.get(result.info.id, ())) for result in results]
    # What was replaced may have been all that was wrong with others, too.
    return [
        result if result.ok else _with(verify(repo, record, address), mended.get(record.id, ()))
        for record, result in zip(records, results, strict=True)
    ]


def _mend(repo: Repo, other: Repo, damaged: Sequence[Record]) -> dict[str, list[Mended]]:
    """What was done for each checkpoint, by its id. An object that several need is named once."""
    mended: dict[str, list[Mended]] = {record.id: [] for record in damaged}
    for record in damaged:
        manifest = mend_manifest(repo, record, other)
        mended[record.id] += [manifest] if manifest else []
        known = {m.key for done in mended.values() for m in done}
        packs = [n for n in _damaged_packs(repo, record) if keys.pack_key(n) not in known]
        mended[record.id] += mend_packs(repo, packs, other)
    return mended


def _with(result: Verification, mended: Iterable[Mended]) -> Verification:
    return replace(
        result,
        repaired=tuple(m.key for m in mended if not m.problem),
        unrepaired=tuple(f"{m.key}: {m.problem}" for m in mended if m.problem),
    )


def _damaged_packs(repo: Repo, record: Record) -> list[str]:
    """Names of the packs of this run, of which the checkpoint needs something that is not
    there or not right."""
    try:
        manifest = repo.manifest(record)
    except CorruptionError:
        return []
    bad: set[str] = set()
    for pack in manifest.packs:
        try:
            right = repo.pack_size(pack) == pack.nbytes
        except (ObjectNotFound, DamagedObject):
            right = False
        if not right:
            bad.add(pack.name)
    wanted = [Wanted(leaf, chunk, _drop) for leaf in manifest.leaves for chunk in leaf.chunks]
    wanted = [
        one
        for one in (*wanted, *pack_heads(manifest))
        if manifest.packs[one.chunk.pack].name not in bad
    ]
    problems = ChunkReader(repo, record, manifest).survey(wanted)
    bad |= {keys.pack_of(problem.key) for problem in problems}
    return [pack.name for pack in manifest.packs if pack.name in bad and not pack.run]


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
        hint=f"Look at the damage: holdfast verify {shell_word(address)}. "
        "What is whole in one of them may be all that is left.",
    )


def _drop(start: Sequence[int], shape: Sequence[int], data: memoryview) -> None:
    """Verified is all that is asked."""
