"""`current.checkpoint`: what a step's code sees."""

from __future__ import annotations

import builtins
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.errors import (
    CheckpointNotFound,
    CheckpointRemoved,
    CorruptionError,
    ObjectNotFound,
    UsageError,
)
from holdfast.metaflow.attributes import Attributes
from holdfast.metaflow.checkpoints import Checkpoints
from holdfast.metaflow.folders import new_folder
from holdfast.metaflow.loop import TaskLoop
from holdfast.metaflow.reference import DEFAULT_NAME, Reference, check_format
from holdfast.metaflow.stopping import Watch, stop

if TYPE_CHECKING:
    from holdfast.run.run import Run

_GONE = (CorruptionError, ObjectNotFound, CheckpointNotFound, CheckpointRemoved)
"""What a checkpoint is passed over for; an answer that does not come is no such reason."""


class CurrentCheckpoint:
    """The checkpoints of the task that runs.

        @checkpoint
        @step
        def fit(self):
            if current.checkpoint.is_loaded:
                model = load(os.path.join(current.checkpoint.directory, "model"))
            ...
            save(model, os.path.join(current.checkpoint.directory, "model"))
            current.checkpoint.save(metadata={"epoch": epoch})

    From any thread of the task's process.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        *,
        temp_dir_root: str | None = None,
        attributes: Attributes | None = None,
        loop: TaskLoop | None = None,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Asks nothing of the datastore and makes no folder."""
        self._checkpoints = checkpoints
        self._attributes = attributes
        self._loop = loop
        self._temp_dir_root = temp_dir_root
        self._tell = tell
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._directory: str | None = None
        self._info: Reference | None = None
        self._saved: builtins.list[dict[str, Any]] = []
        self._watch: Watch | None = None
        self._stops = False

    # -- what was loaded -----------------------------------------------------------------

    @property
    def is_loaded(self) -> bool:
        """Whether `directory` holds a checkpoint that was saved before."""
        return self._info is not None

    @property
    def info(self) -> Reference | None:
        """Which one that is; `info.metadata` is what it was saved with."""
        return self._info

    @property
    def task_identifier(self) -> str:
        """What names this task in every run of its flow: `fit/task-3`."""
        place = self._checkpoints.place
        return f"{place.step}/{place.task}"

    def go_on(self, policy: str) -> None:
        """Load what the task goes on from, if there is something; a damaged checkpoint is
        told, and passed over for the one before it."""
        self._load_newest(policy)
        if self._loop is not None:
            self._loop.set_attributes(self._info)

    def _load_newest(self, policy: str) -> None:
        card = self._checkpoints.card
        for reference in self._checkpoints.to_go_on_from(policy):
            start = time.monotonic()
            try:
                self.go_on_from(reference)
            except _GONE as error:
                line = f"{reference.url} is damaged and was passed over: {error.message}"
                self._tell(line)
                if card:
                    card.passed_over(line)
                continue
            if card:
                card.went_on(reference, time.monotonic() - start)
            self._tell(f"goes on from {reference.url} (of {reference.pathspec})")
            return

    def go_on_from(self, reference: Reference) -> None:
        """Load it into `directory`, and the flow's attributes that are in it."""
        self._load(reference, attributes=self._attributes)

    # -- the loop ------------------------------------------------------------------------

    @property
    def run(self) -> Run:
        """A Holdfast `Run` of this task: what it tracks, its loops and random states go on where
        the last attempt, or the run that is resumed, has saved them. Made on first use."""
        return self.run_with()

    def run_with(self, **options: Any) -> Run:
        """As `run`, for its first use, with options of `holdfast.Run`: `run_with(late=["ema"])`.

        Raises UsageError where there is a `run` already, in processes that the task has
        started, and in steps that run on several nodes.
        """
        if self._loop is None:
            raise UsageError(
                "current.checkpoint.run belongs to the task's own process",
                hint="Make a holdfast.Run with an address of its own here.",
            )
        return self._loop.open(**options)

    # -- the folder ----------------------------------------------------------------------

    @property
    def directory(self) -> str:
        """A folder of this task's own: what was loaded is in it, and `save` saves it. It is
        removed when the task ends."""
        with self._lock:
            if self._directory is None or not os.path.isdir(self._directory):
                self._directory = self._new_folder()
            return self._directory

    def _new_folder(self) -> str:
        return new_folder("checkpoint-", self._temp_dir_root)

    def cleanup(self) -> None:
        """Remove the folder; the next use of `directory` makes another."""
        self._exchange(None, None)

    def _exchange(self, directory: str | None, info: Reference | None) -> None:
        with self._lock:
            old, self._directory, self._info = self._directory, directory, info
        # What a forked child has is its parent's.
        if old is not None and self._pid == os.getpid():
            shutil.rmtree(old, ignore_errors=True)

    def refresh_directory(self) -> None:
        """Make `directory` an empty folder."""
        self.cleanup()

    # -- saving and loading --------------------------------------------------------------

    def save(
        self,
        path: str | os.PathLike[str] | None = None,
        name: str = DEFAULT_NAME,
        metadata: Mapping[str, Any] | None = None,
        latest: bool = True,
        storage_format: str = "files",
        block: bool = True,
    ) -> dict[str, Any]:
        """Save a file or a folder, by default `directory`; what names it, as plain values.

        With `latest` false it is never loaded by itself. `storage_format` may be "files" or
        "tar", which changes nothing. With `block` false it becomes durable in the background,
        at the latest when the task ends; the files may be changed at once in any case.

        Raises UsageError, StoreError, Fenced. Raises Preempted, once it is durable, if the
        machine is about to be taken away and another attempt of the task follows.
        """
        check_format(storage_format)
        stopping = latest and self._stops and self.preempted and self._pid == os.getpid()
        reference = self._checkpoints.save(
            self.directory if path is None else path,
            name=name,
            metadata=metadata,
            latest=latest,
            # Of one process, saves become durable in their order: those before it are, too.
            block=block or stopping,
            attributes=self._attributes,
        )
        self._saved.append(reference.to_dict())
        if stopping:
            stop(self._watch.notice if self._watch else "", reference.url)
        return reference.to_dict()

    @property
    def saved(self) -> builtins.list[dict[str, Any]]:
        """What `save` has returned in this process, in its order."""
        return builtins.list(self._saved)

    def load(
        self,
        reference: Reference | Mapping[str, Any] | str,
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        """Load a checkpoint, or the one with that key, every byte verified, into the folder
        `path`; without one, into a new `directory`. If it raises, all stays as it is.

        Raises UsageError, CheckpointNotFound, CorruptionError, StoreError.
        """
        wanted = self._checkpoints.resolve(reference)
        if path is not None:
            Path(path).mkdir(parents=True, exist_ok=True)
            self._checkpoints.load(wanted, path)
            return
        self._load(wanted)

    def _load(self, wanted: Reference, attributes: Attributes | None = None) -> None:
        new = self._new_folder()
        try:
            self._checkpoints.load(wanted, new, attributes=attributes)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        self._exchange(new, wanted)

    def list(
        self,
        name: str | None = None,
        task: object = None,
        attempt: int | None = None,
        full_namespace: bool = False,
    ) -> builtins.list[dict[str, Any]]:
        """Those of this task, newest first; with `full_namespace` those of its step in every
        run; with `task`, a task of any flow in this datastore or its pathspec or the beginning of
        one, those instead. `name` and `attempt` choose among them.
        """
        if task is None:
            found = self._checkpoints.list(every_run=full_namespace)
        else:
            found = self._checkpoints.saved_by(str(getattr(task, "pathspec", task)))
        return [
            each.to_dict()
            for each in found
            if (name is None or each.name == name) and (attempt is None or each.attempt == attempt)
        ]

    # -- machines that are taken away ------------------------------------------------------

    @property
    def preempted(self) -> bool:
        """Whether the machine is about to be taken away: time to save."""
        return self._watch is not None and bool(self._watch.notice)

    def heed(self, watch: Watch | None, *, stops: bool) -> None:
        """Let `preempted` be what `watch` says; with `stops` a save after that ends the task."""
        self._watch, self._stops = watch, stops

    # -- the end -------------------------------------------------------------------------

    def finish(self, *, complete: bool = True) -> None:
        """Wait until all is durable, and remove the folder. May be called again, and must be
        where a signal's handler has raised in the middle. Raises, once, what made a save in the
        background fail. `complete`: the step has come to its end, and so has `run`."""
        try:
            if self._loop is not None:
                self._loop.finish(complete=complete)
        finally:
            try:
                self._checkpoints.close()
            finally:
                self.cleanup()
