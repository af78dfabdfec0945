"""Verification: every byte of a checkpoint is read and compared with its digest."""

from __future__ import annotations

from holdfast.core.records import Chunk, Leaf, Record
from holdfast.errors import CorruptionError
from holdfast.manager.info import Verification, info_of
from holdfast.manager.reader import ChunkReader, Wanted, pack_heads
from holdfast.repo.repo import Repo


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


def _drop(leaf: Leaf, chunk: Chunk, data: memoryview) -> None:
    """Verified is all that is asked."""
