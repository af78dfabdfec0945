"""Objects that no log entry lists: what a save left that never came to its commit."""

from __future__ import annotations

from collections.abc import Iterable

from holdfast.core.address import shell_word
from holdfast.core.process import is_alive
from holdfast.core.records import Record
from holdfast.errors import DamagedObject, NoStore
from holdfast.repo import keys
from holdfast.repo.head import Head, packs_of
from holdfast.repo.holding import Alive, refuse_if_held
from holdfast.repo.repo import Repo
from holdfast.repo.writer import Writer
from holdfast.stores.base import ObjectInfo

_FOLDERS = (keys.PACKS, keys.SEGMENTS, keys.FRAGMENTS, keys.MANIFESTS)


def find_orphans(repo: Repo) -> list[ObjectInfo]:
    """Objects that nothing lists, as a reader sees them.

    Beside a live writer some may belong to a save that is under way: only the writer can
    tell, so this is for looking. Raises NoStore, CorruptionError, StoreUnavailable.
    """
    # In this order: what appears between the two is not on the list of what is found.
    found = [info for folder in _FOLDERS for info in repo.store.list(folder)]
    head = _whole_head(repo)
    live = _live_keys(head, repo.log.records(head.entry))
    return [info for info in found if info.key not in live and _is_ours(info.key)]


def collect_orphans(
    repo: Repo, *, dry_run: bool = False, take_over: bool = False, alive: Alive = is_alive
) -> list[ObjectInfo]:
    """Delete what nothing lists, unfinished files and scratch objects of dead processes; what
    it was that nothing lists.

    Becomes the run's writer for as long as that takes: what is found is then no save of
    another process, and one that comes back is refused its next commit. So a run with a
    live writer is left alone, and one whose writer may live elsewhere, unless `take_over`.
    Nothing is changed with `dry_run`.

    Raises RunHeld; NoStore; CorruptionError where the log must be repaired first;
    StoreReadOnly, StoreUnavailable.
    """
    refuse_if_held(_whole_head(repo).entry, repo.address, take_over=take_over, alive=alive)
    if dry_run:
        return find_orphans(repo)
    writer = Writer.open(repo, take_over=take_over, alive=lambda holder: alive(holder) is not False)
    try:
        sizes = {info.key: info for folder in _FOLDERS for info in repo.store.list(folder)}
        return [sizes[key] for key in writer.collect(thorough=True) if key in sizes]
    finally:
        writer.close()


def _whole_head(repo: Repo) -> Head:
    repo.info()
    head = repo.head()
    if head is None:
        raise NoStore(f"the run in {repo.address} has no checkpoints yet")
    if head.damage:
        raise DamagedObject(
            f"{repo.address}/log",
            "; ".join(head.damage),
            hint=f"Rebuild its list first: holdfast doctor {shell_word(repo.address)} --repair",
        )
    return head


def _live_keys(head: Head, records: Iterable[Record]) -> set[str]:
    records = tuple(records)
    live = {keys.pack_key(name) for name in packs_of(records)}
    live |= {keys.segment_key(ref.name) for ref in head.entry.segments}
    return live | {keys.manifest_key(record.id) for record in records}


def _is_ours(key: str) -> bool:
    return keys.manifest_id(key) is not None or keys.owner(key) is not None
