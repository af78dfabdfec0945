"""What Holdfast does inside DataLoader workers, and how their death is noticed.

Batches of a map-style dataset get random numbers of their own: every worker draws for
batch n of an epoch from streams seeded with (the epoch's base seed, n), whichever worker
loads it and whatever was loaded before. So a resumed epoch can skip batches without
loading them.

Workers outlive the signals that ask a job to stop: these go to whole process groups,
and the training process, which finishes its step and saves, ends its workers itself.
"""

from __future__ import annotations

import atexit
import os
import re
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader, get_worker_info

from holdfast.errors import LoaderInterrupted
from holdfast.run.randomness import NUMPY, PYTHON, Library, digest
from holdfast.run.search import find_generators
from holdfast.torch.randomness import TORCH

_LIBRARIES: tuple[Library, ...] = (PYTHON, NUMPY, TORCH)

# Signals that stop jobs (the last two: notices of batch systems). By name: not all
# platforms have all.
_STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")


class SeededIndex:
    """An entry of the index queue that seeds the process in which it is unpickled.

    A worker unpickles an entry directly before it fetches that batch; `dataset`,
    `__getitems__` and `collate_fn` get the index that the sampler made, unchanged.
    """

    __slots__ = ("base_seed", "index", "number")

    def __init__(self, base_seed: int, number: int, index: Any) -> None:
        self.base_seed = base_seed
        self.number = number
        self.index = index

    def __reduce__(self) -> tuple[Any, ...]:
        return seed_batch, (self.base_seed, self.number, self.index)


def seed_batch(base_seed: int, number: int, index: Any) -> Any:
    """Seed all random numbers of this worker for one batch; returns `index`."""
    batch = f"batch {base_seed} {number}".encode()
    for library in _LIBRARIES:
        library.seed(digest(batch, library.name.encode()))
    for number_in_dataset, (library, generator) in enumerate(_own_generators()):
        library.reseed(generator, digest(batch, b"own", str(number_in_dataset).encode()))
    return index


_own: list[tuple[Library, Any]] | None = None
_collate_fn: object = None


def _own_generators() -> list[tuple[Library, Any]]:
    """Generator objects in this worker's dataset and collate_fn."""
    global _own
    if _own is None:
        info = get_worker_info()
        roots = [] if info is None else [info.dataset, _collate_fn]
        _own = [found for root in roots for found in find_generators(root, _LIBRARIES)]
    return _own


class WorkerInit:
    """`worker_init_fn` of our copy: ours, then the user's."""

    def __init__(self, loader: DataLoader[Any], context: Any) -> None:
        self._init = loader.worker_init_fn
        self._collate_fn = loader.collate_fn
        self.leaving = context.RawValue("b", 0)
        """Shared memory: set when the workers are being stopped."""

    def __call__(self, worker_id: int) -> None:
        global _own, _collate_fn
        _own, _collate_fn = None, self._collate_fn  # a forked worker inherits its parent's
        parent = os.getppid()
        leaving = self.leaving

        def stay(number: int, frame: FrameType | None) -> None:
            if leaving.value or os.getppid() != parent:
                os._exit(0)

        # A function, not SIG_IGN: programs that the dataset starts would inherit that.
        for name in _STOP_SIGNALS:
            number = getattr(signal, name, None)
            if number is not None:
                signal.signal(number, stay)
        if self._init is not None:
            self._init(worker_id)


# Iterators whose workers survive SIGTERM: multiprocessing ends its children with it when
# the interpreter exits, and would wait for ever.
_watched: weakref.WeakSet[Any] = weakref.WeakSet()


def watch(iterator: Any) -> None:
    """Take care of the workers of a new iterator: at exit, and if they die."""
    _watched.add(iterator)
    death_watch.install()


@atexit.register  # after torch's and multiprocessing's own, so it runs before them
def _kill_all() -> None:
    for iterator in list(_watched):
        for worker in _children_of(iterator):
            worker.kill()


def stop_workers(iterator: Any, *, kill: bool = False) -> None:
    """Stop an iterator's workers, now; without workers, nothing. `kill`: do not let
    them finish the batches they load."""
    shut_down = getattr(iterator, "_shutdown_workers", None)
    if shut_down is None:
        return
    init = iterator._worker_init_fn
    if isinstance(init, WorkerInit):
        init.leaving.value = 1
    with death_watch.stopping():
        if kill:
            for worker in _children_of(iterator):
                worker.kill()
        shut_down()


def _children_of(iterator: Any) -> list[Any]:
    """Its workers, if this process started them (not one forked from it)."""
    return [one for one in iterator._workers if one._parent_pid == os.getpid()]


# -- death --------------------------------------------------------------------

_DIED = re.compile(
    r"DataLoader worker \(pid.*?\) (is killed by|exited unexpectedly)"
    r"|Pin memory thread exited unexpectedly"
)


class _DeathWatch:
    """torch raises RuntimeError in its SIGCHLD handler when a worker dies: anywhere in
    the training step, or in the middle of a save. While a feed waits for a batch that is
    right; at other times the death is remembered, and the next batch reports it."""

    def __init__(self) -> None:
        self._waiting = False
        self._error: RuntimeError | None = None
        self._previous: Callable[[int, FrameType | None], Any] | None = None

    def install(self) -> None:
        """After torch has set its handler, which it does once per process."""
        if threading.current_thread() is not threading.main_thread():
            return
        current = signal.getsignal(signal.SIGCHLD)
        if callable(current) and current != self._handle:
            self._previous = current
            signal.signal(signal.SIGCHLD, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._previous is None:
            return
        try:
            self._previous(number, frame)
        except RuntimeError as error:
            if self._waiting or not _DIED.search(str(error)):
                raise
            # torch tells once; but it also looks whether workers live each time that
            # it has waited 5 s for a batch, so no loader waits in vain.
            self._error = error

    @contextmanager
    def waiting(self, iterator: Any = None) -> Iterator[None]:
        """A batch is waited for, of `iterator` if that is known; a worker's death
        raises LoaderInterrupted."""
        before, self._waiting = self._waiting, True
        try:
            if self._error is not None and _has_lost_workers(iterator):
                raise self._error
            yield
        except RuntimeError as error:
            if not _DIED.search(str(error)):
                raise
            raise LoaderInterrupted(
                f"a worker of the data loader died: {str(error).strip()}",
                hint="The steps completed so far are not affected. Killed means a signal or, "
                "often, that memory ran out.",
            ) from error
        finally:
            self._waiting = before

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """Workers are being stopped: their deaths are no news."""
        before, self._waiting = self._waiting, False
        try:
            yield
        finally:
            self._waiting, self._error = before, None


def _has_lost_workers(iterator: Any) -> bool:
    return any(worker.exitcode for worker in getattr(iterator, "_workers", ()))


death_watch = _DeathWatch()
