"""`publish="best:exports/best"`: a plain export that is always whole.

The path is a symbolic link to a folder beside it. Each refresh writes a new folder,
syncs it, and replaces the link in one atomic step; then the old folder is removed. Work
goes on in a thread of its own: training never waits for it, and if checkpoints come
faster than exports only the newest is exported.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from holdfast.core.aside import Helper, Latch, NoThread
from holdfast.errors import HoldfastError, UsageError

logger = logging.getLogger("holdfast")

_VERSION = re.compile(r"[0-9a-f]{16}")  # the start of a checkpoint's id


@dataclass(frozen=True)
class Publication:
    """A parsed `publish=`."""

    which: str
    """"best" or "latest"."""
    path: Path


def parse_publish(text: str) -> Publication:
    """
    >>> parse_publish("best:exports/best")
    Publication(which='best', path=PosixPath('exports/best'))
    """
    which, colon, path = text.partition(":")
    if which not in ("best", "latest") or not colon or not path:
        raise UsageError(
            f"cannot read publish={text!r}",
            hint='Write publish="best:folder" or publish="latest:folder".',
        )
    return Publication(which, Path(path))


class Publisher:
    """Keeps the export at `path` up to date. `choose()` names the checkpoint to show."""

    def __init__(self, path: Path, manager: Any, choose: Callable[[], Any | None]) -> None:
        # Absolute: the program may change its folder later.
        self._path = Path(os.path.abspath(path))
        self._manager = manager
        self._choose = choose
        self._shown = ""
        self._wishes: SimpleQueue[Latch] = SimpleQueue()
        """Each is set when what was asked for with it is done."""
        self._asked = False
        self._turn = threading.Lock()
        """Held by the thread that exports."""
        if self._path.exists() and not self._path.is_symlink():
            raise UsageError(
                f"cannot publish at {path}: it exists and is not a link made by Holdfast",
                hint="Move it away or choose another path.",
            )

    def refresh(self) -> None:
        """A checkpoint was committed: export if another one is to be shown now."""
        self._asked = True
        self._ask(Latch())

    def wait(self) -> None:
        """Block until what was asked for is shown, or has failed with a logged error."""
        if self._asked:
            self._ask(latch := Latch())
            latch.wait()

    def _ask(self, wish: Latch) -> None:
        self._wishes.put(wish)
        try:
            Helper(self._work, name="holdfast-publish")
        except NoThread:
            self._work()

    def _work(self) -> None:
        while not self._wishes.empty():
            if not self._turn.acquire(blocking=False):
                return  # who has it looks again at its end
            wishes: list[Latch] = []
            try:
                with suppress(Empty):  # one export for all of them
                    while True:
                        wishes.append(self._wishes.get_nowait())
                self._publish()
            except (HoldfastError, OSError) as error:
                logger.error("could not publish %s: %s", self._path, error)
            finally:
                for wish in wishes:
                    wish.set()
                self._turn.release()

    def _publish(self) -> None:
        chosen = self._choose()
        if chosen is None or chosen.id == self._shown:
            return
        swap(self._path, chosen.id[:16], lambda folder: self._manager.export(chosen.id, folder))
        self._shown = chosen.id


def swap(path: Path, version: str, fill: Callable[[Path], object]) -> None:
    """Let `path` show the folder that `fill` writes; at every moment it shows a whole one.

    The folder is durable when `fill` returns, as `export` has it: then it may be shown.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}."
    old = os.readlink(path) if path.is_symlink() else None
    folder = path.parent / f"{prefix}{version}"
    if folder.name == old:
        return
    # Left by a process that was killed while it wrote.
    shutil.rmtree(folder, ignore_errors=True)
    link = path.parent / f"{prefix}link"
    link.unlink(missing_ok=True)
    try:
        fill(folder)
        link.symlink_to(folder.name)
        os.replace(link, path)
    except BaseException:
        link.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        raise
    _sync(path.parent)
    for name in os.listdir(path.parent):
        if (
            name != folder.name
            and name.startswith(prefix)
            and _VERSION.fullmatch(name.removeprefix(prefix))
        ):
            shutil.rmtree(path.parent / name, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
