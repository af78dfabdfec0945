"""From a live state to the order for its checkpoint, for now or for later."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

from holdfast.core.group import Ranks
from holdfast.core.selection import under
from holdfast.errors import SaveFailed
from holdfast.manager.capture import InPlace, capture
from holdfast.manager.edits import split_metrics
from holdfast.manager.info import CheckpointInfo
from holdfast.manager.pending import Pending
from holdfast.manager.progress import Work, current_work
from holdfast.manager.saver import Order, Saver
from holdfast.manager.shares import Cut
from holdfast.manager.snapshot import Snapshot, SnapshotMemories
from holdfast.manager.stored import Digests


class Orders:
    """Takes those of one manager."""

    def __init__(
        self,
        digests: Digests,
        unsteady: set[str],
        *,
        allow_pickle: bool,
        clock: Callable[[], float],
        runs_in: Callable[[], tuple[object, Mapping[str, object]]],
        cut: Cut,
        per_rank: Collection[str] = (),
    ) -> None:
        """`runs_in` tells the config and the environment of the process; `cut` makes chunks of
        what several ranks save, of which each has its own of what lies below `per_rank`."""
        self._cut = cut
        self._per_rank = tuple(per_rank)
        self._compared = False
        self._digests = digests
        self._unsteady = unsteady
        self._allow_pickle = allow_pickle
        self._clock = clock
        self._runs_in = runs_in
        self._held = SnapshotMemories()
        """Memory of captured states that are kept beside the saves."""
        self._held_nbytes = 0

    def take(
        self,
        saver: Saver,
        memories: SnapshotMemories,
        step: int,
        state: Mapping[str, object],
        loop: object,
        in_place: InPlace | None,
        *,
        waits: bool,
        metrics: tuple[Mapping[str, float], Mapping[str, str]],
        note: str,
        tags: Iterable[str] = (),
        finished: bool = False,
        rng: bool = True,
        asked_s: float,
        waited_s: float = 0.0,
        ranks: Ranks | None = None,
        number: int = 0,
    ) -> Order:
        """Capture the state now; see `capture`. `metrics` are the finite and the other ones."""
        snapshot = capture(
            step,
            state,
            loop,
            in_place,
            waits=waits,
            memories=memories,
            digests=self._digests,
            unsteady=self._unsteady,
            allow_pickle=self._allow_pickle,
            clock=self._clock,
            rng=rng,
            ranks=ranks,
            cut=self._cut,
            own=lambda path: any(under(path, name) for name in self._per_rank),
            # Once: what was alike then stays so, for all ranks take the same steps.
            compare=ranks is not None and not self._compared,
        )
        self._compared = True
        finite, odd = metrics
        config, environment = self._runs_in()
        return Order(
            snapshot=snapshot,
            pending=Pending(step, hurry=saver.hurry),
            metrics=finite,
            odd_metrics=odd,
            tags=tuple(tags),
            note=note,
            finished=finished,
            config=config,
            environment=environment,
            asked_s=asked_s,
            waited_s=waited_s,
            capture_s=time.perf_counter() - asked_s - waited_s,
            blocked=waits,
            work=current_work(),
            held_nbytes=self._held_nbytes,
            number=number,
        )

    def of(
        self,
        snapshot: Snapshot,
        saver: Saver,
        note: str,
        config: object,
        environment: Mapping[str, object],
    ) -> Order:
        """To save a snapshot that was put together elsewhere, and be waited for."""
        return Order(
            snapshot=snapshot,
            pending=Pending(snapshot.step, hurry=saver.hurry),
            metrics={},
            odd_metrics={},
            tags=(),
            note=note,
            finished=False,
            config=config,
            environment=environment,
            asked_s=time.perf_counter(),
            waited_s=0.0,
            capture_s=0.0,
            blocked=True,
            work=Work(),
        )

    def hold(
        self,
        saver: Saver,
        step: int,
        state: Mapping[str, object],
        loop: object,
        metrics: Mapping[str, float],
        note: str,
        check: Callable[[], None],
    ) -> Captured:
        """Copy the state now. `check` raises, if it cannot be committed any more."""
        start = time.perf_counter()
        split = split_metrics(metrics)
        order = self.take(
            saver,
            self._held,
            step,
            state,
            loop,
            None,
            waits=False,
            metrics=split,
            note=note,
            asked_s=start,
        )
        self._held_nbytes = order.snapshot.memory.nbytes
        return Captured(order, saver, self._held, check)


class Captured:
    """A state as it was at one moment, wholly in memory, that may become a checkpoint later.

    One thread gets it: whoever calls `commit` or `drop` first.
    """

    def __init__(
        self, order: Order, saver: Saver, memories: SnapshotMemories, check: Callable[[], None]
    ) -> None:
        self.step = order.snapshot.step
        self.nbytes = order.snapshot.memory.nbytes
        """Of the memory that it takes."""
        self._saver = saver
        self._memories = memories
        self._check = check
        self._order = [order]

    def commit(self) -> CheckpointInfo:
        """Make it a checkpoint; returns when that is durable. From any thread. Raises what makes
        the save fail, and SaveFailed if it was committed or dropped before."""
        self._check()
        order = self._taken()
        if order is None:
            raise SaveFailed(f"the state held of step {self.step} is not there any more")
        self._saver.submit(replace(order, asked_s=time.perf_counter(), blocked=True), urgent=True)
        return order.pending.result()

    def drop(self) -> None:
        """Give it up: its memory is used for the next one."""
        if (order := self._taken()) is not None:
            order.snapshot.close()
            self._memories.give_back(order.snapshot.memory)

    def _taken(self) -> Order | None:
        try:
            return self._order.pop()  # one call into C: one of two threads gets it
        except IndexError:
            return None
