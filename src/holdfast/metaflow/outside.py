"""`from metaflow import Checkpoint`: for processes that a task has started."""

from __future__ import annotations

from holdfast.errors import UsageError
from holdfast.metaflow.current import CurrentCheckpoint
from holdfast.metaflow.task import of_parent


def checkpoint(temp_dir_root: str | None = None, init_dir: bool = False) -> CurrentCheckpoint:
    """The checkpoints of the task that has started this process; each process of a task adds
    to its own list, and all are seen together.

    Raises UsageError in a process that no task with `@checkpoint` has started.
    """
    current = of_parent(temp_dir_root)
    if current is None:
        raise UsageError(
            "no task with @checkpoint has started this process",
            hint="Use `current.checkpoint` inside a step, or `holdfast.open(url)` elsewhere: "
            "`url` is in what `save` returned.",
        )
    if init_dir:
        _ = current.directory
    return current
