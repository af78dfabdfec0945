"""Rebuilding the list of live checkpoints from the manifests that are whole.

A starting writer does this when the newest log entries are damaged, so that a job
that restarts at night goes on. Checkpoints that were retired but not yet deleted
may come back; a retention rule removes them again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from holdfast.core.records import Manifest, Record
from holdfast.core.sealed import unseal
from holdfast.errors import CorruptionError, DamagedObject, ObjectNotFound, StoreUnavailable
from holdfast.repo import keys
from holdfast.repo.check import MANIFEST_MAX_BYTES, check_manifest
from holdfast.repo.head import Head
from holdfast.repo.log import logger
from holdfast.repo.record import localized, record_of

if TYPE_CHECKING:
    from holdfast.repo.repo import Repo

_ATTEMPTS = 5


class Rebuilt(NamedTuple):
    """Where a writer starts from."""

    records: tuple[Record, ...] | None
    """The rebuilt list; None when the log is whole."""
    base: Head | None
    """The newest intact entry."""
    number: int
    """The number of the repairing entry: above all that are there, damaged ones too."""
    epoch_floor: int
    """No epoch that a damaged entry may have used is above this."""


NOTHING_THERE = Rebuilt(None, None, 1, 0)
"""Where the first writer of a run starts from."""


def rebuild(repo: Repo) -> Rebuilt:
    """Read the log; where it is damaged, list what is whole instead (nothing is written)."""
    for _ in range(_ATTEMPTS):
        problem = f"the log of {repo.address} is damaged"
        try:
            head = repo.head()
            if head is not None and not head.damage:
                return Rebuilt(None, head, 0, 0)
            no_log = head is None
        except CorruptionError as error:
            head, no_log, problem = None, False, error.message
        # Numbers before manifests: whatever these entries list has its manifest by now,
        # and an entry that comes later takes the number that the repair wants.
        numbers = _numbers(repo)
        found = _whole_manifests(repo)
        if head is None and not numbers and not found:
            return NOTHING_THERE
        if no_log and numbers:
            continue  # another process began the run between our looks
        if _numbers(repo) == numbers and (numbers or head is None):
            break
        # Another process opened the run or saved between our looks: look again.
    else:
        raise StoreUnavailable(
            f"{repo.address} changes while its log is being repaired", hint="Start again."
        )
    known = {r.id: r for r in _readable_records(repo, head)}
    ordered = sorted(found.items(), key=lambda item: (item[1].epoch, item[1].ordinal))
    records = tuple(known.get(id) or record_of(id, manifest) for id, manifest in ordered)
    epochs = [manifest.epoch for manifest in found.values()]
    epochs += [head.entry.epoch] if head else []
    logger.error(
        "%s%srebuilt its list from %d whole checkpoint(s)",
        problem,
        "\n  " if "\n" in problem else ": ",
        len(records),
    )
    # Each damaged entry can have raised the epoch by one.
    floor = max(epochs, default=0) + len(numbers)
    return Rebuilt(records, head, max(numbers, default=0) + 1, floor)


def _numbers(repo: Repo) -> list[int]:
    found = (keys.entry_number(info.key) for info in repo.store.list(keys.LOG))
    return sorted(number for number in found if number is not None)


def _readable_records(repo: Repo, head: Head | None) -> tuple[Record, ...]:
    if head is None:
        return ()
    try:
        return repo.log.records(head.entry)
    except DamagedObject:
        return head.entry.records


def _whole_manifests(repo: Repo) -> dict[str, Manifest]:
    """Manifests that are intact and whose packs are all there in full size."""
    packs = {info.key: info.size_bytes for info in repo.store.list(keys.PACKS)}
    whole: dict[str, Manifest] = {}
    for info in repo.store.list(keys.MANIFESTS):
        id = keys.manifest_id(info.key)
        if id is None:
            continue
        try:
            data = repo.store.get(info.key, max_bytes=MANIFEST_MAX_BYTES)
            found, manifest = unseal(data, Manifest, info.key)
            if found != id:
                raise DamagedObject(info.key, "it is not the manifest that its name says")
            check_manifest(manifest, info.key)
            # A copy of a forked run holds the packs that its manifests borrow.
            own = {p.name for p in manifest.packs if packs.get(keys.pack_key(p.name)) == p.nbytes}
            manifest = localized(manifest, own)
            for pack in manifest.packs:
                size = repo.pack_size(pack) if pack.run else packs.get(keys.pack_key(pack.name))
                if size != pack.nbytes:
                    raise DamagedObject(keys.pack_key(pack.name), "it is missing or truncated")
            whole[id] = manifest
        except (DamagedObject, ObjectNotFound) as error:
            logger.warning("left out of the rebuilt list: %s", error.message)
    return whole
