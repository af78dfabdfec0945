"""The feed for a DataLoader over an iterable dataset.

Consumed batches are loaded again and thrown away, unless the dataset knows its own position
(`state_dict`) and runs in this process.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.utils.data import DataLoader, Dataset

from holdfast.errors import LoopError
from holdfast.run.feed import Policy, Stateful
from holdfast.run.held import Held
from holdfast.run.randomness import PrivateStreams
from holdfast.torch.indices import length_of
from holdfast.torch.loaders import LoaderFeed, copy_of

logger = logging.getLogger("holdfast")


class StreamFeed(LoaderFeed):
    """An iterable dataset: consumed batches are loaded again and thrown away, unless it
    runs in this process and knows its own position."""

    kind = "stream"

    def __init__(self, loader: DataLoader[Any], *, policy: Policy = "refuse") -> None:
        super().__init__(loader, policy=policy)
        # In workers it runs ahead of the batches that were handed out.
        self._asked = isinstance(loader.dataset, Stateful) and not loader.num_workers
        self._streams: AbstractContextManager[Any] = nullcontext()
        if loader.persistent_workers:
            logger.warning(
                "%s: workers of an IterableDataset start anew in each epoch in spite of "
                "persistent_workers=True, so that the epoch can be replayed",
                self.name,
            )

    def identity(self) -> dict[str, Any]:
        loader = self.loader
        return {
            "type": self.name,
            "samples": length_of(loader.dataset),
            "batch_size": loader.batch_size,
            "drop_last": loader.drop_last,
            "workers": loader.num_workers,
            "dataset": type(loader.dataset).__qualname__,
        }

    def _find_held(self) -> Held:
        loader = self.loader
        roots = {
            "dataset": loader.dataset,
            "collate_fn": loader.collate_fn,
            "generator": loader.generator,
        }
        return Held(
            {name: root for name, root in roots.items() if root is not None},
            lambda value: isinstance(value, Dataset),
        )

    def _prepare(self, saved: dict[str, Any]) -> list[str]:
        super()._prepare(saved)  # differences in a dataset are not known to matter
        return []

    def _exact(self) -> bool:
        # Asked for its position, it starts as it did when the epoch began.
        return super()._exact() and not self._asked

    def _resume(self, saved: dict[str, Any]) -> None:
        if not self._asked:
            super()._resume(saved)
            return
        self.random.apply(saved["rng"])
        if saved["dataset"] is None:
            self._iterator = iter(())
        else:
            self.loader.dataset.load_state_dict(saved["dataset"])  # type: ignore[attr-defined]
            self._iterate(0)

    def _iterate(self, skip: int) -> None:
        alone = self._asked or self.loader.num_workers > 0
        self._streams = nullcontext() if alone else PrivateStreams()
        options = {**self._worker_options(), "persistent_workers": False}
        self._start_iterator(copy_of(self.loader, **options))
        for number in range(skip):
            try:
                self._next()
            except StopIteration:
                raise LoopError(
                    f"the dataset of {self.name} has only {number:,} batches now; {skip:,} had "
                    "been taken when the checkpoint was made",
                    hint="Put its data back as it was.",
                ) from None

    def _next(self) -> Any:
        with self._streams:
            return super()._next()

    def _record(self) -> dict[str, Any]:
        # Once it is exhausted (a last, short batch shows that) it is not asked: its
        # position is that of the end or already that of a new start, who knows.
        fetcher = getattr(self._iterator, "_dataset_fetcher", None)
        asked = self._asked and fetcher is not None and not fetcher.ended
        dataset: Any = self.loader.dataset
        return {**super()._record(), "dataset": dataset.state_dict() if asked else None}
