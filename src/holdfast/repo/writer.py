"""The one process that adds checkpoints to a run.

Opening raises the run's epoch: every older writer is fenced from then on. A save
writes packs under names that are never reused, then its manifest, then one log
entry that adds it and retires others; only then is anything deleted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from holdfast.core.process import current, is_alive
from holdfast.core.records import Entry, Holder, Manifest, Record, RunInfo
from holdfast.core.sealed import seal
from holdfast.errors import (
    BaseLost,
    CommitUnknown,
    Fenced,
    HoldfastError,
    NoStore,
    RunClosed,
    StoreUnavailable,
)
from holdfast.repo import keys
from holdfast.repo.head import Draft, Head, Transaction, packs_of
from holdfast.repo.holding import is_held, note_open, run_held
from holdfast.repo.lending import release
from holdfast.repo.log import logger
from holdfast.repo.pack_writer import PackWriter
from holdfast.repo.rebuild import NOTHING_THERE, rebuild
from holdfast.repo.record import not_held, record_of, untag
from holdfast.repo.repo import Removal, Repo
from holdfast.repo.run_info import ensure_info, mend_info
from holdfast.repo.saves import Save

Retire = Callable[[tuple[Record, ...]], Collection[str]]
"""Ids to retire, given the list with the new checkpoint last."""


class Writer(PackWriter):
    """Holds a run's epoch until it is closed. Methods may be called from any thread."""

    alone = True
    """Nobody else writes a share of what is saved."""

    def __init__(self, repo: Repo, epoch: int, head: Head, *, is_new: bool = False) -> None:
        super().__init__(repo, epoch)
        self.is_new = is_new
        """Whether it has begun the run: nobody can have left anything there."""
        self._head = head
        self._in_flight: dict[str, Save] = {}
        self._retired: list[Removal] = []
        """What is listed no longer, and still to be deleted."""
        self._closed = False

    @classmethod
    def open(
        cls,
        repo: Repo,
        *,
        take_over: bool = False,
        parent: str = "",
        copy_of: RunInfo | None = None,
        above: int = 0,
        holder: Holder | None = None,
        alive: Callable[[Holder], bool | None] = is_alive,
    ) -> Writer:
        """Become the run's writer, creating the run where there is none.

        A damaged log is rebuilt first, loudly. A run made here is forked from `parent`, or
        a copy of the run `copy_of`; the epoch will be higher than `above`. Raises RunHeld if
        a live process on this machine holds the run and `take_over` is false; OtherRun if it
        is there and no copy of `copy_of`; StoreUnfit, StoreReadOnly.
        """
        me = holder or current()
        repo.store.prepare_writing()
        with repo.lock:
            run, is_new, spoiled_info = ensure_info(repo, parent, copy_of)
            rebuilt = NOTHING_THERE if is_new else rebuild(repo)
            base_number = rebuilt.base.number if rebuilt.base else 0

            def transaction(head: Head, live: tuple[Record, ...]) -> Draft:
                other = head.entry.holder
                if (
                    other is not None
                    and not take_over
                    and is_held(head.entry, repo.address, me, alive)
                ):
                    raise run_held(repo.address, other, me)
                changes: dict[str, Any] = {
                    "epoch": max(head.entry.epoch, rebuilt.epoch_floor, above) + 1,
                    "holder": me,
                }
                if rebuilt.records is None or head.number != base_number:
                    if head.damage:
                        raise StoreUnavailable(
                            f"the log of {repo.address} was damaged while it was being opened",
                            hint="Start again.",
                        )
                    return Draft(live, "open", changes)
                changes["ordinal"] = max((r.ordinal for r in rebuilt.records), default=0)
                changes["rebuilt"] = True
                changes["number"] = rebuilt.number
                return Draft(rebuilt.records, "repair", changes)

            head, _ = repo.log.commit(transaction, base=rebuilt.base, run=run)
            writer = cls(repo, head.entry.epoch, head, is_new=is_new)
            note_open(writer, run, repo.address)
            if spoiled_info is not None:
                mend_info(repo, spoiled_info)
        return writer

    # -- saving ----------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def run(self) -> str:
        """The run's random id."""
        return self._repo.info().run

    @property
    def head(self) -> Head:
        """The newest entry this writer knows."""
        return self._head

    def newest(self) -> Record | None:
        """The newest checkpoint of `head`. Raises DamagedObject."""
        with self._repo.lock:
            return next(self._repo.log.newest_first(self._head.entry), None)

    def listed(self) -> tuple[Entry, tuple[Record, ...]]:
        """`head`'s entry and all that it lists. Raises DamagedObject."""
        with self._repo.lock:
            entry = self._head.entry
            return entry, self._repo.log.records(entry)

    def begin(self, number: int = 0, *, nonce: str = "") -> Save:
        """Start a save. Its packs stay protected from gc until its fate is settled. `nonce`: one
        that was never used, by default a new one. `number` is for those that save together."""
        with self._repo.lock:
            self._check_open()
            if any(save.entry is not None for save in self._in_flight.values()):
                self.refresh()  # an earlier save of unknown fate may have landed
            save = Save(nonce or keys.new_nonce(), self._head.entry.ordinal + 1)
            self._in_flight[save.nonce] = save
            return save

    def commit(
        self,
        save: Save,
        manifest: Manifest,
        *,
        packs_durable: Callable[[], None] = lambda: None,
        metrics: Mapping[str, float] | None = None,
        odd_metrics: Mapping[str, str] | None = None,
        tags: tuple[str, ...] = (),
        note: str = "",
        finished: bool = False,
        keep: str | None = None,
        retire: Retire = lambda records: (),
        borrowing: frozenset[str] = frozenset(),
    ) -> Record:
        """Make the checkpoint visible, and retire others in the same entry. These are deleted by
        `delete_retired`: who waits for the commit need not wait for that, which takes a request,
        or a file system that gives up gigabytes.

        `packs_durable` waits until all packs are: on a remote store they and the manifest
        are under way together. `keep` is the retention rule to record (None: the one recorded
        before stays);
        `borrowing`: parent runs that were pinned for this very commit.
        Returns once it is durable. Raises Fenced; BaseLost if packs that it reuses
        are gone (write them anew, in a new save); CommitUnknown; StoreUnavailable.
        """
        self._check_open()
        id, data = seal(manifest)
        if save.entry is not None:
            raise CommitUnknown(
                f"a commit of step {manifest.step} was sent before and may have landed",
                hint="Save the state again: a new save writes everything under new names.",
            )
        save.manifest = id
        self.put_own(keys.manifest_key(id), [data], len(data))
        packs_durable()
        record = record_of(
            id,
            manifest,
            metrics=dict(metrics or {}),
            odd_metrics=dict(odd_metrics or {}),
            tags=tags,
            note=note,
        )
        own = set(save.written)

        def transaction(head: Head, records: tuple[Record, ...]) -> Draft:
            self._check_epoch(head)
            if lost := not_held(record, records, own, borrowing):
                raise BaseLost(lost)
            # Its id is as random as its nonce: it is on a list only if it was sent before.
            if save.entry is not None and any(r.id == id for r in records):
                return Draft(records, "save")  # an unknown commit of it has landed
            kept = (*(untag(records, tags) if tags else records), record)
            retired = set(retire(kept)) - {id}
            if retired:
                kept = tuple([r for r in kept if r.id not in retired or r.pins])
            return Draft(
                kept,
                "save",
                {
                    "ordinal": max(head.entry.ordinal, manifest.ordinal),
                    "finished": finished,
                    "keep": head.entry.keep if keep is None else keep,
                },
            )

        with self._repo.lock:
            head = self._commit(transaction, save)
            listed = self._repo.log.newest_first(head.entry)
            return next((r for r in listed if r.id == id), record)

    def abandon(self, save: Save, error: BaseException | None = None) -> None:
        """A save failed before its entry was sent: its packs are orphans for gc."""
        with self._repo.lock:
            if save.entry is None:
                self._in_flight.pop(save.nonce, None)

    def amend(self, action: str, change: Callable[[tuple[Record, ...]], Iterable[Record]]) -> Head:
        """Change the list (tags, pins, prune) as the writer; delete what it dropped."""
        return self.transact(lambda head, records: Draft(tuple(change(records)), action))

    def transact(self, change: Transaction, save: Save | None = None) -> Head:
        """Commit what `change` makes of the newest entry and list, as the writer; delete what
        it dropped. `save` holds what was written for it.

        Raises Fenced; what `change` raises; CommitUnknown; StoreUnavailable.
        """

        def transaction(head: Head, records: tuple[Record, ...]) -> Draft:
            self._check_epoch(head)
            return change(head, records)

        with self._repo.lock:
            self._check_open()
            head = self._commit(transaction, save)
            self.delete_retired()
            return head

    def delete_retired(self) -> None:
        """Delete what commits have left to be deleted. A failure leaves it to gc."""
        with self._repo.lock:
            retired, self._retired = self._retired, []
        for removal in retired:
            self._repo.delete(removal)
            if removal.borrowed:
                release(self._repo, removal.borrowed)

    def _commit(self, transaction: Transaction, save: Save | None) -> Head:
        # What is no save may write segments, too, and they must outlast a doubt about its
        # entry just the same: it can still land.
        work = save or Save(keys.new_nonce(), self._head.entry.ordinal)
        self._in_flight[work.nonce] = work
        count = 0

        def segment_name() -> str:
            nonlocal count
            count += 1
            return keys.segment_name(self.epoch, work.nonce, count)

        def on_send(number: int, entry: Entry) -> None:
            work.entry = number

        try:
            head, before = self._repo.log.commit(
                transaction,
                base=self._head,
                run=self._repo.info().run,
                segment_name=segment_name,
                on_send=on_send,
            )
        except CommitUnknown:
            self.refresh()  # overtaken: Fenced says more, and is as cautious
            raise
        except BaseException:
            if save is None and work.entry is None:
                del self._in_flight[work.nonce]  # nothing was sent that could land
            raise
        self._head = head
        self._settle(head.number)
        self._retired.append(self._repo.removed(before, head))
        return head

    def _settle(self, number: int) -> None:
        """Entries sent for numbers up to `number` can no longer land: drop protection."""
        for nonce, save in list(self._in_flight.items()):
            if save.entry is not None and save.entry <= number:
                del self._in_flight[nonce]

    def refresh(self) -> None:
        """Read the newest entry, which guests may have added. Raises Fenced."""
        with self._repo.lock:
            head = self._repo.head()
            if head is None:
                raise NoStore(f"the run in {self._repo.address} has vanished")
            self._check_epoch(head)
            self._head = head

    # -- collecting ------------------------------------------------------------

    def collect(self, *, dry_run: bool = False, thorough: bool = False) -> list[str]:
        """Delete orphans: objects that no entry lists and no save in flight wrote.

        Only this epoch's creator may call it. Returns the keys. `thorough`: see
        `Store.remove_debris`.
        """
        store = self._repo.store
        with self._repo.lock:
            self._check_open()
            # List first, read the newest entry after: what appears in between is not
            # on the list; what the entry names is kept.
            found = [
                info.key
                for prefix in (keys.PACKS, keys.SEGMENTS, keys.FRAGMENTS, keys.MANIFESTS)
                for info in store.list(prefix)
            ]
            head = self._repo.head()
            if head is None:
                raise NoStore(f"the run in {self._repo.address} has vanished")
            self._check_epoch(head)
            self._repo.check_log(head)
            # A guest's entry can be visible and not yet synced; without this a power
            # loss could undo the entry and leave the deletions.
            self._repo.log.settle(head)
            records = self._repo.log.records(head.entry)
            live = {keys.pack_key(name) for name in packs_of(records)}
            live |= {keys.segment_key(ref.name) for ref in head.entry.segments}
            live |= {keys.manifest_key(r.id) for r in records}
            orphans = [key for key in found if key not in live and self._may_collect(key)]
        if not dry_run:
            store.delete(orphans)
            store.remove_debris(thorough=thorough)
        return orphans

    def _may_collect(self, key: str) -> bool:
        if id := keys.manifest_id(key):
            return all(save.manifest != id for save in self._in_flight.values())
        owned = keys.owner(key)
        if owned is None:
            return False  # not one of our names: not ours to delete
        name, epoch = owned
        if key.startswith(keys.FRAGMENTS) and epoch == self.epoch:
            return False  # the ranks of this run may still read it
        return epoch <= self.epoch and not any(s.holds(name) for s in self._in_flight.values())

    # -- closing ---------------------------------------------------------------

    def close(self) -> None:
        """Give the run up, so that another process may write it without waiting.

        Never raises for a run that was taken over or cannot be reached: the holder's
        death says the same.
        """
        with self._repo.lock:
            if self._closed:
                return
            self._closed = True

            def transaction(head: Head, records: tuple[Record, ...]) -> Draft:
                self._check_epoch(head)
                return Draft(records, "close", {"holder": None})

            try:
                self._commit(transaction, None)
                self.delete_retired()
            except HoldfastError as error:
                logger.debug("closing %s: %s", self._repo.address, error)

    def let_go(self) -> None:
        """As `close`, where the store cannot be reached: nobody else is told."""
        with self._repo.lock:
            self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise RunClosed(f"the writer of {self._repo.address} is closed")

    def _check_epoch(self, head: Head) -> None:
        if head.entry.epoch == self.epoch:
            return
        other = head.entry.holder
        who = f"pid {other.pid} on {other.host}" if other else "another process"
        raise Fenced(
            f"{self._repo.address} was taken over by {who}; this process can no longer save",
            hint="Stop this process. Only one may write a run; give each its own address.",
        )
