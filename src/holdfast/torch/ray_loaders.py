"""What `ray.train.torch.prepare_data_loader` returns: a loader around a DataLoader.

Ray is not imported: its class is known by its module.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from holdfast.torch.accelerated import PreparedFeed
from holdfast.torch.loaders import copy_of


def is_of_ray(loader: Any) -> bool:
    """Whether a loader is one of Ray Train's, which moves batches to the device."""
    return any(
        kind.__module__ == "ray.train.torch.train_loop_utils"
        and kind.__name__ == "_WrappedDataLoader"
        for kind in type(loader).__mro__
    )


class RayFeed(PreparedFeed):
    """A loader of Ray Train. The next batch is on its way to the device while one is in use, so
    it, too, takes a batch more than it hands out."""

    kind = "ray"
    base = "_dataloader"

    def _iterate(self, base: Any, skipped: int) -> Iterator[Any]:
        # In a generator, since its `iter` fetches the first batch.
        yield from copy_of(self.loader, _dataloader=base, dataloader_iter=None)

    def _end(self) -> None:
        pass
