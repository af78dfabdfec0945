"""Holdfast makes long-running Python jobs resumable.

Kill the job at any moment and start the same command again: it goes on from the last
checkpoint and ends with the same bits as a run that was never killed.

    run = holdfast.Run("runs/mnist", every="10min", keep="last=3 best=2:val_loss")
    run.track(model=model, optimizer=optimizer, scheduler=scheduler, data=loader)

    for epoch in run.epochs(20):
        for x, y in run.batches(loader):
            run.log(loss=train_step(x, y))
        run.log(val_loss=evaluate(model))

Importing this module imports no framework and opens nothing.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

from holdfast import errors as errors
from holdfast.errors import HoldfastError as HoldfastError
from holdfast.errors import Preempted as Preempted

if TYPE_CHECKING:
    from holdfast.core.files import Directory as Directory
    from holdfast.core.files import File as File
    from holdfast.manager import CheckpointInfo as CheckpointInfo
    from holdfast.manager import CheckpointManager as CheckpointManager
    from holdfast.manager import Pending as Pending
    from holdfast.manager import average as average
    from holdfast.manager import ensemble as ensemble
    from holdfast.manager import open as open
    from holdfast.notices.preemption import Preemption as Preemption
    from holdfast.run.importing import import_checkpoint as import_checkpoint
    from holdfast.run.run import Run as Run
    from holdfast.run.variables import Variables as Variables

__version__ = "0.1.0"

__all__ = [
    "CheckpointInfo",
    "CheckpointManager",
    "Directory",
    "File",
    "HoldfastError",
    "Pending",
    "Preempted",
    "Preemption",
    "Run",
    "Variables",
    "__version__",
    "average",
    "ensemble",
    "errors",
    "import_checkpoint",
    "open",
]

# Imported when first used: numpy, which most of them need, would double the time
# that `holdfast ls` takes to start (0.08 s).
_HOMES = {
    "CheckpointInfo": "holdfast.manager",
    "CheckpointManager": "holdfast.manager",
    "Directory": "holdfast.core.files",
    "File": "holdfast.core.files",
    "Pending": "holdfast.manager",
    "Preemption": "holdfast.notices.preemption",
    "Run": "holdfast.run.run",
    "Variables": "holdfast.run.variables",
    "import_checkpoint": "holdfast.run.importing",
    "average": "holdfast.manager",
    "ensemble": "holdfast.manager",
    "open": "holdfast.manager",
}


def __getattr__(name: str) -> object:
    if (home := _HOMES.get(name)) is None:
        raise AttributeError(f"module 'holdfast' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "HOLDFAST_SUPERVISOR" in os.environ:
    # `holdfast run` may ask where the threads of this process are before it has a Run, or where
    # it never gets one: a loader's worker that was spawned.
    import_module("holdfast.manager.heartbeat")
