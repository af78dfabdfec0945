"""The checkpoints of one task: saved by its processes, listed together, loaded by any of them."""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from holdfast.core.files import Directory, File
from holdfast.errors import CorruptionError, NoStore, UsageError
from holdfast.manager.manager import CheckpointManager
from holdfast.manager.pending import Pending
from holdfast.metaflow.aside import aside
from holdfast.metaflow.places import MAIN, Place, Root, RunName, lineage
from holdfast.metaflow.reference import (
    DEFAULT_NAME,
    Reference,
    metrics_of,
    note_of,
    plain_metadata,
    read_note,
)
from holdfast.stores.looking import folders_in

logger = logging.getLogger("holdfast")

_CONTENT = "files"
"""Where a checkpoint's files are in its state."""


class Checkpoints:
    """What a task's process sees of its checkpoints. From any thread.

    `writer` names this process among those of the task: each adds to a Holdfast run of its
    own. A process that was forked from this one gets another, by itself.
    """

    def __init__(
        self,
        root: Root,
        place: Place,
        *,
        pathspec: str,
        attempt: int,
        namespace: str = "",
        writer: str = MAIN,
        rank: int | None = None,
        keep: str | None = None,
    ) -> None:
        """Asks nothing of the datastore."""
        self.root = root
        self.place = place
        self._pathspec = pathspec
        self._attempt = attempt
        self._namespace = namespace
        self._writer = writer
        self._rank = rank
        self._keep = keep
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._manager: CheckpointManager | None = None
        self._version = 0
        self._pending: list[Pending] = []

    # -- saving --------------------------------------------------------------------------

    @aside
    def save(
        self,
        path: str | os.PathLike[str],
        *,
        name: str = DEFAULT_NAME,
        metadata: Mapping[str, Any] | None = None,
        latest: bool = True,
        block: bool = True,
    ) -> Reference:
        """Save the file or the folder at `path`.

        It is read, or copied, before this returns: you may change it at once. With `block` it
        is durable then; otherwise `flush` waits. Numbers in `metadata` are metrics, too.
        Raises UsageError before anything is written; StoreError; Fenced if a later attempt of
        the task has begun.
        """
        source = Path(path)
        if not source.exists():
            raise UsageError(
                f"there is nothing to save at {str(path)!r}",
                hint="Write the files first; without a path it is `current.checkpoint.directory`.",
            )
        plain = plain_metadata(metadata)
        content = Directory(source, follow_links=True) if source.is_dir() else File(source)
        noted = {
            "name": str(name),
            "attempt": self._attempt,
            "pathspec": self._pathspec,
            "metadata": plain,
            "latest": bool(latest),
            "file": "" if source.is_dir() else source.name,
            "rank": self._rank,
            "namespace": self._namespace,
        }
        with self._lock:
            manager = self._open()
            self._version += 1
            version = self._version
            pending = manager.save(
                version,
                {_CONTENT: content},
                metrics=metrics_of(plain),
                note=note_of(noted),
                block=block,
            )
            self._pending = [each for each in self._pending if not each.done()]
            if not block:
                self._pending.append(pending)
        key = "/".join((*self.place.parts, self._writer))
        return Reference(
            key=f"{key}@{version}",
            url=f"{manager.address}@{version}",
            size=pending.result().nbytes if block else _size(source),
            version_id=version,
            created_on=datetime.now(UTC).isoformat(),
            **noted,
        )

    @aside
    def flush(self) -> None:
        """Wait until every save is durable. Raises what made the last one fail."""
        for pending in list(self._pending):
            pending.result()

    @aside
    def close(self) -> None:
        """Finish, and let others write. Raises as `flush`; may be called twice."""
        with self._lock:
            manager, self._manager = self._manager, None
        if manager is not None and self._pid == os.getpid():
            manager.close()

    def _open(self) -> CheckpointManager:
        if self._pid != os.getpid():  # forked: its parent goes on with the run that it has
            self._pid = os.getpid()
            self._writer, self._manager, self._pending = new_writer(), None, []
        if self._manager is None:
            # A later attempt of a task replaces an earlier one: Metaflow has seen it end.
            self._manager = CheckpointManager(
                self.root.address(*self.place.parts, self._writer),
                keep=self._keep,
                take_over=True,
            )
            newest = self._manager.checkpoints()[-1:]
            self._version = newest[0].step if newest else 0
        return self._manager

    # -- finding -------------------------------------------------------------------------

    def list(self, *, every_run: bool = False) -> list[Reference]:
        """Those of this task, newest first; with `every_run` in all runs of the flow.

        Raises StoreError.
        """
        runs = self._runs() if every_run else [self.place.run]
        return _newest_first(each for run in runs for each in self._in_run(run))

    def to_go_on_from(self, policy: str) -> Iterator[Reference]:
        """What a starting task may load, the best first.

        "fresh": what an earlier attempt of it has saved, or the task of the run that this one
        resumes; "eager": or else the newest of any run in the same namespace; "none": nothing.
        """
        if policy == "none":
            return
        if self._attempt > 0:
            yield from self._good(self._in_run(self.place.run))
        if not self.place.run.origin and policy != "eager":
            return
        runs = self._runs()
        for family in lineage(self.place.run, runs):
            yield from self._good(each for run in family for each in self._in_run(run))
        if policy == "eager":
            found = self._good(each for run in runs for each in self._in_run(run))
            yield from (each for each in found if each.namespace == self._namespace)

    def load(self, reference: Reference, into: str | os.PathLike[str]) -> None:
        """Write its files into the folder `into`, every byte verified; what has the same name
        there is replaced, other files stay.

        Raises CheckpointNotFound, CorruptionError, StoreError.
        """
        address, _, version = reference.url.rpartition("@")
        content = File(Path(into, reference.file)) if reference.file else Directory(into)
        with CheckpointManager(address, keep=None) as manager:
            manager.restore({_CONTENT: content}, int(version), rng=False)

    def _good(self, references: Iterable[Reference]) -> list[Reference]:
        # All nodes of a step that runs on several go on from the same: the control node's.
        return _newest_first(each for each in references if each.latest and not each.rank)

    def _runs(self) -> list[RunName]:
        folders = folders_in(self.root.address(*self.place.task_parts))
        return [RunName.parse(folder) for folder in folders]

    def _in_run(self, run: RunName) -> Iterator[Reference]:
        place = (*self.place.task_parts, run.part)
        for writer in folders_in(self.root.address(*place)):
            address = self.root.address(*place, writer)
            try:
                with CheckpointManager(address, keep=None) as manager:
                    infos = manager.checkpoints()
            except NoStore:
                continue
            except CorruptionError as error:
                logger.error("%s is passed over: %s", address, error.message)
                continue
            key = "/".join((*place, writer))
            yield from filter(None, (read_note(info, key) for info in infos))


def new_writer() -> str:
    """A name for one more process of a task that saves."""
    return f"at-{secrets.token_hex(4)}"


def _newest_first(references: Iterable[Reference]) -> list[Reference]:
    return sorted(references, key=lambda each: (each.created_on, each.version_id), reverse=True)


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
