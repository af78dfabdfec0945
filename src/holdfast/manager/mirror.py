"""The mirror of a run: a second place, mostly a bucket, that a background thread fills.

Saves commit in the run alone. The thread then looks at the two lists, copies what the mirror
lacks and its own retention rule wants, newest first, and looks again: there is no queue that
could grow. All that it must know is in the two lists, so a new process goes on where an old
one stopped. Reasons: docs/design/replication.md.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Sequence

from holdfast.core.address import printable
from holdfast.core.aside import aside
from holdfast.core.records import Record
from holdfast.core.retention import not_wanted
from holdfast.core.units import format_duration
from holdfast.errors import (
    CheckpointRemoved,
    CommitUnknown,
    CopyStopped,
    CorruptionError,
    DamagedObject,
    Fenced,
    FormatTooNew,
    HoldfastError,
    OtherRun,
    StoreUnavailable,
    StoreUnfit,
    UsageError,
)
from holdfast.manager.mirror_lines import given_up, only_here
from holdfast.manager.mirror_options import MirrorOptions
from holdfast.manager.progress import Work, current_work
from holdfast.manager.staging import yield_to_others
from holdfast.repo import keys
from holdfast.repo.copies import Source, look_at, updated
from holdfast.repo.head import packs_of
from holdfast.repo.holding import seen_alive
from holdfast.repo.mend import Mended, mend_manifest, mend_packs
from holdfast.repo.mirrors import remember
from holdfast.repo.pace import Pace
from holdfast.repo.replicate import Replicator
from holdfast.repo.repo import Repo
from holdfast.repo.results_copy import ResultCopies
from holdfast.stores.addresses import real_address
from holdfast.stores.base import Store
from holdfast.stores.open import open_store

logger = logging.getLogger("holdfast")

# After a failure the next try is so far away, then twice as far, up to the longest: by a
# random half, so that the jobs of a cluster do not all come back at once.
FIRST_RETRY_S = 5.0
LONGEST_RETRY_S = 300.0
# When the time for the rest is over: a block in progress may end, a dead connection may not.
GRACE_S = 5.0

# Another process's doing, or the user's: trying again would change nothing.
_FINAL = (Fenced, OtherRun, UsageError, FormatTooNew, StoreUnfit)
# The connection to the mirror is the same after these.
_PASSING = (StoreUnavailable, CommitUnknown)


class Mirror:
    """Copies a run's checkpoints to its mirror, from `start` to `close`.

    Nothing of it waits for the mirror but `close` and `wait`. A forked child's copy does
    nothing.
    """

    def __init__(
        self,
        local: Repo,
        options: MirrorOptions,
        *,
        take_over: bool = False,
        clock: Callable[[], float] = time.time,
        pace: Pace | None = None,
    ) -> None:
        """Touches nothing. `pace` is for tests that cannot wait."""
        self.options = options
        self.address = options.address
        self.local_address = local.address
        # Of its own: saves never wait for a lock that this thread holds.
        self._local = Repo(local.store, clock=clock)
        self._take_over = take_over
        self._clock = clock
        self._pace = pace or Pace(options.bytes_per_s)
        self._target: Repo | None = None
        self._copies: Replicator | None = None
        self._results: ResultCopies | None = None
        self._lock = threading.RLock()  # entering a Condition takes several steps
        self._changed = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        self._epoch = 0
        self._dirty = False  # there may be something to copy
        self._busy = False  # a pass is in progress
        self._turn = threading.Lock()
        """Held by the thread that works: the second one follows the first."""
        self._closing = self._ended = self._over = self._hurried = False
        self._given_up = self._tidied = False
        self._newest = ""
        """Id of the newest checkpoint that `expect` was told of."""
        self._current = ""
        """Id of the checkpoint that is being copied."""
        self._there: tuple[Record, ...] | None = None
        """What the mirror lists; None: it was not seen yet."""
        self._damaged: set[str] = set()
        """Ids of checkpoints that are damaged in the run and were not copied."""
        self._broken: set[str] = set()
        """Keys of objects of the run that are damaged or missing, and were read in the mirror."""
        self._progress = Work()
        """Of whoever waits in `close`."""
        self._counting = threading.Lock()
        self._trouble_since: float | None = None
        self._retry_s, self._next_try_s = FIRST_RETRY_S, 0.0

    # -- from the manager's threads ------------------------------------------------

    def start(self, epoch: int) -> None:
        """Begin, as soon as this process is the run's writer, of `epoch`. May be called twice."""
        self._epoch = epoch
        if self._pid != os.getpid() or self._thread is not None:
            return
        self._dirty = True
        self._thread = self._start(low=True)
        if self._thread is None:
            logger.error("%s: no thread could be started for its mirror", self._name)

    @aside
    def hurry(self) -> None:
        """The end is near: from now on a thread of the caller's priority does the work."""
        if self._thread is None or self._pid != os.getpid() or self._hurried:
            return
        second = self._start(low=False)  # it waits for its turn; without it the first goes on
        if second is not None:
            with self._lock:
                self._thread, self._hurried = second, True
                self._changed.notify_all()

    def _start(self, *, low: bool) -> threading.Thread | None:
        # A daemon: a crashed main thread must not hang on a network.
        thread = threading.Thread(
            target=self._work, args=(low,), name="holdfast-mirror", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # there are too many, or the interpreter is ending
            return None
        return thread

    def expect(self, id: str = "") -> None:
        """The run's list has changed, and `wake` follows; `id` is a new checkpoint's. Who begins to
        `wait` now waits for it, too. Without the lock, which who waits for the save may hold."""
        self._newest = id or self._newest
        self._dirty = True

    def wake(self) -> None:
        """There is something to do."""
        if self._thread is not None and self._pid == os.getpid():
            with self._lock:
                self._changed.notify_all()

    def mend(self, key: str) -> None:
        """An object of the run is damaged or missing, and whole in the mirror: replace it."""
        if key not in self._broken:
            self._broken.add(key)
            self.expect()
            self.wake()

    def store(self) -> Store:
        """The mirror, for who reads it besides; it shares nothing with the thread's."""
        return open_store(self.address)

    def spared(self) -> str:
        """Id of the checkpoint that is being copied, which retention should leave for the
        moment: else, on a slow link, no copy would ever be complete. "" if there is none."""
        return self._current

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until the mirror has all that it is to have; False after so many seconds, or if it
        is not used any more."""
        if self._thread is None or self._pid != os.getpid():
            return False
        with self._lock:
            self._changed.wait_for(lambda: self._over or self._is_idle(), timeout_s)
            return not self._over and self._is_idle()

    @property
    def is_over(self) -> bool:
        """Whether nothing will be copied any more."""
        return self._over

    def _is_idle(self) -> bool:
        return not self._dirty and not self._busy

    def finish(self) -> None:
        """Nothing more will come: what is not there yet is copied newest first and as fast as
        it goes; then the thread ends. Returns at once."""
        self.hurry()
        if self._thread is None or self._pid != os.getpid() or self._closing:
            return
        with self._lock:
            self._closing = True
            self._next_try_s = 0.0
            self._pace.limit(None)  # there is no training left that it could disturb
            if self._current and self._current != self._newest != "":
                self._stop_copy()  # the newest matters most
            self._changed.notify_all()

    def close(self) -> None:
        """`finish`, and wait for it, for `wait_s` at most; then say what is in the run only."""
        if self._thread is None or self._pid != os.getpid():
            return
        self._progress = current_work()
        self._measure()
        self.finish()
        thread = self._thread
        try:
            thread.join(self.options.wait_s)
        finally:
            with self._lock:
                self._ended = True
                self._pace.stop()
                self._changed.notify_all()
            thread.join(GRACE_S)
            self._measure()
            self._say_what_is_missing()
            self._thread = None

    def missing(self) -> list[Record]:
        """Checkpoints of the run that are not in the mirror and are to be there, as far as is
        known; oldest first. None before `start`. Raises what reading the run's list raises."""
        if self._thread is None or self._pid != os.getpid():
            return []
        return self._missing(look_at(self._local), self._there or ())

    def _count(self, nbytes: int) -> None:
        """So much was read, to be sent. From any thread."""
        with self._counting:
            self._progress.done_nbytes += nbytes

    def _measure(self) -> None:
        """Tell whoever waits how much is left."""
        try:
            packs = packs_of(self.missing())
        except HoldfastError:
            return  # how long it will take is not known
        copies = self._copies
        there = copies.sizes() if copies else packs_of(self._there or ())
        left = sum(size for name, size in packs.items() if there.get(name) != size)
        with self._counting:
            self._progress.total_nbytes = self._progress.done_nbytes + left

    def _say_what_is_missing(self) -> None:
        try:
            missing = self.missing()
        except HoldfastError as error:
            logger.error("%s: its list cannot be read: %s", self._name, error.message)
            return
        if missing:
            steps = [record.step for record in reversed(missing)]
            known = None if self._given_up else self._there is not None
            logger.error("%s", only_here(self._name, printable(self.address), steps, known=known))

    @property
    def _name(self) -> str:
        return printable(self.local_address)

    # -- the thread ----------------------------------------------------------------

    def _work(self, low: bool) -> None:
        with self._turn:
            if self._over:
                return
            if low:
                yield_to_others()
            self._remember()  # by whichever of the two comes first
            self._work_on(low)

    def _remember(self) -> None:
        try:
            remember(self._local, self._epoch, real_address(open_store(self.address).address))
        except (HoldfastError, OSError) as error:
            logger.info("the mirror's address could not be noted: %s", error)

    def _work_on(self, low: bool) -> None:
        handed_over = False
        try:
            while self._await_work(low):
                try:
                    self._pass()
                except CopyStopped:
                    self._dirty = True  # there is a newer one
                except _FINAL as error:
                    self._give_up(error)
                    return
                except (HoldfastError, OSError) as error:
                    self._failed(error)
                else:
                    if not self._ended:  # else it was cut short
                        self._went_well()
            handed_over = low and self._hurried
        finally:
            if not handed_over:
                # One that cannot be reached is left as it is: this process's death says the same.
                self._let_go(politely=self._trouble_since is None)
                with self._lock:
                    self._over, self._busy = True, False
                    self._changed.notify_all()

    def _await_work(self, low: bool) -> bool:
        """Wait until there is something to do; False when there is nothing to wait for, or
        another thread is to do it."""
        with self._lock:
            self._busy = False
            self._changed.notify_all()
            while not self._ended and not (low and self._hurried):
                if not self._dirty:
                    if self._closing:
                        return False
                    self._changed.wait()
                elif (left := self._next_try_s - time.monotonic()) > 0:
                    self._changed.wait(left)
                else:
                    self._dirty, self._busy = False, True
                    return True
            return False

    def _pass(self) -> None:
        """Bring the mirror up to date."""
        copies = self._copies or self._open()
        while record := self._next(copies):
            with self._lock:
                if self._ended:
                    return
                self._current = record.id
            if self._closing:
                self._measure()  # it may have turned out otherwise than it looked
            try:
                copies.copy(record.id, keep=str(self.options.keep), retire=self._retire)
                logger.info("step %d is in %s", record.step, printable(self.address))
            except CheckpointRemoved:
                continue  # retired meanwhile: the list says what there is now
            except DamagedObject as error:
                self._damaged.add(record.id)
                logger.error(
                    "checkpoint %s@%d is damaged, and not copied to its mirror:\n  %s",
                    self._name,
                    record.step,
                    error.brief,
                )
            finally:
                self._current = ""
            self._there = copies.records()
        self._update(copies)
        if not self._tidied:
            self._tidied = True
            copies.writer.collect()
        self._mend(copies)
        if self._results is None:
            stores = self._local.store, copies.target.store
            self._results = ResultCopies(*stores, pace=self._pace, on_bytes=self._count)
        self._results.bring()

    def _mend(self, copies: Replicator) -> None:
        """Replace what was found to be damaged in the run."""
        where = printable(self.address)
        # Manifests first: they say what is right in a pack.
        for key in sorted(self._broken):
            try:
                done = self._mend_object(copies, key)
            except (CorruptionError, CheckpointRemoved) as error:
                done = [Mended(key, error.message)]
            self._broken.discard(key)
            for mended in done:
                if mended.problem:
                    logger.error("%s: %s is not repaired: %s", self._name, key, mended.problem)
                else:
                    logger.warning("%s: %s was replaced by that of %s", self._name, key, where)

    def _mend_object(self, copies: Replicator, key: str) -> list[Mended]:
        if name := keys.pack_of(key):
            return mend_packs(self._local, [name], copies.target, pace=self._pace)
        record = next((r for r in self._local.records() if r.id == keys.manifest_id(key)), None)
        mended = mend_manifest(self._local, record, copies.target) if record else None
        return [mended] if mended else []

    def _open(self) -> Replicator:
        target = Repo(open_store(self.address), clock=self._clock)
        try:
            copies = Replicator.open(
                self._local,
                target,
                take_over=self._take_over,
                alive=seen_alive,
                pace=self._pace,
                on_bytes=self._count,
            )
        except BaseException:
            target.close()
            raise
        self._target, self._copies = target, copies
        self._there = copies.records()
        return copies

    def _retire(self, records: tuple[Record, ...]) -> list[str]:
        return not_wanted(records, self.options.keep)

    def _next(self, copies: Replicator) -> Record | None:
        """The newest checkpoint that is to be copied."""
        missing = self._missing(look_at(self._local), copies.records())
        return missing[-1] if missing else None

    def _missing(self, of: Source, there: Sequence[Record]) -> list[Record]:
        """What the mirror lacks, and would keep if it had it."""
        ids = {record.id for record in there}
        lacking = [r for r in of.records if r.id not in ids and r.id not in self._damaged]
        if not lacking:
            return []
        both = sorted([*updated(there, of.records), *lacking], key=lambda r: r.ordinal)
        unwanted = set(not_wanted(both, self.options.keep))
        return [record for record in lacking if record.id not in unwanted]

    def _update(self, copies: Replicator) -> None:
        """Metrics, tags, notes, pins; and what the rule gives up, now that these are known."""
        of, before, entry = look_at(self._local), copies.records(), copies.writer.head.entry
        after = updated(before, of.records)
        same_newest = bool(after and of.records) and after[-1].id == of.records[-1].id
        if (
            after != before
            or not_wanted(after, self.options.keep)
            or (same_newest and entry.finished != of.head.entry.finished)
            or (before and entry.keep != str(self.options.keep))
        ):
            copies.update(keep=str(self.options.keep), retire=self._retire)
            self._there = copies.records()

    def _stop_copy(self) -> None:
        """Have the copy in progress end; what it has brought stays. Under the lock."""
        stopped, self._pace = self._pace, Pace()
        if self._copies is not None:
            self._copies.pace = self._pace
        stopped.stop()

    # -- trouble -------------------------------------------------------------------

    def _failed(self, error: HoldfastError | OSError) -> None:
        """Try again later. Of all failures in a row only the first is told."""
        why = error.message if isinstance(error, HoldfastError) else str(error)
        if self._trouble_since is None:
            self._trouble_since = time.monotonic()
            logger.warning(
                "%s: nothing is copied to %s for now, training goes on: %s",
                self._name,
                printable(self.address),
                why.partition("\n")[0],
            )
        else:
            logger.info("%s still cannot be used: %s", printable(self.address), why)
        if not isinstance(error, _PASSING):
            self._let_go(politely=True)
        with self._lock:
            wait_s = self._retry_s * random.SystemRandom().uniform(0.5, 1.0)
            self._retry_s = min(self._retry_s * 2, LONGEST_RETRY_S)
            if self._closing:
                wait_s = min(wait_s, FIRST_RETRY_S)
            self._next_try_s = time.monotonic() + wait_s
            self._dirty = True

    def _went_well(self) -> None:
        self._retry_s = FIRST_RETRY_S
        if self._trouble_since is not None:
            lasted = format_duration(time.monotonic() - self._trouble_since)
            self._trouble_since = None
            logger.warning(
                "%s: copied to %s again, after %s", self._name, printable(self.address), lasted
            )

    def _give_up(self, error: HoldfastError) -> None:
        self._given_up = True
        logger.error("%s", given_up(self._name, self.local_address, self.address, error))

    def _let_go(self, *, politely: bool) -> None:
        """Close the connection; politely: tell others that the mirror is free."""
        copies, target = self._copies, self._target
        self._copies = self._target = None
        if copies is not None and politely:
            copies.close()
        elif copies is not None:
            copies.writer.let_go()  # or this process could not open it again
        if target is not None:
            target.close()
