"""Checkpoints of one run: save, restore, retention, verification, export."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from holdfast.manager.averages import Average as Average
    from holdfast.manager.averages import average as average
    from holdfast.manager.catalog import open_checkpoint as open
    from holdfast.manager.ensembles import Ensemble as Ensemble
    from holdfast.manager.ensembles import ensemble as ensemble
    from holdfast.manager.evaluate import Evaluation as Evaluation
    from holdfast.manager.info import CheckpointInfo as CheckpointInfo
    from holdfast.manager.info import Restored as Restored
    from holdfast.manager.info import RunStatus as RunStatus
    from holdfast.manager.info import Verification as Verification
    from holdfast.manager.listing import Listing as Listing
    from holdfast.manager.loaded import LoadedCheckpoint as LoadedCheckpoint
    from holdfast.manager.manager import CheckpointManager as CheckpointManager
    from holdfast.manager.pending import Pending as Pending

__all__ = [
    "Average",
    "CheckpointInfo",
    "CheckpointManager",
    "Ensemble",
    "Evaluation",
    "Listing",
    "LoadedCheckpoint",
    "Pending",
    "Restored",
    "RunStatus",
    "Verification",
    "average",
    "ensemble",
    "open",
]

# Imported when first used: the command line needs `Listing` only, which is light;
# NumPy and the tree code would double the time that `holdfast ls` takes.
_HOMES = {
    "Average": "averages",
    "CheckpointInfo": "info",
    "CheckpointManager": "manager",
    "Ensemble": "ensembles",
    "Evaluation": "evaluate",
    "Listing": "listing",
    "LoadedCheckpoint": "loaded",
    "Pending": "pending",
    "Restored": "info",
    "RunStatus": "info",
    "Verification": "info",
    "average": "averages",
    "ensemble": "ensembles",
    "open": "catalog",
}


def __getattr__(name: str) -> object:
    if (home := _HOMES.get(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{home}")
    value = getattr(module, "open_checkpoint" if name == "open" else name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
