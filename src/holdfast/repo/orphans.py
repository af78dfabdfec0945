"""Objects that no log entry lists: what a save left that never came to its commit."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from holdfast.core.address import shell_word
from holdfast.core.process import current, is_alive
from holdfast.core.records import Holder, Record
from holdfast.errors import DamagedObject, NoStore, RunHeld
from holdfast.repo import keys
from holdfast.repo.log import Head, packs_of
from holdfast.repo.repo import Repo
from holdfast.repo.writer import Writer, is_held
from holdfast.stores.base import ObjectInfo

_FOLDERS = (keys.PACKS, keys.SEGMENTS, keys.FRAGMENTS, keys.MANIFESTS)

Alive = Callable[[Holder], bool | None]


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
    """Delete what nothing lists, and unfinished files of dead processes; what it was.

    Becomes the run's writer for as long as that takes: what is found is then no save of
    another process, and one that comes back is refused its next commit. So a run with a
    live writer is left alone, and one whose writer may live elsewhere, unless `take_over`.
    Nothing is changed with `dry_run`.

    Raises RunHeld; NoStore; CorruptionError where the log must be repaired first;
    StoreReadOnly, StoreUnavailable.
    """
    refuse_if_held(repo, _whole_head(repo), take_over=take_over, alive=alive)
    if dry_run:
        return find_orphans(repo)
    writer = Writer.open(repo, take_over=take_over, alive=lambda holder: alive(holder) is not False)
    try:
        sizes = {info.key: info for folder in _FOLDERS for info in repo.store.list(folder)}
        return [sizes[key] for key in writer.collect() if key in sizes]
    finally:
        writer.close()


def refuse_if_held(repo: Repo, head: Head | None, *, take_over: bool, alive: Alive) -> None:
    """Raise RunHeld if a process writes the run, or may do so on another machine."""
    holder = head.entry.holder if head else None
    if head is None or holder is None or take_over:
        return
    if not is_held(head.entry, repo.address, current(), lambda other: alive(other) is not False):
        return
    doubt = ", and whether it still runs cannot be known from here" if alive(holder) is None else ""
    raise RunHeld(
        f"{repo.address} is held by process {holder.pid} on {holder.host}{doubt}",
        hint="Wait for it or stop it. --take-over goes on without asking: that process can "
        "then save no more.",
    )


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
