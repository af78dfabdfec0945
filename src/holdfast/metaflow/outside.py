"""`Checkpoint`, `load_model` and `delete_model`: in any process, with or without a flow."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import weakref
from collections.abc import Mapping
from typing import Any, Self

from holdfast.errors import HoldfastError, UsageError
from holdfast.metaflow import obcheckpoint
from holdfast.metaflow.checkpoints import new_writer
from holdfast.metaflow.current import CurrentCheckpoint
from holdfast.metaflow.models import load_into
from holdfast.metaflow.places import Place, Root
from holdfast.metaflow.reading import Reading
from holdfast.metaflow.reference import DEFAULT_NAME, NotAReference, Reference
from holdfast.metaflow.task import VARIABLE, datastore_root, of_parent, running_task

logger = logging.getLogger("holdfast")


class Checkpoint(CurrentCheckpoint):
    """The checkpoints of the task that this process belongs to: a program that a task with
    `@checkpoint` has started, or a step, also one without the decorator. Each such object adds
    to a list of its own, and all are seen together.

    In any other process, a script or a notebook, what tasks have saved can be listed and loaded:

        Checkpoint().list(task="Train/7/fit/2")
        Checkpoint().load(reference, "out/")

    As a context manager it removes its folder at the end.
    """

    def __init__(self, temp_dir_root: str | None = None, init_dir: bool = False) -> None:
        checkpoints = _checkpoints()
        super().__init__(checkpoints, temp_dir_root=temp_dir_root)
        self._folders: list[str] = []
        weakref.finalize(self, _end, checkpoints, self._folders, os.getpid())
        if init_dir:
            _ = self.directory

    def _new_folder(self) -> str:
        self._folders.append(super()._new_folder())
        return self._folders[-1]

    def __enter__(self) -> Self:
        _ = self.directory
        return self

    def __exit__(self, *error: object) -> None:
        self.finish()

    def save(
        self,
        path: str | os.PathLike[str] | None = None,
        metadata: Mapping[str, Any] | None = None,
        latest: bool = True,
        name: str = DEFAULT_NAME,
        storage_format: str = "files",
        block: bool = True,
    ) -> dict[str, Any]:
        """As `current.checkpoint.save`; the order of the arguments is another one, that of
        `metaflow-checkpoint`. Raises UsageError where there is no task, too."""
        return super().save(path, name, metadata, latest, storage_format, block)


def load_model(reference: object, path: str | os.PathLike[str]) -> None:
    """Load a model or a checkpoint, every byte verified, into the folder `path`: what
    `current.model.save` or `current.checkpoint.save` returned, or its key. What has the same
    name there is replaced, other files stay.

    In any process. A key is looked up in the datastore of the flow that runs, or else in that
    which Metaflow's settings name. What `metaflow-checkpoint` has saved is loaded by it, if it
    is installed. Raises UsageError (a ValueError, too, if it names nothing that could be loaded),
    CheckpointNotFound, CorruptionError, StoreError.
    """
    if not path:
        raise NotAReference("load_model needs a folder to load into", hint="Name one.")
    reading = Reading(root_here())
    try:
        load_into(reading, reference, os.fspath(path))
    finally:
        reading.close()


def delete_model(reference: object) -> bool:
    """Delete a model or a checkpoint: exactly this one, whatever rule would keep it. False, with
    a line in the log, if it is gone already.

    Takes what `load_model` takes. Raises UsageError, CheckpointProtected if it is tagged or
    pinned, NoStore if there is no such run, StoreError.
    """
    if obcheckpoint.is_theirs(reference):
        return obcheckpoint.delete(reference)
    wanted = reference if isinstance(reference, str) else Reference.of(reference)
    deleted = Reading(root_here()).delete(wanted)
    if not deleted:
        key = wanted if isinstance(wanted, str) else wanted.key
        logger.warning("%s is gone already: nothing is deleted", key)
    return deleted


class _NoTask(Reading):
    """Checkpoints where there is no task: they can be read."""

    @property
    def place(self) -> Place:
        raise _refusal("has no task of its own")

    def save(self, *args: object, **options: object) -> Reference:
        raise _refusal("cannot save")

    def list(self, *, every_run: bool = False) -> list[Reference]:
        raise _refusal('can list what a task has saved: give `task="flow/run/step/task"`')


def _refusal(what: str) -> UsageError:
    return NotAReference(
        f"outside of a task of a flow `Checkpoint()` {what}",
        hint="To save, use it in a step, or in a program that a step with @checkpoint starts. In "
        "a script: `holdfast.CheckpointManager(folder).save(step, state)`.",
    )


def _checkpoints() -> Any:
    if _told() and (ours := of_parent()) is not None:
        return ours
    if (flow := _running_flow()) is None:
        return _NoTask(root_here())
    return running_task(flow, flow._datastore.parent_datastore).checkpoints(new_writer())


def _told() -> dict[str, Any]:
    """What the task that this process belongs to has told of itself, if it has. What a task of
    another flow has told, in which this flow was started, is passed over."""
    told = json.loads(os.environ.get(VARIABLE, "{}"))
    if told and _running_flow() is not None:
        from metaflow.metaflow_current import current

        return told if told.get("pathspec") == current.pathspec else {}
    return told


def _running_flow() -> Any:
    """The flow whose step runs in this process, or None."""
    if "metaflow" not in sys.modules:
        return None
    from metaflow.flowspec import FlowSpec
    from metaflow.metaflow_current import current

    if not current.is_running_flow:
        return None
    # Metaflow hands it to decorators only; `current.graph` is made from it.
    graph = vars(type(current)).get("graph")
    known = getattr(graph and graph.fget, "__defaults__", None) or ()
    return next((each for each in known if isinstance(each, FlowSpec)), None)


def root_here() -> Root:
    """The datastore of the task that this process belongs to, or else the one that Metaflow's
    settings name. Raises UsageError for one that Holdfast cannot use."""
    if told := _told():
        return Root(**told["root"])
    if (flow := _running_flow()) is not None:
        return datastore_root(flow._datastore.parent_datastore)
    from metaflow import metaflow_config
    from metaflow.plugins import DATASTORES

    kind = str(metaflow_config.DEFAULT_DATASTORE)
    [storage] = [each for each in DATASTORES if kind == each.TYPE]
    root = storage.get_datastore_root_from_config(print, create_on_absent=False)
    if root is None and kind == "local":
        root = ".metaflow"  # where Metaflow would make it
    if root is None:
        raise UsageError(
            f"Metaflow's settings do not say where its datastore {kind!r} is",
            hint=f"Set METAFLOW_DATASTORE_SYSROOT_{kind.upper()}.",
        )
    return datastore_root(storage(root))


def _end(checkpoints: Reading, folders: list[str], pid: int) -> None:
    """When the object, or the process, ends."""
    try:
        checkpoints.close()
    except HoldfastError as error:
        logger.error("the last save failed: %s", error)
    finally:
        if pid == os.getpid():  # what a forked child has is its parent's
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
