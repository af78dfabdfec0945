"""Bringing a run back from its mirror where nothing of it is left: a new machine, a disk
that was wiped.

The run is then the copy, made by the same code as the mirror: the same ids, the same
manifests, every byte verified on the way. It goes on from there as the run that it was.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence, Set
from contextlib import closing

from holdfast.core.address import printable, shell_word
from holdfast.core.records import Record
from holdfast.core.retention import KeepPolicy, decide
from holdfast.core.units import format_list
from holdfast.errors import (
    CheckpointRemoved,
    CorruptionError,
    HoldfastError,
    NoIntactCheckpoint,
    NoStore,
    OtherRun,
    StoreError,
    StoreUnavailable,
)
from holdfast.manager.mirror_status import listed_in
from holdfast.manager.progress import counter, current_work
from holdfast.repo.copies import Source, look_at
from holdfast.repo.head import Draft, Head
from holdfast.repo.holding import seen_alive
from holdfast.repo.mirrors import expect, expect_no_more, expected
from holdfast.repo.pace import Pace
from holdfast.repo.replicate import Replicator
from holdfast.repo.repo import Repo
from holdfast.repo.results_copy import ResultCopies
from holdfast.repo.writer import Writer
from holdfast.stores.open import open_store

logger = logging.getLogger("holdfast")


def lists_nothing(local: Repo) -> bool:
    """Whether the run is not there, or has no checkpoint. One whose list is damaged is there."""
    try:
        local.info()
        return not local.newest(1)
    except NoStore:
        return True
    except CorruptionError:
        return False


def bring_back(
    local: Repo, mirror: str, keep: KeepPolicy, *, take_over: bool = False
) -> frozenset[str]:
    """Have `local`, which lists nothing, be the run of the mirror, and list the newest
    checkpoint of the mirror that is intact, and those that are the best by `keep`, tagged or
    pinned. Their ids; none where the mirror has no checkpoint, or is another run's.

    Raises StoreUnavailable if the mirror cannot be asked: to start from nothing could mean to
    do again what is saved there. NoIntactCheckpoint; RunHeld; what stores raise.
    """
    with closing(Repo(open_store(mirror), clock=local.clock)) as other:
        try:
            info = other.info()
            head, records = other.listed()
        except NoStore:
            return frozenset()
        except StoreError as error:
            raise StoreUnavailable(
                f"{printable(local.address)} has no checkpoint, and whether its mirror has one "
                f"cannot be known: {error.message}",
                hint="Start again when it can be reached. To begin at step 0 whatever is there, "
                "leave mirror= out.",
            ) from None
        try:
            if head is None or not records:
                # A mirror that was made for a run of which nothing is left: this is that run.
                above = head.entry.epoch if head else 0
                Writer.open(
                    local, take_over=take_over, copy_of=info, above=above, alive=seen_alive
                ).close()
                return frozenset()
            copies = _copies(other, local, take_over)
        except OtherRun as error:
            logger.error("%s is not brought back: %s", printable(local.address), error.message)
            return frozenset()
        with copies:
            return _bring(copies, Source(head, records), keep)


def bring_results(local: Repo, mirror: str) -> None:
    """Have the results of calls that the mirror has, if it is the same run's. Without them they
    are computed again: an error is told, and no more."""
    try:
        with closing(Repo(open_store(mirror), clock=local.clock)) as other:
            if other.info().run == local.info().run:
                ResultCopies(other.store, local.store, pace=Pace()).bring()
    except NoStore:
        pass
    except (HoldfastError, OSError) as error:
        why = error.message if isinstance(error, HoldfastError) else str(error)
        logger.warning(
            "%s: results of calls are not brought back from %s: %s",
            printable(local.address),
            printable(mirror),
            why,
        )


def _copies(mirror: Repo, local: Repo, take_over: bool) -> Replicator:
    count = counter(current_work())
    return Replicator.open(mirror, local, take_over=take_over, alive=seen_alive, on_bytes=count)


def _bring(copies: Replicator, of: Source, keep: KeepPolicy) -> frozenset[str]:
    # First: if the newest ones are damaged, or are gone before they are here, the next save
    # must not take an ordinal that the mirror knows another checkpoint by.
    def after_all(head: Head, records: tuple[Record, ...]) -> Draft:
        newest = max(head.entry.ordinal, of.head.entry.ordinal)
        return Draft(records, "sync", {"ordinal": newest})

    copies.writer.transact(after_all)
    # As soon as one is listed, the run counts as being here: the rest must not be forgotten.
    expect(copies.target, copies.writer.epoch, sorted(_besides(of.records, keep)))
    brought: set[str] = set()
    damaged: list[str] = []
    tried: set[str] = set()
    while not brought:
        record = next((r for r in reversed(of.records) if r.id not in tried), None)
        if record is None:
            if not damaged:
                return frozenset()
            raise NoIntactCheckpoint(
                f"none of the {len(damaged)} checkpoint(s) of {copies.source.address} is intact, "
                f"and {copies.target.address} has none:" + format_list(damaged),
                hint=f"Look at the damage: holdfast verify {shell_word(copies.source.address)}.",
            )
        tried.add(record.id)
        if _copy(copies, record, keep, damaged):
            brought.add(record.id)
        else:
            of = look_at(copies.source)
    brought |= _bring_those(copies, of, _besides(of.records, keep) - tried, keep)
    expect_no_more(copies.target)
    return frozenset(brought)


def _besides(records: Sequence[Record], keep: KeepPolicy) -> set[str]:
    """Ids of those that are wanted for another reason than their age."""
    return {d.record.id for d in decide(records, KeepPolicy(last=1, best=keep.best)) if d.keep}


def _bring_those(copies: Replicator, of: Source, ids: Set[str], keep: KeepPolicy) -> set[str]:
    """Those of `ids` that are here now, newest first; damaged ones stay away."""
    wanted = [record for record in reversed(of.records) if record.id in ids]
    return {record.id for record in wanted if _copy(copies, record, keep, [])}


def go_on(local: Repo, mirror: str, keep: KeepPolicy, *, take_over: bool = False) -> frozenset[str]:
    """Bring back what an earlier process did not, since it was stopped in between; the ids.

    Raises nothing that the mirror raises: with what is here training can go on, and the next
    start tries again.
    """
    ids = set(expected(local))
    if not ids:
        return frozenset()
    there = listed_in(mirror)  # quickly, or not now
    if there is None:
        logger.warning(
            "%s: %d checkpoint(s) are still to be brought back from %s, which does not answer; "
            "the next start tries again",
            printable(local.address),
            len(ids),
            printable(mirror),
        )
        return frozenset()
    try:
        brought: set[str] = set()
        missing = (ids & there) - {record.id for record in local.records()}
        if missing:
            with (
                closing(Repo(open_store(mirror), clock=local.clock)) as other,
                _copies(other, local, take_over) as copies,
            ):
                brought = _bring_those(copies, look_at(other), missing, keep)
        expect_no_more(local)
    except (HoldfastError, OSError) as error:
        why = error.message if isinstance(error, HoldfastError) else str(error)
        logger.warning(
            "%s: not all is brought back from %s, the next start tries again: %s",
            printable(local.address),
            printable(mirror),
            why,
        )
        return frozenset()
    return frozenset(brought)


def _copy(copies: Replicator, record: Record, keep: KeepPolicy, damaged: list[str]) -> bool:
    there = copies.sizes()
    current_work().extend(sum(n for name, n in record.packs.items() if there.get(name) != n))
    try:
        copies.copy(record.id, keep=str(keep))
    except CheckpointRemoved:
        return False
    except CorruptionError as error:
        damaged.append(f"checkpoint {copies.source.address}@{record.step}: {error.message}")
        logger.error("not brought back: %s", damaged[-1])
        return False
    return True
