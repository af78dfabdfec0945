"""`current.model`: the models that a step saves, and those that it has loaded."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from holdfast.errors import CheckpointNotFound, NoStore
from holdfast.metaflow import obcheckpoint
from holdfast.metaflow.checkpoints import Checkpoints
from holdfast.metaflow.folders import new_folder
from holdfast.metaflow.places import MAIN, MODELS
from holdfast.metaflow.reading import Reading
from holdfast.metaflow.reference import check_format
from holdfast.metaflow.task import Task


class LoadedModels(Mapping[str, str | None]):
    """Where the models are that this task has loaded: by the name of the attribute for those of
    `@model(load=…)`, by the key of what `current.model.load` was given for others.

    None: it was missing, and `best_effort_load` is on.
    """

    def __init__(self) -> None:
        self._paths: dict[str, str | None] = {}
        self._made: list[str] = []
        """Folders of ours, which go at the end of the task."""
        self._pid = os.getpid()
        self.info: dict[str, dict[str, Any]] = {}
        """What is known of each, by the same names: `info["model"]["metadata"]`."""

    def __getitem__(self, name: str) -> str | None:
        return self._paths[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def cleanup(self, name: str) -> None:
        """Forget it, and remove its folder unless you have named that. Raises KeyError."""
        path = self._paths.pop(name)
        self.info.pop(name, None)
        self._remove([each for each in self._made if each == path])

    def _remove(self, folders: Sequence[str]) -> None:
        if self._pid == os.getpid():  # what a forked child has is its parent's
            for folder in list(folders):
                shutil.rmtree(folder, ignore_errors=True)
                self._made.remove(folder)


class CurrentModel:
    """The models of the task that runs: kept until they are deleted, and loaded by whoever has
    what `save` returned.

        @model
        @step
        def fit(self):
            ...
            self.trained = current.model.save("out/", label="trained")

        @model(load="trained")
        @step
        def test(self):
            weights = os.path.join(current.model.loaded["trained"], "weights")

    From any thread of the task's process.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        *,
        temp_dir_root: str | None = None,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Asks nothing of the datastore and makes no folder."""
        self._checkpoints = checkpoints
        self._temp_dir_root = temp_dir_root
        self._tell = tell
        self._lock = threading.RLock()
        self._saved: list[dict[str, Any]] = []
        self.loaded = LoadedModels()

    def save(
        self,
        path: str | os.PathLike[str],
        label: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        storage_format: str = "tar",
    ) -> dict[str, Any]:
        """Save a file or a folder; what names it, as plain values. It is durable when this
        returns, and no rule ever removes it: `delete_model` does.

        `label` is for people, by default the flow and the step. `storage_format` may be "files"
        or "tar", which changes nothing. Raises UsageError, StoreError, SaveFailed, Fenced.
        """
        check_format(storage_format)
        place = self._checkpoints.place
        label = f"{place.flow}_{place.step}" if label is None else label
        reference = self._checkpoints.save(path, name=label, metadata=metadata)
        self._saved.append(reference.to_dict())
        return reference.to_dict()

    @property
    def saved(self) -> list[dict[str, Any]]:
        """What `save` has returned in this process, in its order."""
        return list(self._saved)

    def load(self, reference: object, path: str | os.PathLike[str] | None = None) -> str:
        """Load what a `save` returned, of `current.model` or `current.checkpoint`, or its key,
        every byte verified; the folder that it is in then: `path`, or a new one, which goes at
        the end of the task.

        Raises UsageError, CheckpointNotFound, CorruptionError, StoreError.
        """
        return self._load(reference, path, None)

    def _load(
        self, reference: object, path: str | os.PathLike[str] | None, name: str | None
    ) -> str:
        if path is None:
            into = new_folder("model-", self._temp_dir_root)
            self.loaded._made.append(into)
        else:
            into = os.fspath(path)
        try:
            about = load_into(self._checkpoints, reference, into)
        except BaseException:
            self.loaded._remove([each for each in self.loaded._made if each == into])
            raise
        with self._lock:
            self.loaded._paths[name or about["key"]] = into
            self.loaded.info[name or about["key"]] = about
        return into

    def load_attributes(
        self, flow: object, named: Sequence[tuple[str, str | None]], *, best_effort: bool
    ) -> None:
        """Those that attributes of `flow` name, each into its path or a new folder. With
        `best_effort` what is missing is told, and is None. Raises as `load`."""
        for name, path in named:
            try:
                reference = getattr(flow, name, None)
                if reference is None:
                    raise CheckpointNotFound(f"the flow has no attribute {name!r} here")
                self._load(reference, path, name)
            except (CheckpointNotFound, NoStore) as error:
                if not best_effort:
                    raise
                self._tell(f"{name!r} is missing: {error.message}")
                self.loaded._paths[name] = None
                continue
            self._tell(f"loaded {name!r}: {self.loaded.info[name]['key']}")

    def finish(self) -> None:
        """Give the run up, and remove the folders. May be called again."""
        try:
            self._checkpoints.close()
        finally:
            self.loaded._remove(self.loaded._made)


def load_into(reading: Reading, reference: object, path: str) -> dict[str, Any]:
    """Load what `save` of `current.model` or `current.checkpoint` returned, or its key, or what
    `metaflow-checkpoint` has saved; what is known of it."""
    if not obcheckpoint.is_theirs(reference):
        wanted = reading.resolve(reference)
        os.makedirs(path, exist_ok=True)
        reading.load(wanted, path)
        return wanted.to_dict()
    os.makedirs(path, exist_ok=True)
    obcheckpoint.load(reference, path)
    if isinstance(reference, str):
        return {"key": reference}
    theirs: Any = reference
    return dict(theirs) if isinstance(theirs, Mapping) else theirs.to_dict()


def begin(
    task: Task,
    flow: Any,
    *,
    load: Sequence[tuple[str, str | None]],
    best_effort_load: bool,
    temp_dir_root: str | None,
    tell: Callable[[str], None],
) -> CurrentModel:
    """What `current.model` is for this task, with what `load` names."""
    writer = task.node.writer
    checkpoints = task.checkpoints(MODELS if writer == MAIN else f"{MODELS}-{writer}")
    current = CurrentModel(checkpoints, temp_dir_root=temp_dir_root, tell=tell)
    try:
        current.load_attributes(flow, load, best_effort=best_effort_load)
    except BaseException:
        current.finish()
        raise
    return current
