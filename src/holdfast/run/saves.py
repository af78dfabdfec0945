"""The saves that a process has made: which are committed, and what is logged after them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from holdfast.errors import HoldfastError, TornRead
from holdfast.run.costs import Costs
from holdfast.run.metrics import MetricBook
from holdfast.run.publish import Publisher
from holdfast.run.triggers import Triggers

logger = logging.getLogger("holdfast")


@dataclass
class Saved:
    """A save of this process, or the checkpoint that it resumed."""

    ticks: int
    """Bodies that were completed when it was taken."""
    pending: Any = None
    info: Any = None
    torn: bool = False
    """It failed since state changed while it was read; the next one will not."""

    def done(self) -> bool:
        return self.info is not None or self.pending.done()

    def checkpoint(self) -> Any | None:
        """The checkpoint; None if the save failed. Waits for it."""
        if self.info is None:
            try:
                self.info = self.pending.result()
            except (HoldfastError, OSError) as error:
                self.torn = isinstance(error, TornRead)
        return self.info


class Saves:
    """Follows saves until they are committed. Used by the loop's thread."""

    def __init__(
        self, manager: Any, triggers: Triggers, metrics: MetricBook, publisher: Publisher | None
    ) -> None:
        self._manager = manager
        self._triggers = triggers
        self._metrics = metrics
        self._publisher = publisher
        self._last: Saved | None = None
        self._waiting: list[Saved] = []
        """Not known to be committed."""
        self._late: list[tuple[Saved, Mapping[str, Any]]] = []
        self._stands: int | None = None
        self.costs = Costs(lambda: manager.history.read())
        self.busy = False
        """The loop's thread is in a save."""
        self.first = True
        """Of several ranks this one exports, and adds metrics to checkpoints."""

    @contextmanager
    def making(self) -> Iterator[None]:
        """Around what the loop's thread does for a save."""
        self.busy = True
        try:
            yield
        finally:
            self.busy = False

    @property
    def in_progress(self) -> int:
        """Saves that were begun, and of which nobody knows yet whether they will be committed.
        From any thread."""
        return sum(not saved.done() for saved in list(self._waiting))

    @property
    def stands(self) -> int | None:
        """The step of the newest checkpoint that this process made or resumed. From any
        thread."""
        made = [saved.pending for saved in list(self._waiting) if saved.done()]
        steps = [pending.step for pending in made if pending.exception() is None]
        if self._stands is not None:
            steps.append(self._stands)
        return max(steps, default=None)

    @property
    def durable_ticks(self) -> int | None:
        """How many bodies were completed at the last save, if that one is durable or becomes it.
        Waits for that. From any thread."""
        last = self._last
        return last.ticks if last is not None and last.checkpoint() is not None else None

    def stands_at(self, step: int) -> None:
        """A checkpoint was committed that was no save of the loop's."""
        self._stands = step

    def resumed(self, ticks: int, info: Any) -> None:
        """The state is that of the checkpoint `info`."""
        self._last = Saved(ticks, info=info)
        self._stands = info.step

    def submitted(self, ticks: int, pending: Any) -> None:
        """A save was begun."""
        self._last = Saved(ticks, pending)
        self._waiting.append(self._last)

    def of(self, ticks: int) -> Saved | None:
        """The last save, unless a body was completed since."""
        return self._last if self._last is not None and self._last.ticks == ticks else None

    def all_durable(self, ticks: int) -> bool:
        """Whether no body was completed since the last save, and that one is durable."""
        last = self.of(ticks)
        return last is not None and bool(last.checkpoint())

    def attach_later(self, saved: Saved, metrics: Mapping[str, Any]) -> None:
        """Add metrics to a checkpoint as soon as it is committed."""
        self._late.append((saved, metrics))

    def attach(self, saved: Saved, metrics: Mapping[str, Any]) -> None:
        """Add metrics to a checkpoint now. Waits for it; what fails is logged."""
        info = saved.checkpoint()
        if info is None or not self.first:
            return
        values = self._metrics.numbers(metrics)
        if all(info.metrics.get(name) == value for name, value in values.items()):
            return  # logged again by a resumed run
        try:
            saved.info = self._manager.log_metrics(info.id, values)
        except HoldfastError as error:
            address = self._manager.address
            logger.error("could not add metrics to %s@%d: %s", address, info.step, error)
            return
        self._triggers.committed(saved.info)
        self.publish()

    def collect(self) -> None:
        """Take notice of saves that are committed."""
        if not self._waiting and not self._late:
            return
        ready = [saved for saved in self._waiting if saved.done()]
        for saved in ready:
            if (info := saved.checkpoint()) is not None:
                self._stands = info.step
                self.costs.add(saved.pending.stats)
                self._triggers.committed(info)
                self._triggers.spent(saved.pending.stats)
            elif saved.torn:
                self._triggers.want("again")
        self._waiting = [saved for saved in self._waiting if saved not in ready]
        late, self._late = self._late, []
        for saved, metrics in late:
            if saved.done():
                self.attach(saved, metrics)
            else:
                self._late.append((saved, metrics))
        if ready:
            self.publish()

    def publish(self) -> None:
        """Bring the published export up to date, if there is one."""
        if self._publisher is not None and self.first:
            self._publisher.refresh()

    def close(self) -> None:
        """Wait for every save, and for the export."""
        for saved in self._waiting:
            saved.checkpoint()
        self.collect()
        if self._publisher is not None:
            self._publisher.wait()
