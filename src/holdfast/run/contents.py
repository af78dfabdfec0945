"""What a checkpoint of a run holds, put together at a boundary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from holdfast.core.frameworks import loaded_adapters
from holdfast.run import position as at
from holdfast.run.attributes import Attributes
from holdfast.run.constructed import Constructed
from holdfast.run.engine import Engine
from holdfast.run.feeds import FeedBook
from holdfast.run.gradients import Accumulation
from holdfast.run.loop import Loop
from holdfast.run.metrics import MetricBook
from holdfast.run.tracking import Tracked


@dataclass(frozen=True)
class Content:
    """The arguments of `CheckpointManager.save` and `hold` that say what is saved. Live
    objects: they are captured before training goes on."""

    step: int
    state: dict[str, Any]
    loop: dict[str, Any]
    metrics: dict[str, float]


class Contents:
    """Where a session's parts are asked for theirs. Used by the loop's thread."""

    def __init__(
        self,
        engine: Engine,
        tracked: Tracked,
        metrics: MetricBook,
        feeds: FeedBook,
        gradients: Accumulation,
        constructed: Constructed,
        attributes: Attributes,
        bucket_orders: Callable[[dict[str, Any]], dict[str, Any]],
    ) -> None:
        self.lengths: dict[str, int] = {}
        """Of the loops' data, by place."""
        self._engine = engine
        self._tracked = tracked
        self._metrics = metrics
        self._feeds = feeds
        self._gradients = gradients
        self._constructed = constructed
        self._attributes = attributes
        self._bucket_orders = bucket_orders

    def note_length(self, loop: Loop) -> str:
        """An epoch of the loop begins: note how long it is. What to say of it, if that is
        another length than before."""
        length = loop.feed.length()
        if length is None:
            return ""
        before = self.lengths.get(loop.place, length)
        self.lengths[loop.place] = length
        changed = before != length
        return f"{loop.label}: {length:,} items in an epoch, {before:,} before" if changed else ""

    def now(self) -> Content:
        """Raises LoopError if something that should be tracked is not."""
        self._tracked.check_complete(loaded_adapters(), saving=True)
        position = self._engine.snapshot()
        feeds = self._engine.open_feeds()
        state = self._tracked.state()
        loop = {
            **at.to_tree(position),
            "names": sorted(state),
            "loaders": self._tracked.loaders(),
            "metrics": self._metrics.to_tree(),
            "lengths": dict(self.lengths),
            "feeds": self._feeds.states(feeds),
            "held": self._feeds.held(feeds[-1:] if position.inside else []),
            "gradients": self._gradients.state(),
            "settings": self._constructed.to_tree(),
            "attributes": self._attributes.to_tree(loaded_adapters(), state),
            "buckets": self._bucket_orders(state),
        }
        return Content(position.step, state, loop, self._metrics.known())
