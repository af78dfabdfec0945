"""The checkpoints of one task: saved by its processes, listed together, loaded by any of them."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.core.aside import aside
from holdfast.core.files import Directory, File
from holdfast.errors import CorruptionError, Fenced, HoldfastError, SaveFailed, UsageError
from holdfast.manager.info import CheckpointInfo
from holdfast.manager.manager import CheckpointManager
from holdfast.manager.pending import Pending
from holdfast.metaflow.attributes import Attributes
from holdfast.metaflow.origins import origins_of
from holdfast.metaflow.places import (
    MAIN,
    MODELS,
    Place,
    Root,
    RunName,
    holds_models,
    is_loop,
    lineage,
)
from holdfast.metaflow.reading import (
    ABOUT,
    ATTRIBUTES,
    CONTENT,
    Reading,
    in_order_of_attempts,
    newest_first,
)
from holdfast.metaflow.reference import (
    DEFAULT_NAME,
    METADATA_BYTES,
    Reference,
    metrics_of,
    note_of,
    plain_metadata,
    read_note,
)
from holdfast.stores.looking import folders_in

if TYPE_CHECKING:
    from holdfast.metaflow.card import Card

logger = logging.getLogger("holdfast")


class Checkpoints(Reading):
    """What a task's process sees of its checkpoints; of its models, if that is what `writer`
    adds. From any thread.

    What a signal's handler raises in the middle of `save` or `close` is raised when that has
    ended.

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
        card: Card | None = None,
    ) -> None:
        """Asks nothing of the datastore. `card` is told what happens."""
        self.place = place
        self.pathspec = pathspec
        self.attempt = attempt
        self.namespace = namespace
        self._writer = writer
        self._rank = rank
        self._keep = keep
        self.card = card
        super().__init__(root)

    def _begin(self) -> None:
        super()._begin()
        self._manager: CheckpointManager | None = None
        """The one that saves."""
        self._version = 0
        self._pending: list[Pending] = []
        """Saves in the background of which nobody has been told how they ended."""
        self._fenced: Fenced | None = None

    def become_another(self) -> None:
        """In a forked child: its parent goes on with the run and the locks that it has."""
        self._writer = self._another_writer()
        self.card = None
        super().become_another()

    def _another_writer(self) -> str:
        return new_writer(MODELS if holds_models(self._writer) else "at")

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
        attributes: Attributes | None = None,
    ) -> Reference:
        """Save the file or the folder at `path`, and `attributes` with it.

        It is read, or copied, before this returns: you may change it at once. With `block` it
        is durable then; otherwise `close` waits. Numbers in `metadata` are metrics, too.
        Raises UsageError and StateError before anything is saved; StoreError; SaveFailed, also
        for a file that changes while it is read; Fenced if a later attempt of the task has begun.
        """
        if not os.fspath(path):
            raise UsageError("an empty path names nothing to save", hint="Give a file or a folder.")
        source = Path(path)
        if not source.exists():
            raise UsageError(
                f"there is nothing to save at {str(path)!r}",
                hint="Write the files first; without a path it is `current.checkpoint.directory`.",
            )
        plain = plain_metadata(metadata)
        values = {} if attributes is None else attributes.state_dict()
        noted = {
            "name": str(name),
            "attempt": self.attempt,
            "pathspec": self.pathspec,
            "metadata": plain,
            "latest": bool(latest),
            "file": "" if source.is_dir() else source.name,
            "rank": self._rank,
            "namespace": self.namespace,
            "attributes": [*values],
        }
        if len(note := note_of(noted)) > 2 * METADATA_BYTES:
            raise UsageError(
                f"the name of a checkpoint is too long: {str(name)[:80]!r}…",
                hint="Put it in a file of the checkpoint.",
            )
        content = Directory(source, follow_links=True) if source.is_dir() else File(source)
        with self._lock:
            manager = self._open()
            self._version += 1
            version = self._version
            self._pending = [each for each in self._pending if not _is_saved(each)]
            try:
                pending = manager.save(
                    version,
                    {CONTENT: content, ABOUT: note, **({ATTRIBUTES: values} if values else {})},
                    metrics=metrics_of(plain),
                    note=note,
                    block=block,
                )
            except HoldfastError as error:
                if isinstance(error, Fenced):
                    self._fenced = error
                if self.card:
                    self.card.failed(version, error)
                raise
            if self.card:
                self.card.saving(pending)
            if not block:
                self._pending.append(pending)
        key = "/".join((*self.place.parts, self._writer))
        if block and (saved := read_note(pending.result(), key)):
            return saved
        return Reference(
            key=f"{key}@{version}",
            url=f"{manager.address}@{version}",
            size=_size(source),
            version_id=version,
            created_on=datetime.now(UTC).isoformat(),
            **noted,
        )

    @aside
    def close(self) -> None:
        """Wait until every save is durable, and let others write. May be called again.

        Raises, once, what made a save in the background fail.
        """
        failed = self._wait()
        with self._lock:
            for address, manager in list(self._managers.items()):
                with suppress(SaveFailed):  # that is told by now: by `save`, or below
                    manager.close()
                del self._managers[address]
            self._manager = None
        if failed is not None:
            raise failed

    def _wait(self) -> HoldfastError | None:
        """For the saves in the background; the first error."""
        failed: HoldfastError | None = None
        for pending in list(self._pending):
            try:
                pending.result()
            except HoldfastError as error:
                failed = failed or error
                if isinstance(error, Fenced):
                    self._fenced = error
            with self._lock, suppress(ValueError):  # another thread waits, too
                self._pending.remove(pending)
        return failed

    def _open(self) -> CheckpointManager:
        """Become the writer of a run. What is damaged in its list is mended."""
        if self._fenced is not None:
            raise self._fenced
        if self._manager is None:
            try:
                self._manager = self._acquired()
            except CorruptionError as error:
                logger.error("checkpoints are saved beside others: %s", error.message)
                self._writer = self._another_writer()
                self._manager = self._acquired()
            if self.card:
                self.card.opened(self._manager)
        return self._manager

    def _acquired(self) -> CheckpointManager:
        manager = self.manager(self._address)
        with suppress(CorruptionError):  # it is mended below
            self._check_newest(manager.checkpoints())
        manager.acquire()
        listed = manager.checkpoints()
        self._check_newest(listed)
        self._version = max((info.step for info in listed), default=0)
        return manager

    def _check_newest(self, listed: Sequence[CheckpointInfo]) -> None:
        """Raises Fenced if a later attempt has saved: this one was given up, and lives. It must
        not take the run back."""
        notes = filter(None, (read_note(info, "") for info in listed))
        newest = max((each.attempt for each in notes), default=0)
        if newest > self.attempt:
            self._fenced = Fenced(
                f"attempt {newest} of {self.pathspec} has begun: attempt {self.attempt} "
                "saves no more"
            )
            raise self._fenced

    @property
    def _address(self) -> str:
        return self.root.address(*self.place.parts, self._writer)

    def _manager_of(self, address: str) -> CheckpointManager:
        own = address == self._address
        # A later attempt of a task replaces an earlier one: Metaflow has seen it end.
        return CheckpointManager(address, keep=self._keep if own else None, take_over=own)

    # -- finding -------------------------------------------------------------------------

    def list(self, *, every_run: bool = False) -> list[Reference]:
        """Those of this task, newest first; with `every_run` in all runs of the flow.

        Raises StoreError.
        """
        runs = self._runs() if every_run else [self.place.run]
        return newest_first(each for run in runs for each in self._in_run(run))

    def to_go_on_from(self, policy: str) -> Iterator[Reference]:
        """What a starting task may load, the best first.

        "fresh": what an earlier attempt of it has saved, or the task of the run that this one
        resumes; "eager": or else the newest of any run in the same namespace; "none": nothing.
        """
        tried: set[str] = set()
        for each in self._candidates(policy):
            if each.key not in tried:
                tried.add(each.key)
                yield each

    def _candidates(self, policy: str) -> Iterator[Reference]:
        if policy == "none":
            return
        if self.attempt > 0:
            yield from self._good(self._in_run(self.place.run, mend=True))
        for family, ours in self.earlier_runs(policy):
            found = self._good(each for run in family for each in self._in_run(run))
            yield from (each for each in found if ours or each.namespace == self.namespace)

    def earlier_runs(self, policy: str) -> Iterator[tuple[Sequence[RunName], bool]]:
        """The other runs that a starting task may go on from, nearest relatives first; and
        whether they are relatives: of others only what this namespace has saved counts.
        """
        if policy == "none" or (not self.place.run.origin and policy != "eager"):
            return
        runs = self._runs()
        origins = cache(partial(origins_of, self.root, self.place.flow))
        for family in lineage(self.place.run, runs, origins):
            yield family, True
        if policy == "eager":
            yield runs, False

    def loops_of(self, run: RunName) -> Iterable[CheckpointManager]:
        """Of this task, in one run of the flow. For reading."""
        place = (*self.place.task_parts, run.part)
        for writer in filter(is_loop, folders_in(self.root.address(*place))):
            yield self.manager(self.root.address(*place, writer))

    def load(
        self,
        reference: Reference,
        into: str | os.PathLike[str],
        *,
        attributes: Attributes | None = None,
    ) -> None:
        super().load(reference, into, attributes=attributes)
        if self.card:
            self.card.loaded(reference)

    def _good(self, references: Iterable[Reference]) -> list[Reference]:
        # All nodes of a step that runs on several go on from the same: the control node's.
        return newest_first(each for each in references if each.latest and not each.rank)

    def _runs(self) -> list[RunName]:
        return self._runs_in(self.place.task_parts)

    def _in_run(self, run: RunName, *, mend: bool = False) -> Iterator[Reference]:
        """`mend`: take this process's run over first, as a save does, for then checkpoints that
        are whole are listed though the list is damaged."""
        place = (*self.place.task_parts, run.part)
        found: list[Reference] = []
        for writer in self._writers_in(place):
            if mend and writer == self._writer:
                with self._lock:
                    self._open()
            found += self._of_writer((*place, writer))
        return in_order_of_attempts(found)


def new_writer(kind: str = "at") -> str:
    """A name for one more process of a task that saves."""
    return f"{kind}-{secrets.token_hex(4)}"


def _is_saved(pending: Pending) -> bool:
    return pending.done() and pending.exception() is None


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
