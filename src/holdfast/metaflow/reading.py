"""Checkpoints and models of any task of a datastore: found, loaded and deleted by reference."""

from __future__ import annotations

import logging
import os
import re
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from holdfast.core.address import shell_word
from holdfast.core.files import Directory, File
from holdfast.core.stored import is_safe_name
from holdfast.errors import (
    CheckpointNotFound,
    CheckpointProtected,
    CheckpointRemoved,
    CorruptionError,
    NoStore,
    ObjectNotFound,
    UsageError,
)
from holdfast.manager.info import CheckpointInfo
from holdfast.manager.listing import Listing
from holdfast.manager.manager import CheckpointManager
from holdfast.metaflow.attributes import Attributes
from holdfast.metaflow.folders import filled
from holdfast.metaflow.places import FOLDER, Root, RunName, holds_models, is_loop, key_part
from holdfast.metaflow.reference import NotAReference, Reference, read_note
from holdfast.repo.repo import Repo
from holdfast.stores.looking import folders_in
from holdfast.stores.open import open_store

logger = logging.getLogger("holdfast")

CONTENT = "files"
"""Where a checkpoint's files are in its state."""
ATTRIBUTES = "attributes"
"""Where those of the flow's `self` are, if there are any."""
ABOUT = "about"
"""Where its note is once more: a list that was damaged is rebuilt without notes."""

_VERSION = re.compile(r"[0-9]{1,18}|[0-9a-f]{64}")
"""The number of a save of a task, or the id of a model."""


class Reading:
    """What is kept in a datastore, for any process. From any thread, and from forked children."""

    def __init__(self, root: Root) -> None:
        """Asks nothing of the datastore."""
        self.root = root
        self._begin()
        _every.add(self)

    def _begin(self) -> None:
        # Of the handler of a signal that comes in the middle of a save, too.
        self._lock = threading.RLock()
        self._managers: dict[str, CheckpointManager] = {}
        """By address: what is known of a run is not asked for again."""

    def become_another(self) -> None:
        """In a forked child: its parent goes on with the locks that it has."""
        self._begin()

    def manager(self, address: str) -> CheckpointManager:
        """Of any run in this datastore; the same each time, until `close`."""
        with self._lock:
            if address not in self._managers:
                self._managers[address] = self._manager_of(address)
            return self._managers[address]

    def _manager_of(self, address: str) -> CheckpointManager:
        return CheckpointManager(address, keep=None)

    # -- finding -------------------------------------------------------------------------

    def find(self, key: str) -> Reference:
        """The checkpoint or model of any task in this datastore whose `key` that is.

        Raises UsageError, CheckpointNotFound, StoreError.
        """
        parts, version = _split(key)
        if is_loop(parts[-1]):
            raise UsageError(
                f"{key[:200]!r} was saved by current.checkpoint.run, which goes on by itself",
                hint=f"As files: holdfast restore {shell_word(self.root.address(*parts))} OUT",
            )
        for each in self._of_writer(parts):
            if each.key == key or version == str(each.version_id):
                return each
        raise CheckpointNotFound(f"there is no checkpoint {key!r} in {self.root.url}")

    def resolve(self, reference: object) -> Reference:
        """What `save` returned, or its key, as a reference. Raises as `find`."""
        return self.find(reference) if isinstance(reference, str) else Reference.of(reference)

    def saved_by(self, pathspec: str) -> list[Reference]:
        """The checkpoints, not the models, of the tasks that a pathspec names, newest first:
        `flow/run/step/task`, or the beginning of one, such as `flow/run`.

        Raises UsageError, StoreError.
        """
        flow, *rest = pathspec.split("/")
        if not flow or len(rest) > 3 or "" in rest:
            raise UsageError(
                f"{pathspec!r} names no task", hint='Give "flow/run/step/task" or its beginning.'
            )
        run, step, task = (*rest, None, None, None)[:3]
        found: list[Reference] = []
        top = (FOLDER, key_part(flow))
        for in_step in [key_part(step)] if step else folders_in(self.root.address(*top)):
            for at in folders_in(self.root.address(*top, in_step)):
                for name in self._runs_in((*top, in_step, at)):
                    if run in (None, name.run):
                        place = (*top, in_step, at, name.part)
                        saved = [
                            each
                            for writer in self._writers_in(place)
                            for each in self._of_writer((*place, writer))
                        ]
                        found += (
                            each
                            for each in in_order_of_attempts(saved)
                            if task is None or each.pathspec == pathspec
                        )
                if task is not None and found:
                    break  # a task has one folder
        return newest_first(found)

    def _runs_in(self, parts: Sequence[str]) -> list[RunName]:
        runs: list[RunName] = []
        for folder in folders_in(self.root.address(*parts)):
            with suppress(ValueError):  # somebody else's
                runs.append(RunName.parse(folder))
        return runs

    def _writers_in(self, parts: Sequence[str]) -> list[str]:
        """Those that have saved checkpoints of the task in that folder, not models or a loop."""
        folders = folders_in(self.root.address(*parts))
        return [each for each in folders if not holds_models(each) and not is_loop(each)]

    def _of_writer(self, parts: Sequence[str]) -> Iterator[Reference]:
        address = self.root.address(*parts)
        manager = self.manager(address)
        try:
            infos = manager.checkpoints()
        except CorruptionError as error:
            logger.error("%s is passed over: %s", address, error.message)
            return
        noted = [info if info.note else _with_note(manager, info) for info in infos]
        yield from _in_order(filter(None, (read_note(info, "/".join(parts)) for info in noted)))

    # -- by reference --------------------------------------------------------------------

    def load(
        self,
        reference: Reference,
        into: str | os.PathLike[str],
        *,
        attributes: Attributes | None = None,
    ) -> None:
        """Write its files into the folder `into`, every byte verified; what has the same name
        there is replaced, other files stay. Those of `attributes` that it has are set. Nothing
        is changed if it raises.

        Raises UsageError, CheckpointNotFound, CorruptionError, StoreError.
        """
        address, version = self._place_of(reference)
        if reference.file and not is_safe_name(reference.file):
            raise UsageError(f"{reference.file!r} is not the name of a file")
        with filled(Path(into)) as new:
            content: File | Directory = Directory(new)
            if reference.file:
                new.mkdir()
                content = File(new / reference.file)
            state: dict[str, Any] = {CONTENT: content}
            if attributes is not None and reference.attributes:
                state[ATTRIBUTES] = {}
            try:
                manager = self.manager(address)
                loaded = manager.restore(state, version, only=[*state], rng=False)
            except (CheckpointNotFound, CheckpointRemoved, NoStore):
                self._check_run(address)
                raise _gone(reference) from None
            if loaded is None or not _is_of(reference, loaded.info):
                raise _gone(reference)
        if attributes is not None:
            attributes.load_state_dict(state.get(ATTRIBUTES, {}))

    def delete(self, reference: Reference | str) -> bool:
        """Remove this one, or the one with that key, whatever rule would keep it; False if it is
        gone already.

        First it is no longer listed, then its bytes go that no other needs. Beside a task that
        saves, too. Raises UsageError; CheckpointProtected if it is tagged or pinned, or if a
        forked run needs it; NoStore if there is no such run at all; CorruptionError, StoreError.
        """
        address, version = self._place_of(reference)
        with Listing(address) as listing:
            try:
                info = listing.info(version)
                if isinstance(reference, Reference) and not _is_of(reference, info):
                    return False
                if info.tags or info.pinned:
                    raise CheckpointProtected(
                        f"{address}@{version} is not deleted: it is tagged or pinned",
                        hint="Take that away first: `holdfast untag`, `holdfast unpin`.",
                    )
                listing.remove([info.id], force=True)
            except (CheckpointNotFound, NoStore):
                self._check_run(address)
                return False
        return True

    def _check_run(self, address: str) -> None:
        """Raises NoStore if there is no run: what is not there was not removed from it."""
        try:
            Repo(open_store(address)).info()
        except NoStore as error:
            raise NoStore(
                error.message,
                hint="If the datastore has moved, give the `key` of what `save` returned: it is "
                "looked up where Metaflow's settings say.",
            ) from None

    def _place_of(self, reference: Reference | str) -> tuple[str, str]:
        """The run that it is in, and its name there."""
        if isinstance(reference, str):
            parts, version = _split(reference)
            return self.root.address(*parts), version
        parts, version = _split(reference.key)
        address, _, _ = reference.url.rpartition("@")
        # This process may reach the same bucket by another endpoint than the one that saved.
        if address.partition(f"/{FOLDER}/")[0] == self.root.url:
            address = self.root.address(*parts)
        return address, version

    def close(self) -> None:
        """May be called again."""
        with self._lock:
            for manager in self._managers.values():
                manager.close()
            self._managers.clear()


def _split(key: str) -> tuple[list[str], str]:
    place, _, version = key.rpartition("@")
    parts = place.split("/")
    if parts[0] != FOLDER or not _VERSION.fullmatch(version) or {"", ".", ".."} & set(parts):
        raise _no_key(key)
    return parts, version


def _no_key(key: str) -> UsageError:
    return NotAReference(
        f"this is no checkpoint: {key[:200]!r}",
        hint="Give what `save` returned or `list` shows, or its key.",
    )


def _is_of(reference: Reference, info: CheckpointInfo) -> bool:
    """Whether that one is meant: when the newest was deleted, a later attempt uses its number."""
    noted = read_note(info, "")
    return noted is None or noted.attempt == reference.attempt


def _gone(reference: Reference) -> CheckpointNotFound:
    return CheckpointNotFound(
        f"{reference.name!r} of {reference.pathspec} is gone: {reference.url}",
        hint="It was deleted, or a retention rule has removed it.",
    )


def _with_note(manager: CheckpointManager, info: CheckpointInfo) -> CheckpointInfo:
    """With the note that is in the checkpoint itself, if there is one."""
    try:
        return replace(info, note=str(manager.load(info.id).get(ABOUT, "")))
    except (CorruptionError, ObjectNotFound) as error:
        logger.error("%s is passed over: %s", info.ref, error.message)
        return info


def _in_order(saved: Iterable[Reference]) -> Iterator[Reference]:
    """Those of one writer, none older than the one before it: attempts run on machines whose
    clocks differ."""
    ordered = sorted(saved, key=lambda each: each.version_id)
    times = accumulate((each.created_on for each in ordered), max)
    return (replace(each, created_on=time) for each, time in zip(ordered, times, strict=True))


def in_order_of_attempts(saved: Sequence[Reference]) -> Iterator[Reference]:
    """Those of a task in one run, none newer than the first of a later attempt: a process that
    an attempt had started may go on saving when the attempt was given up."""
    first: dict[int, str] = {}
    for each in saved:
        first[each.attempt] = min(each.created_on, first.get(each.attempt, each.created_on))
    for each in saved:
        later = (time for attempt, time in first.items() if attempt > each.attempt)
        yield replace(each, created_on=min([each.created_on, *later]))


def newest_first(references: Iterable[Reference]) -> list[Reference]:
    def age(each: Reference) -> tuple[str, int, int]:
        return each.created_on, each.attempt, each.version_id

    return sorted(references, key=age, reverse=True)


_every: weakref.WeakSet[Reading] = weakref.WeakSet()


def _forked() -> None:
    for each in list(_every):
        each.become_another()


os.register_at_fork(after_in_child=_forked)
