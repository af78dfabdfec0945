"""`current.checkpoint.run`: a Holdfast `Run` of a task's own, which later attempts and runs
that resume go on with.

It is a run beside those of `save` (`<run>/loop`). The next attempt goes on with it; a run of the
flow that resumes another begins one of its own from the other's checkpoint, which stays as it is.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from itertools import accumulate, count
from typing import TYPE_CHECKING, Any

from holdfast.core.aside import aside
from holdfast.errors import (
    CheckpointNotFound,
    CheckpointRemoved,
    CorruptionError,
    Fenced,
    HoldfastError,
    RunHeld,
    UsageError,
)
from holdfast.manager.info import CheckpointInfo
from holdfast.manager.manager import CheckpointManager
from holdfast.metaflow.attributes import Attributes
from holdfast.metaflow.checkpoints import Checkpoints
from holdfast.metaflow.places import LOOP
from holdfast.metaflow.reference import Reference

if TYPE_CHECKING:  # imported by the steps that use it
    from holdfast.run.run import Run

_REMOVED = (CheckpointNotFound, CheckpointRemoved)

# Names that a step's code cannot track by itself: they are no identifiers.
_TASK = "metaflow.task"
_SELF = "metaflow.self"


class _Task:
    """Which attempt of which task saved: part of each checkpoint. A restore leaves it as it is."""

    def __init__(self, about: dict[str, Any]) -> None:
        self._about = about

    def state_dict(self) -> dict[str, Any]:
        return dict(self._about)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class _Read:
    """Takes what a restore would give to another."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


class TaskLoop:
    """The `Run` of one task. From any thread of the task's own process."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        attributes: Attributes,
        *,
        policy: str,
        every: int | str | None = None,
        keep: str | None = None,
        several: bool = False,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`several`: the step runs on several nodes. Asks nothing of the datastore."""
        self._checkpoints = checkpoints
        self._attributes = attributes
        self._policy = policy
        self._options = {
            **({} if every is None else {"every": every}),
            **({} if keep is None else {"keep": keep}),
        }
        self._several = several
        self._tell = tell
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._run: Run | None = None

    # -- what a task goes on from --------------------------------------------------------

    def set_attributes(self, loaded: Reference | None) -> None:
        """Set the chosen attributes as the task's `Run` saved them last, if that is newer than
        `loaded`, what `save` has saved of them.

        Raises StoreError.
        """
        if not self._attributes.names:
            return
        for info in self._to_go_on_from():
            if loaded is not None and loaded.attributes and loaded.created_on > _time(info):
                # The restore of a loop that came to its end would undo what came after it.
                self._attributes.settled = self._is_at_its_end(info)
                return
            try:
                self._attributes.load_state_dict(self._read(info, _SELF))
            except _REMOVED:
                continue
            except CorruptionError as error:
                self._tell(f"{info.ref} is damaged and was passed over: {error.message}")
                continue
            self._tell(f"goes on with {', '.join(self._attributes.names)} of {info.ref}")
            return

    def _to_go_on_from(self) -> Iterator[CheckpointInfo]:
        """The best first."""
        if self._policy == "none" or self._several:
            return
        if self._checkpoints.attempt > 0:
            with suppress(CorruptionError):  # the `Run` mends the list
                yield from reversed(self._own().checkpoints())
        yield from self._of_earlier_runs()

    def _of_earlier_runs(self) -> Iterator[CheckpointInfo]:
        for family, ours in self._checkpoints.earlier_runs(self._policy):
            found = [
                each
                for run in family
                for manager in self._checkpoints.loops_of(run)
                for each in self._listed(manager)
            ]
            for _, info in sorted(found, key=lambda each: each[0], reverse=True):
                if ours or self._namespace_of(info) == self._checkpoints.namespace:
                    yield info

    def _listed(self, manager: CheckpointManager) -> Iterator[tuple[Any, CheckpointInfo]]:
        """With times of which none is before the one in front of it: attempts run on machines
        whose clocks differ."""
        try:
            infos = manager.checkpoints()
        except CorruptionError as error:
            self._tell(f"{manager.address} is passed over: {error.message}")
            return
        times = accumulate((info.time_s for info in infos), max)
        for time, info in zip(times, infos, strict=True):
            yield (time, info.ordinal), info

    def _namespace_of(self, info: CheckpointInfo) -> str:
        try:
            return self._read(info, _TASK)["namespace"]
        except HoldfastError:
            return ""  # it is damaged, or gone by now

    def _read(self, info: CheckpointInfo, name: str) -> dict[str, Any]:
        read = _Read()
        self._manager(info).restore({name: read}, info.id, only=[name], rng=False)
        return read.state

    def _manager(self, info: CheckpointInfo) -> CheckpointManager:
        return self._checkpoints.manager(info.address)

    def _is_at_its_end(self, info: CheckpointInfo) -> bool:
        found = self._manager(info).read_loop(info.id)
        return found is not None and not found.loop["frames"]

    # -- the run -------------------------------------------------------------------------

    @aside
    def open(self, **options: Any) -> Run:
        """The task's `Run`, made by the first call. Raises UsageError for options later on, and
        where there cannot be one; Fenced; StoreError."""
        if self._several:
            raise UsageError(
                "current.checkpoint.run is for steps that run on one node: this one runs on "
                "several, whose loops would be saved at different steps",
                hint="Save with current.checkpoint.save() on the control node: all load the same.",
            )
        if os.getpid() != self._pid:
            raise UsageError(
                f"current.checkpoint.run belongs to process {self._pid}, not to this child",
                hint="Use it in the task's own process.",
            )
        with self._lock:
            if self._run is None:
                self._run = self._opened(options)
            elif options:
                raise UsageError(
                    "the options of current.checkpoint.run come too late: it is there already",
                    hint="Call run_with(...) before anything else uses current.checkpoint.run.",
                )
            return self._run

    def _opened(self, options: dict[str, Any]) -> Run:
        address = self._unused() if self._policy == "none" else self._own().address
        if self._policy != "none" and not self._is_begun():
            self._begin_from_another()
        from holdfast.run.run import Run

        run = Run(address, take_over=True, **{**self._options, **options})
        task = self._checkpoints
        about = {
            "pathspec": task.pathspec,
            "attempt": task.attempt,
            "namespace": task.namespace,
        }
        return run.track(**{_TASK: _Task(about), _SELF: self._attributes})

    def _own(self) -> CheckpointManager:
        task = self._checkpoints
        return task.manager(task.root.address(*task.place.parts, LOOP))

    def _unused(self) -> str:
        """Of a run that nobody has saved in: with policy "none" each attempt begins anew."""
        task = self._checkpoints
        for number in count(1):
            name = LOOP if number == 1 else f"{LOOP}-{number}"
            address = task.root.address(*task.place.parts, name)
            with suppress(CorruptionError):
                if task.manager(address).latest() is None:
                    return address
        raise AssertionError

    def _is_begun(self) -> bool:
        """Whether an attempt of this task has saved. Raises Fenced if it is a later one: this
        attempt was given up, and lives. It must not take the run back."""
        task = self._checkpoints
        try:
            newest = self._own().latest()
            if newest is None:
                return False
            saved = self._read(newest, _TASK)
        except (CorruptionError, *_REMOVED):
            return True  # the `Run` mends the list, and passes over what is damaged
        # One that began as a copy may have nothing but what a task of another run has saved.
        if saved["pathspec"] == task.pathspec and saved["attempt"] > task.attempt:
            raise Fenced(
                f"attempt {saved['attempt']} of {task.pathspec} has begun: attempt {task.attempt} "
                "saves no more"
            )
        return True

    def _begin_from_another(self) -> None:
        """Give the task's own run the checkpoint that it goes on from, if there is one."""
        for info in self._of_earlier_runs():
            try:
                manager = self._manager(info)
                # Read now: in the new run there will be no older one to fall back to.
                [found] = manager.verify(info.id)
                if not found.ok:
                    self._tell(f"{info.ref} is damaged and was passed over: {found.problems[0]}")
                    continue
                self._fork(manager, info)
            except _REMOVED:
                continue
            self._tell(f"the loop goes on from {info.ref}")
            return

    def _fork(self, manager: CheckpointManager, info: CheckpointInfo) -> None:
        own = self._own().address
        try:
            manager.fork(info.id, own)
        except RunHeld:  # by an attempt that was given up before it had saved
            with CheckpointManager(own, take_over=True) as taken:
                taken.acquire()
            manager.fork(info.id, own)

    def finish(self, *, complete: bool) -> None:
        """Save the last step, if the step's code came to its end, wait until all is durable and
        let others write. May be called again.

        Raises SaveFailed; LoopError; SystemExit if a signal came that asked for it.
        """
        run = self._run
        if run is None or os.getpid() != self._pid:
            return
        from holdfast.notices.signals import give_back

        try:
            _end(run, complete)
        finally:
            give_back()


@aside
def _end(run: Run, complete: bool) -> None:
    if complete:
        with run:
            pass
    else:
        run.close()


def _time(info: CheckpointInfo) -> str:
    """As in a reference."""
    return datetime.fromtimestamp(info.time_s, UTC).isoformat()
