"""Feeds for `torch.utils.data.DataLoader`: which one a loader gets.

The user's loader object is never changed: iteration uses a private copy of it, which
shares its dataset, sampler and generators. See docs/design/data-order.md.
"""

from __future__ import annotations

import logging
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from holdfast.run.feed import BaseFeed, Policy, Stateful
from holdfast.run.iterables import AskedFeed, CountedFeed
from holdfast.torch.accelerated import PreparedFeed, inner_loader, is_prepared
from holdfast.torch.indices import samplers
from holdfast.torch.map_feed import MapFeed
from holdfast.torch.randomness import TORCH
from holdfast.torch.ray_loaders import RayFeed, is_of_ray
from holdfast.torch.stream_feed import StreamFeed
from holdfast.torch.workers import death_watch

__all__ = ["feed", "random_library"]

random_library = TORCH

logger = logging.getLogger("holdfast")


def feed(loader: Any, *, policy: Policy = "refuse") -> BaseFeed | None:
    """The feed for a DataLoader; None if `loader` is something else."""
    if is_prepared(loader):
        inner = feed(inner_loader(loader), policy=policy)
        return None if inner is None else PreparedFeed(loader, inner)
    if is_of_ray(loader):
        inner = feed(loader._dataloader, policy=policy)
        return None if inner is None else RayFeed(loader, inner)
    if not isinstance(loader, DataLoader):
        return None
    if isinstance(loader, Stateful):
        return AskedFeed(loader, policy=policy, guard=death_watch.waiting, tell=samplers(loader))
    kind = type(loader)
    if (
        kind.__iter__ is not DataLoader.__iter__
        or kind._get_iterator is not DataLoader._get_iterator
    ):
        # It decides what an epoch is. All that is known is what it yields.
        if loader.persistent_workers:
            logger.warning(
                "%s has an __iter__ of its own and persistent_workers=True: random numbers drawn "
                "in its workers go on from epoch to epoch and cannot be replayed",
                kind.__name__,
            )
        return CountedFeed(loader, policy=policy, guard=death_watch.waiting, tell=samplers(loader))
    if isinstance(loader.dataset, IterableDataset):
        return StreamFeed(loader, policy=policy)
    return MapFeed(loader, policy=policy)
