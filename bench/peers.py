"""The verbs that all contenders have, and Holdfast's.

Whatever returns from `save`, or is reported by `done`, is on the disk: files, folders and
their names are fsynced, by the library or else here.
"""

from __future__ import annotations

import shutil
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import holdfast
from bench.durable import nbytes_of
from bench.states import State


class Peer(ABC):
    """One way to save and restore `state`, in a folder of its own; it may hold saves."""

    name: ClassVar[str]
    overlaps: ClassVar[bool] = False
    """Whether it waits in the optimizer's next step, not only in `start`."""

    def __init__(self, folder: Path, state: State) -> None:
        self.folder = folder
        self.state = state
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        folder.mkdir(exist_ok=True)
        names = [path.name for path in folder.iterdir()]
        self._count = max((int(name) for name in names if name.isdigit()), default=0)
        self.last = folder / str(self._count)

    @abstractmethod
    def save(self) -> None:
        """Save; durable when it returns."""

    @abstractmethod
    def restore(self, into: State) -> None:
        """Put the newest save into the tensors that `into` has already."""

    def start(self) -> None:
        """Begin a save; when it returns the training may go on."""
        self.save()

    def done(self) -> bool:
        """Whether what was started is durable."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Block until what was started is durable. Raises what made it fail."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def forget(self) -> None:
        """Delete all saves but the newest; not part of any figure."""
        for old in self.folder.iterdir():
            if old != self.last:
                shutil.rmtree(old)

    def nbytes(self) -> int:
        """Bytes of all saves that are there."""
        return nbytes_of(self.folder)

    def close(self) -> None:
        """Finish what was started, and let go of everything but the files."""
        self.wait()

    def _next(self) -> Path:
        """The folder of a new save; not made yet."""
        self._count += 1
        self.last = self.folder / str(self._count)  # where the newest save is
        return self.last

    def _finish(self, work: Callable[[], object]) -> None:
        """Do `work` in the background; then `done` is true."""

        def run() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001 - raised by `wait`
                self._error = error

        self._thread = threading.Thread(target=run, name=f"{self.name} finishes")
        self._thread.start()


class Holdfast(Peer):
    """The public manager; one for all saves, as in a job, and a new one for each restore."""

    name = "Holdfast"

    def __init__(self, folder: Path, state: State) -> None:
        super().__init__(folder, state)
        self.last = folder
        self.manager = holdfast.CheckpointManager(folder, keep=None)
        self._pending: Any = None

    def save(self) -> None:
        self._count += 1
        self.manager.save(self._count, self.state.objects, block=True)

    def start(self) -> None:
        self._count += 1
        self._pending = self.manager.save(self._count, self.state.objects)

    def done(self) -> bool:
        return self._pending is None or self._pending.done()

    def wait(self) -> None:
        if self._pending is not None:
            self._pending.result()

    def restore(self, into: State) -> None:
        with holdfast.CheckpointManager(self.folder) as manager:
            if manager.restore(dict(into.objects)) is None:
                raise FileNotFoundError(f"no checkpoint in {self.folder}")

    def forget(self) -> None:
        self.manager.prune("last=1")

    def close(self) -> None:
        self.manager.close()


class HoldfastRun(Holdfast):
    """`Run` in a training loop: `start` asks, and the loop's next boundary saves.

    Reading in place while training goes on is what `Run.track` installs.
    """

    overlaps = True

    def __init__(self, folder: Path, state: State) -> None:
        Peer.__init__(self, folder, state)
        self.last = folder
        self.run = holdfast.Run(folder, every=None, keep=None, quiet=True)
        self.run.track(**state.objects)
        self.manager = self.run.manager
        self._asked_at: int | None = None

    def start(self) -> None:
        self._asked_at = self.run.step + 1  # the step in progress is complete by then
        self.run.save()

    def done(self) -> bool:
        if self._asked_at is not None:
            newest = self.manager.latest()
            if newest is None or newest.step < self._asked_at:
                return False
            self._asked_at = None
        return True

    def wait(self) -> None:
        self.manager.wait()
        if not self.done():
            raise RuntimeError(f"{self.folder} has no checkpoint of step {self._asked_at}")

    def close(self) -> None:
        self.run.close()
