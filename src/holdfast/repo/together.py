"""Saves of several ranks: each writes its share, rank 0 commits them together.

A rank puts its packs and then a *fragment*, which says what is in them, into the run's store.
Rank 0 waits for the fragments of all, joins them in one manifest, commits that, and puts down
what became of it, which the others wait for. So nobody calls anybody: where a rank dies or
stands still, the checkpoint is never committed, and rank 0 gives up after a time.

All ranks make the same saves in the same order. The nonce of a save is known to all of them
beforehand: it follows from a seed, which rank 0 made up when it became the run's writer, and
from the save's number.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import msgspec

from holdfast.core.digest import digest
from holdfast.core.group import Ranks
from holdfast.core.records import Failure, Fragment, Manifest, Outcome, Record
from holdfast.core.sealed import seal, unseal
from holdfast.core.threads import share_out
from holdfast.core.units import format_seconds
from holdfast.errors import (
    BaseLost,
    CommitUnknown,
    DamagedObject,
    Fenced,
    HoldfastError,
    ObjectNotFound,
    SaveFailed,
    StoreError,
    StoreFull,
    StoreUnavailable,
    TornRead,
)
from holdfast.repo import keys
from holdfast.repo.check import MANIFEST_MAX_BYTES, check_manifest
from holdfast.repo.joining import Joining, named
from holdfast.repo.pack_writer import PackWriter
from holdfast.repo.repo import Repo
from holdfast.repo.saves import Save
from holdfast.repo.writer import Writer
from holdfast.stores.base import Store

logger = logging.getLogger("holdfast")

WAIT_S = 600.0
"""How long rank 0 waits for the shares of the others once its own is durable, and these for
what it says: longer than any of them should be behind, and no longer than an interval between
saves, for training waits at the next one."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 1.0
_PAUSE_GROWTH = 1.5
# In a folder a look costs microseconds, in a bucket a request.
_FIRST_PAUSE_IN_FOLDER_S, _PAUSE_GROWTH_IN_FOLDER = 0.001, 1.2
_LOOK_S = 1.0  # who waits so long looks whether the others are still there
_TRIES = 3


class Together(msgspec.Struct, frozen=True, kw_only=True):
    """What rank 0 tells the others when it has become the run's writer."""

    run: str
    epoch: int
    seed: str
    ordinal: int
    """Of the run's newest checkpoint."""

    def nonce(self, number: int) -> str:
        """Of the save of this number."""
        return digest(f"{self.seed} {number}".encode())[:16]


class Patience:
    """How long one waits for the others; may be cut short from any thread."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._until = float("inf")

    def end_in(self, seconds: float) -> None:
        """Nothing is waited for any longer than this from now on."""
        self._until = time.monotonic() + seconds

    def over(self, since_s: float, *, more: float = 0.0) -> bool:
        """Whether somebody who waits since then, by `time.monotonic`, and a while `more`, gives
        up."""
        return time.monotonic() >= min(since_s + self.seconds + more, self._until)


class _Waiting:
    """Looks again and again, less and less often."""

    def __init__(self, patience: Patience, store: Store, *, more: float = 0.0) -> None:
        self._patience = patience
        self._more = more
        self._since_s = time.monotonic()
        self._look_s = self._since_s + _LOOK_S
        in_bucket = bool(store.whole_bytes)
        self._pause_s = _FIRST_PAUSE_S if in_bucket else _FIRST_PAUSE_IN_FOLDER_S
        self._growth = _PAUSE_GROWTH if in_bucket else _PAUSE_GROWTH_IN_FOLDER

    def looks(self) -> bool:
        """Whether to look who is still there: seldom, for where there is no /proc it takes a
        process."""
        now_s = time.monotonic()
        if now_s < self._look_s:
            return False
        self._look_s = now_s + _LOOK_S
        return True

    def over(self) -> bool:
        """False after a pause; True once there was time enough."""
        if self._patience.over(self._since_s, more=self._more):
            return True
        time.sleep(self._pause_s)
        self._pause_s = min(self._pause_s * self._growth, _LONGEST_PAUSE_S)
        return False


def _insist(writer: PackWriter, key: str, data: bytes) -> None:
    """Put down what others wait for, and do not know of if it does not come: a few times, if the
    store does not answer. Raises StoreError."""
    for left in reversed(range(_TRIES)):
        try:
            writer.put_own(key, [data], len(data))
            return
        except StoreFull:
            raise
        except StoreUnavailable:
            if not left:
                raise
        time.sleep(_FIRST_PAUSE_S)


def _nobody(rank: int) -> bool:
    return False


class Leader(PackWriter):
    """Rank 0: saves as `Writer` does, with the shares of the others."""

    alone = False

    def __init__(
        self,
        repo: Repo,
        writer: Writer,
        seed: str,
        size: int,
        *,
        wait_s: float | None = None,
        ended: Callable[[int], bool] = _nobody,
    ) -> None:
        """`ended` tells of a rank whether its process is known to be gone: nothing more is waited
        for then."""
        super().__init__(repo, writer.epoch)
        self._writer = writer
        self._size = size
        self._ended = ended
        self.patience = Patience(WAIT_S if wait_s is None else wait_s)
        self.together = Together(
            run=writer.run,
            epoch=writer.epoch,
            seed=seed,
            ordinal=writer.head.entry.ordinal,
        )
        self._told = ""
        """Nonce of the last save whose outcome was put down."""
        self._left: list[str] = []
        """What others may still read of saves whose outcomes were put down."""
        self.run = writer.run

    def begin(self, number: int) -> Save:
        """Start the save of this number, which is higher than any before."""
        return self._writer.begin(nonce=self.together.nonce(number))

    def commit(
        self,
        save: Save,
        manifest: Manifest,
        *,
        packs_durable: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> Record:
        """As `Writer.commit`, of the shares of all ranks; `manifest` has that of this one.

        Raises SaveFailed besides, if the others' shares do not come or do not fit.
        """
        try:
            packs_durable()
            whole = self._joined(save, manifest)
            for pack in whole.packs:
                if save.holds(pack.name):
                    save.written[pack.name] = pack
            record = self._writer.commit(save, whole, **options)
        except BaseException as error:
            self._tell(save, error=error)
            raise
        self._tell(save, record)
        self._remove(self._fragments(save.nonce))
        return record

    def abandon(self, save: Save, error: BaseException) -> None:
        """As `Writer.abandon`; the others are told."""
        self._writer.abandon(save)
        self._tell(save, error=error)

    def amend(self, action: str, change: Callable[[tuple[Record, ...]], Iterable[Record]]) -> None:
        """See `Writer`."""
        self._writer.amend(action, change)

    def delete_retired(self) -> None:
        """See `Writer`."""
        self._writer.delete_retired()

    def close(self) -> None:
        """See `Writer`."""
        self._writer.close()

    def settled(self) -> None:
        """All ranks have read what became of the last save: nothing is kept for them."""
        left, self._left = self._left, []
        self._remove(left)

    def _joined(self, save: Save, manifest: Manifest) -> Manifest:
        joining = Joining(manifest, save.own)
        for fragment in self._others(save, manifest.step):
            self._compare(fragment, save)
            joining.add(fragment)
        whole = joining.result()
        try:
            check_manifest(whole, "the manifest")
        except DamagedObject as error:
            raise SaveFailed(
                f"the shares of the {self._size} ranks do not make up {error.leaf or 'a state'}: "
                f"{error.reason}",
                hint="Track the same objects, built in the same way, on all ranks. What each rank "
                f"has of its own is named: Run(per_rank=[{error.leaf.partition('/')[0]!r}]).",
            ) from None
        return whole

    def _others(self, save: Save, step: int) -> Iterator[Fragment]:
        """The fragments of the other ranks, as they come."""
        missing = set(range(1, self._size))
        waiting = _Waiting(self.patience, self._repo.store)
        while missing:
            # Before the listing: what a process has put down before its end is in it.
            gone = (
                {rank for rank in missing if self._ended(rank)} if waiting.looks() else set[int]()
            )
            listed = self._repo.store.list(keys.FRAGMENTS)
            ranks = {keys.fragment_rank(info.key, self.epoch, save.nonce) for info in listed}
            there = sorted(missing.intersection(rank for rank in ranks if rank is not None))
            for fragment in self._read(save, there):
                self._check(fragment, save, step)
                missing.discard(fragment.rank)
                yield fragment
            if lost := missing & gone:
                raise SaveFailed(
                    f"{len(lost)} of {self._size} ranks have ended without their share of step "
                    f"{step}: {_some(lost)}",
                    hint="Their own output, or that of what started them, says why.",
                )
            if missing and not there and waiting.over():
                raise SaveFailed(
                    f"{len(missing)} of {self._size} ranks have not written their share of step "
                    f"{step} within {format_seconds(self.patience.seconds)}: {_some(missing)}",
                    hint="See what they are doing, and whether their disks are full.",
                )

    def _read(self, save: Save, ranks: list[int]) -> Iterator[Fragment]:
        """Some at once, for each is a request; never all, for they may be large."""
        at_once = max(1, self._repo.store.parallel)
        for first in range(0, len(ranks), at_once):
            some = ranks[first : first + at_once]
            found: list[tuple[int, bytes]] = []

            def read(ranks: Iterator[int], found: list[tuple[int, bytes]] = found) -> None:
                for rank in ranks:
                    key = keys.fragment_key(self.epoch, save.nonce, rank)
                    data = self._repo.store.get(key, max_bytes=MANIFEST_MAX_BYTES)
                    found.append((rank, data))

            share_out(some, read, threads=at_once, name="holdfast-fragments")
            for rank, data in sorted(found):
                key = keys.fragment_key(self.epoch, save.nonce, rank)
                yield unseal(data, Fragment, key)[1]

    def _check(self, fragment: Fragment, save: Save, step: int) -> None:
        if (fragment.run, fragment.epoch, fragment.nonce) != (self.run, self.epoch, save.nonce):
            raise SaveFailed(f"rank {fragment.rank} has put down what belongs to another save")
        if fragment.error is not None:
            raise _error_of(fragment.error, f"rank {fragment.rank}: ")
        if (fragment.step, fragment.world_size) != (step, self._size):
            raise SaveFailed(
                f"rank {fragment.rank} of {fragment.world_size} saves step {fragment.step:,}, and "
                f"rank 0 of {self._size} step {step:,}",
                hint="All ranks have to save at the same steps.",
            )

    def _compare(self, fragment: Fragment, save: Save) -> None:
        other = sorted(n for n, mark in fragment.marks.items() if save.marks.get(n, mark) != mark)
        if other:
            raise SaveFailed(
                f"rank {fragment.rank} has other values in {', '.join(other)} than rank 0, where "
                "all ranks should have the same",
                hint=f"If each rank has its own: Run(per_rank={other}).",
            )

    def _tell(
        self, save: Save, record: Record | None = None, *, error: BaseException | None = None
    ) -> None:
        """Put down what became of a save, once. If it is a checkpoint, all others have begun
        it, and so have read what became of those before, which is removed."""
        if self._told == save.nonce:
            return
        self._told = save.nonce
        failure = None if error is None else _failure_of(error)
        outcome = Outcome(
            run=self.run, epoch=self.epoch, nonce=save.nonce, record=record, error=failure
        )
        try:
            _insist(self, keys.outcome_key(self.epoch, save.nonce), seal(outcome)[1])
        except StoreError as problem:
            logger.error("the other ranks could not be told of the save: %s", problem.message)
        if record is not None:
            self.settled()
        self._left += [*self._fragments(save.nonce), keys.outcome_key(self.epoch, save.nonce)]

    def _fragments(self, nonce: str) -> list[str]:
        return [keys.fragment_key(self.epoch, nonce, rank) for rank in range(1, self._size)]

    def _remove(self, found: list[str]) -> None:
        try:
            self._repo.store.delete(found)
        except StoreError as error:
            logger.debug("fragments are left for gc: %s", error.message)


class Follower(PackWriter):
    """Any other rank: writes its share, and waits for what becomes of it."""

    alone = False

    def __init__(
        self,
        repo: Repo,
        together: Together,
        ranks: Ranks,
        *,
        wait_s: float | None = None,
        ended: Callable[[int], bool] = _nobody,
    ) -> None:
        """`ended`: see `Leader`."""
        super().__init__(repo, together.epoch, ranks.rank)
        self._together = together
        self._size = ranks.size
        self._ended = ended
        self.patience = Patience(WAIT_S if wait_s is None else wait_s)
        self._ordinal = together.ordinal
        self._given = ""
        """Nonce of the save whose fragment was put down last."""
        self.run = together.run

    def begin(self, number: int) -> Save:
        """Start the save of this number, which is higher than any before."""
        return Save(self._together.nonce(number), self._ordinal + 1)

    def commit(
        self,
        save: Save,
        manifest: Manifest,
        *,
        packs_durable: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> Record:
        """Put down this rank's share, which `manifest` has, and return when rank 0 has committed
        those of all. Raises what made that fail; CommitUnknown if rank 0 says nothing."""
        packs_durable()
        self._put(
            save,
            manifest.step,
            leaves=manifest.leaves,
            own=tuple(save.own),
            packs=manifest.packs,
            tree=named(manifest.tree),
            runtime=manifest.runtime,
            marks=dict(save.marks),
            pickled=manifest.pickled,
        )
        outcome = self._outcome(save, manifest.step)
        if outcome.record is None:
            raise _error_of(outcome.error or Failure(kind="", message="rank 0 says not why"))
        self._ordinal = outcome.record.ordinal
        return outcome.record

    def abandon(self, save: Save, error: BaseException) -> None:
        """There is no share of this rank: no checkpoint is made."""
        if save.nonce == self._given:
            return  # there was one, and rank 0 has said what became of it
        try:
            self._put(save, 0, error=_failure_of(error))
        except StoreError as problem:
            logger.error("rank 0 could not be told that there is no share: %s", problem.message)

    def amend(self, action: str, change: Callable[[tuple[Record, ...]], Iterable[Record]]) -> None:
        """Rank 0 changes the list."""

    def delete_retired(self) -> None:
        """Rank 0 deletes."""

    def _put(self, save: Save, step: int, **fields: Any) -> None:
        fragment = Fragment(
            run=self.run,
            epoch=self.epoch,
            nonce=save.nonce,
            rank=self.rank,
            world_size=self._size,
            step=step,
            **fields,
        )
        _insist(self, keys.fragment_key(self.epoch, save.nonce, self.rank), seal(fragment)[1])
        self._given = save.nonce

    def _outcome(self, save: Save, step: int) -> Outcome:
        key = keys.outcome_key(self.epoch, save.nonce)
        # Rank 0 gives up first, and says so.
        waiting = _Waiting(self.patience, self._repo.store, more=min(self.patience.seconds, 60.0))
        while True:
            gone = waiting.looks() and self._ended(0)
            try:
                data = self._repo.store.get(key, max_bytes=MANIFEST_MAX_BYTES)
                return unseal(data, Outcome, key)[1]
            except ObjectNotFound:
                if gone:
                    raise CommitUnknown(
                        f"rank 0 has ended and did not say what became of the save of step {step}",
                        hint="Its own output, or that of what started it, says why.",
                    ) from None
            except StoreUnavailable:
                pass  # what rank 0 has committed is committed: this rank must not think otherwise
            if waiting.over():
                raise CommitUnknown(
                    f"rank 0 did not say what became of the save of step {step}",
                    hint="See what rank 0 is doing.",
                )


def _some(ranks: Collection[int]) -> str:
    return f"{', '.join(map(str, sorted(ranks)[:10]))}{', …' if len(ranks) > 10 else ''}"


AnyWriter = Writer | Leader | Follower

_HANDLED: Mapping[str, type[HoldfastError]] = {
    "CommitUnknown": CommitUnknown,
    "Fenced": Fenced,
}


def _failure_of(error: BaseException) -> Failure:
    message = error.message if isinstance(error, HoldfastError) else repr(error)
    hint = error.hint if isinstance(error, HoldfastError) else ""
    names: Collection[str] = ()
    if isinstance(error, TornRead):
        names = error.leaves
    elif isinstance(error, BaseLost):
        names = error.packs
    kind = type(error).__name__
    return Failure(kind=kind, message=message, hint=hint, names=tuple(names))


def _error_of(failure: Failure, where: str = "") -> HoldfastError:
    """The error again. On every rank the same kind, so that all do the same about it."""
    if failure.kind == "TornRead":
        return TornRead(failure.names)
    if failure.kind == "BaseLost":
        return BaseLost(failure.names)
    kind = _HANDLED.get(failure.kind, SaveFailed)
    return kind(f"{where}{failure.message}", hint=failure.hint)
