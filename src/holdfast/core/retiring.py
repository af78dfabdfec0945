"""What a retention policy removes, save after save.

`decide` looks at all of a run. In a run of 10,000 checkpoints that is most of what a save
costs, and one more checkpoint concerns few others: the one that was the newest, and those
that drop out of `last=`, of the best, of the time that `within=` spans. `Retiring` finds
and judges only those, and answers what `decide` would: `decide` is the definition.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import count, pairwise

from holdfast.core.records import Record
from holdfast.core.retention import KeepPolicy, decide, rank


class Retiring:
    """Decides for one run what each save retires. Not thread-safe."""

    def __init__(self, policy: KeepPolicy) -> None:
        self._policy = policy
        self._state: _State | None = None
        """About what the last answer left; None: look at everything."""

    def ids(self, records: Sequence[Record]) -> list[str]:
        """The ids of what `decide` does not keep of `records`, oldest commit first.

        Quick if `records` are those that the last answer left, and one more.
        """
        if self._policy.empty or not records:
            return []
        records = tuple(records)
        state, self._state = self._state, None
        if state is not None and records[:-1] == state.records:
            gone = state.add(records[-1])
            if gone is not None:
                self._state = state
                return [record.id for record in gone]
        gone = [d.record for d in decide(records, self._policy) if not d.keep]
        left = _without(records, gone)
        if all(a.ordinal < b.ordinal for a, b in pairwise(left)):
            self._state = _State(self._policy, left)
        return [record.id for record in gone]


class _State:
    """What must be known about records that a policy all keeps, to judge one more.

    Which records a rule wants can be told of each at once; which cease to be wanted is
    what the rules' own lists are for. A record is judged when it leaves one of them.
    """

    def __init__(self, policy: KeepPolicy, records: tuple[Record, ...]) -> None:
        self.records: tuple[Record, ...] = ()
        """All, oldest commit first."""
        self._ids: set[str] = set()
        """Of all: the lists below may have some that have gone."""
        self._policy = policy
        self._counts_steps = bool(policy.last or policy.every or policy.within_s)
        self._of_step: dict[int, Record] = {}
        """The newest of each step: the one that counts for all rules but `best=`."""
        self._repeated: set[int] = set()
        """Steps that were saved more than once."""
        self._last: dict[str, Record] = {}
        self._lowest: dict[int, Record] = {}
        """By number of the `every=` steps."""
        self._by_time: list[tuple[float, int, Record]] = []
        """A heap of those that `within=` wants now or did not want when it was asked last."""
        self._numbers = count()
        self._best: list[list[tuple[tuple[float, int, int], Record]]] = [[] for _ in policy.best]
        self._users: Counter[str] = Counter()
        self._stored_bytes = 0
        for record in records:
            self._enter(record)
        self.records = records
        # Where the clock went back, one that left meanwhile is kept by within= again.
        self._by_time.clear()
        if policy.within_s is not None:
            for record in records:
                self._watch(record)

    def add(self, record: Record) -> list[Record] | None:
        """What is to go now that `record` has come; that is then gone from `records`.

        None if it takes a look at everything to tell: this state is of no use any more.
        """
        if self.records and record.ordinal <= self.records[-1].ordinal:
            return None
        doubtful = [*self.records[-1:], *self._enter(record)]
        self.records = (*self.records, record)
        gone: list[Record] = []
        if not self._only_size:
            unwanted = {r.id: r for r in doubtful if r.id in self._ids and not self._wants(r)}
            gone = sorted(unwanted.values(), key=lambda r: r.ordinal)
        for old in gone:
            if self._of_step.get(old.step) is old:
                if old.step in self._repeated:
                    return None  # an older one of that step may count now
                del self._of_step[old.step]
            self._free(old)
        cap = self._policy.size_bytes
        if cap is not None and self._stored_bytes > cap:
            if not self._only_size:
                return None  # what it takes away, other rules count
            gone = self._shrink(cap)
        if gone:
            self.records = _without(self.records, gone)
            self._ids.difference_update(record.id for record in gone)
        return gone

    @property
    def _only_size(self) -> bool:
        """Whether everything that fits is kept."""
        return self._policy == KeepPolicy(size_bytes=self._policy.size_bytes)

    def _enter(self, record: Record) -> list[Record]:
        """Count `record` in; those that leave the list of a rule for it."""
        leave: list[Record] = []
        self._ids.add(record.id)
        if self._counts_steps:
            leave += self._enter_step(record)
        for rule, best in zip(self._policy.best, self._best, strict=True):
            key = rank(record, rule.metric, rule.mode)
            if key is None:
                continue
            same = next((i for i, (_, r) in enumerate(best) if r.step == record.step), None)
            if same is not None:
                if best[same][0] < key:
                    continue  # its step's better value stays
                leave.append(best.pop(same)[1])
            insort(best, (key, record), key=lambda item: item[0])
            if len(best) > rule.k:
                leave.append(best.pop()[1])
        if self._policy.size_bytes is not None:
            self._hold(record)
        return leave

    def _enter_step(self, record: Record) -> list[Record]:
        """As `_enter`, for the rules that count one checkpoint per step."""
        policy = self._policy
        leave: list[Record] = []
        old = self._of_step.get(record.step)
        self._of_step[record.step] = record
        if old is not None:
            self._repeated.add(record.step)
            self._last.pop(old.id, None)
            leave.append(old)
        if policy.last is not None:
            self._last[record.id] = record
            if len(self._last) > policy.last:
                leave.append(self._last.pop(next(iter(self._last))))
        if policy.every is not None:
            bucket = record.step // policy.every
            lowest = self._lowest.get(bucket)
            if lowest is None or record.step <= lowest.step:
                self._lowest[bucket] = record
                leave += [lowest] if lowest is not None else []
        if policy.within_s is not None:
            self._watch(record)
            while not record.time_s - self._by_time[0][0] <= policy.within_s:
                leave.append(heapq.heappop(self._by_time)[2])
        return leave

    def _watch(self, record: Record) -> None:
        # The number keeps records of one time from being compared.
        heapq.heappush(self._by_time, (record.time_s, next(self._numbers), record))

    def _wants(self, record: Record) -> bool:
        """Whether a rule other than `size=` keeps it."""
        newest, policy = self.records[-1], self._policy
        if record is newest or record.tags or record.pins:
            return True
        if any(record is r for best in self._best for _, r in best):
            return True
        if self._of_step.get(record.step) is not record:
            return False
        if record.id in self._last:
            return True
        if policy.every and self._lowest.get(record.step // policy.every) is record:
            return True
        if policy.within_s and newest.time_s - record.time_s <= policy.within_s:
            self._watch(record)  # it may have left the heap before the clock went back
            return True
        return False

    def _hold(self, record: Record) -> None:
        for pack, nbytes in record.packs.items():
            self._users[pack] += 1
            self._stored_bytes += nbytes if self._users[pack] == 1 else 0

    def _free(self, record: Record) -> None:
        if self._policy.size_bytes is None:
            return
        for pack, nbytes in record.packs.items():
            self._users[pack] -= 1
            if self._users[pack] == 0:
                del self._users[pack]
                self._stored_bytes -= nbytes

    def _shrink(self, cap_bytes: int) -> list[Record]:
        """The oldest, until the others fit: as `decide` does it for `size=` alone."""
        tried: list[Record] = []
        for record in self.records[:-1]:
            if self._stored_bytes <= cap_bytes:
                break
            if not record.tags and not record.pins:
                self._free(record)
                tried.append(record)
        gone: list[Record] = []
        back: list[Record] = []
        for record in tried:  # those that freed nothing need not go
            (back if all(pack in self._users for pack in record.packs) else gone).append(record)
        for record in back:
            self._hold(record)
        return gone


def _without(records: tuple[Record, ...], gone: Iterable[Record]) -> tuple[Record, ...]:
    ids = {record.id for record in gone}
    return tuple([record for record in records if record.id not in ids]) if ids else records
