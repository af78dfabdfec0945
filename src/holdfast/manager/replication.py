"""Copying checkpoints of a run to another address, and keeping a copy like the run."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from contextlib import ExitStack, closing

from holdfast.core.records import Record
from holdfast.errors import CheckpointRemoved, CorruptionError, NoStore, UsageError
from holdfast.manager.info import Transfer, info_of
from holdfast.manager.progress import counter, current_work
from holdfast.manager.transfers import Planned, Wish, plan
from holdfast.repo import keys
from holdfast.repo.copies import Source, check_target, look_at
from holdfast.repo.pace import Pace
from holdfast.repo.pack_copy import THREADS
from holdfast.repo.replicate import Replicator
from holdfast.repo.repo import Repo
from holdfast.repo.results_copy import ResultCopies
from holdfast.stores.open import open_store


def replicate(
    source: Repo,
    address: str,
    to: str | os.PathLike[str],
    wish: Wish,
    bandwidth: int | None = None,
    *,
    take_over: bool = False,
) -> list[Transfer]:
    """See `Listing.copy` and `Listing.sync`. `address` is the source's, for people.

    Where there is nothing to do, the target is not written at all.
    """
    with closing(Repo(open_store(to), clock=source.clock)) as target:
        pace = Pace(bandwidth)
        results = _replicate(source, target, address, wish, pace, take_over)
        if wish.ids is None and not wish.dry_run:
            # Of calls. They belong to no checkpoint: whoever holds the target does not matter.
            ResultCopies(source.store, target.store, pace=pace).bring(verify=wish.verify)
        return results


def _replicate(
    source: Repo, target: Repo, address: str, wish: Wish, pace: Pace, take_over: bool
) -> list[Transfer]:
    of = look_at(source)
    if wish.delete:
        source.check_log(of.head)  # what it does not list may be there all the same
    if wish.delete and not of.records:
        raise UsageError(
            f"{address} lists no checkpoint: everything in {target.address} would be removed",
            hint="Remove the copy's folder if that is what you want.",
        )
    listed = check_target(source, target, of)
    planned, missing = _plan(source, target, of, listed, wish)
    results = [_transfer(address, step) for step in planned]
    if wish.dry_run or (
        all(step.action == "keep" for step in planned)
        and not wish.verify
        and (wish.ids is not None or not _flags_differ(of, target))
    ):
        return results
    _check_room(target, missing)
    work = current_work()
    work.begin(sum(step.nbytes for step in planned if step.action != "remove"))
    count = counter(work)
    with Replicator.open(source, target, take_over=take_over, pace=pace, on_bytes=count) as copies:
        ids = {record.id for record in of.records}
        for at, step in enumerate(planned):
            there = wish.verify and step.action in ("keep", "update") and step.record.id in ids
            if step.action in ("copy", "repair") or there:
                results[at] = _copy(copies, address, step, wish)
        failed = any(result.error for result in results)
        removing = {step.record.id for step in planned if step.action == "remove"}
        if failed and removing:
            results = [_spared(result) for result in results]
            removing = set()
        updates = any(step.action == "update" for step in planned)
        if updates or removing or (wish.ids is None and not failed and _flags_differ(of, target)):
            copies.update(wish.ids, retire=lambda records: removing)
    return results


def _check_room(target: Repo, packs: Collection[int]) -> None:
    """Raise StoreFull where packs of these sizes are collected before they go to the target,
    and there is no room for as many as are on their way at once."""
    if not target.store.whole_bytes:
        return  # they are written where they stay
    with ExitStack() as stack:
        for nbytes in sorted(packs, reverse=True)[:THREADS]:
            new = target.store.create(keys.pack_key("room"), at_most_bytes=nbytes)
            stack.callback(new.discard)


def _plan(
    source: Repo, target: Repo, of: Source, listed: Sequence[Record], wish: Wish
) -> tuple[list[Planned], list[int]]:
    """What is to be done, and the sizes of the packs that are to be brought."""
    there = {
        info.key: info.size_bytes
        for folder in (keys.PACKS, keys.MANIFESTS)
        for info in target.store.list(folder)
    }
    known = {record.id: record.packs for record in listed}
    needs = {r.id: known.get(r.id) or _needs(source, r) for r in of.records}
    planned = plan(of.records, listed, wish, needs=needs, there=there)
    coming = {step.record.id for step in planned if step.action in ("copy", "repair")}
    packs = {name: size for id in coming for name, size in needs[id].items()}
    missing = [size for name, size in packs.items() if there.get(keys.pack_key(name)) != size]
    return planned, missing


def _needs(source: Repo, record: Record) -> dict[str, int]:
    """The packs that a copy of the checkpoint holds. Of a fork's only its manifest tells."""
    if record.borrowed:
        try:
            return {pack.name: pack.nbytes for pack in source.manifest(record).packs}
        except (CorruptionError, CheckpointRemoved):
            pass  # the copy will say so
    return record.packs


def _flags_differ(of: Source, target: Repo) -> bool:
    """Whether the target says otherwise of the run as a whole."""
    try:
        head = target.head()
    except NoStore:
        head = None
    ours = of.head.entry
    return head is None or (head.entry.finished, head.entry.keep) != (ours.finished, ours.keep)


def _transfer(
    address: str, step: Planned, *, nbytes: int | None = None, why: tuple[str, ...] = ()
) -> Transfer:
    size = step.nbytes if nbytes is None else nbytes
    return Transfer(info_of(address, step.record), step.action, why or step.why, size)


def _copy(copies: Replicator, address: str, step: Planned, wish: Wish) -> Transfer:
    info = info_of(address, step.record)
    try:
        copied = copies.copy(step.record.id, verify=wish.verify)
    except CheckpointRemoved as error:
        return Transfer(info, step.action, step.why, 0, error=error.message)
    except CorruptionError as error:
        return Transfer(info, step.action, step.why, 0, error=error.message, damaged=True)
    if copied.replaced and step.action != "repair":
        return Transfer(info, "repair", ("it was damaged there",), copied.nbytes)
    return _transfer(address, step, nbytes=copied.nbytes)


def _spared(result: Transfer) -> Transfer:
    """What would have been removed, had everything been copied."""
    if result.action != "remove":
        return result
    why = ("not everything was copied: nothing is removed",)
    return Transfer(result.info, "keep", why, 0)
