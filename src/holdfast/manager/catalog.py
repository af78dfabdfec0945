"""Opening a checkpoint by its reference."""

from __future__ import annotations

import os

from holdfast.core.address import parse_reference
from holdfast.manager.loaded import LoadedCheckpoint
from holdfast.manager.manager import CheckpointManager


def open_checkpoint(
    reference: str | os.PathLike[str], *, allow_pickle: bool = False
) -> LoadedCheckpoint:
    """The checkpoint that `reference` names, as a lazy mapping; nothing runs on loading.

    Public as `holdfast.open`. `reference` is a run's address, with `@latest`,
    `@best:val_loss`, `@41200` (a step), `@a-tag` or `@id-prefix` behind it; without
    `@` the latest. Raises NoStore, CheckpointNotFound, BadAddress, DamagedObject.

    >>> import holdfast
    >>> with holdfast.CheckpointManager("memory://open") as ckpts:
    ...     _ = ckpts.save(7, {"x": 1.5}).result()
    >>> holdfast.open("memory://open@7")["x"]
    1.5
    """
    parsed = parse_reference(os.fspath(reference))
    manager = CheckpointManager(parsed.address, keep=None)
    return manager.load_selected(parsed.selector, allow_pickle=allow_pickle)
