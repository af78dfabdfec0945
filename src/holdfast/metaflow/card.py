"""The card of a task: what became of its checkpoints, written where Metaflow looks for cards.

Something happens (a load, a save, the end) and a thread renders the page and writes it; nothing
happens, and nothing is done. The step's code never waits for it, and it never fails the task.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from holdfast.errors import Fenced, HoldfastError
from holdfast.manager.info import CheckpointInfo, Overview
from holdfast.manager.manager import CheckpointManager
from holdfast.manager.pending import Pending
from holdfast.metaflow.card_chart import Point, merged
from holdfast.metaflow.card_page import ROWS, Row, Start, Story, page
from holdfast.metaflow.reference import Reference, read_note

logger = logging.getLogger("holdfast")

TYPE = "checkpoint"
"""What `card list` shows and `--type` takes. It needs no registration: only `card create` does."""
# As often as Metaflow's viewers look; sooner, nobody would see it, and on a bucket each is a
# request.
_INTERVAL_S = 5.0
# The end of the step waits no longer for the last page. It is written while Metaflow stores the
# step's artifacts, so mostly it is there by then.
_END_S = 0.5
_POINTS = 1000


class Card:
    """What is told to it, from any thread, appears on the task's card soon after.

    `write` gets each page as text, in a thread of the card's own. One task has one card: its
    attempts write over what the one before has written.
    """

    def __init__(
        self,
        write: Callable[[str], object],
        *,
        pathspec: str,
        attempt: int,
        keep: str | None,
        interval_s: float = _INTERVAL_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._write = write
        self._pathspec = pathspec
        self._attempt = attempt
        self._keep = keep or ""
        self._interval_s = interval_s
        self._clock = clock
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._news = threading.Event()
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        self._state = "running"
        self._given_up = False
        self._manager: CheckpointManager | None = None
        self._start: Start | None = None
        self._loaded: set[str] = set()
        self._passed_over: list[str] = []
        self._failures: list[str] = []
        self._saves = 0
        self._seconds: dict[str, float] = {}
        """How long the saves of this process took, by id of the checkpoint."""
        self._points: list[Point] = []
        self._looked_back = False

    # -- what happens ----------------------------------------------------------------------

    def went_on(self, reference: Reference, seconds: float) -> None:
        """The task begins with this checkpoint, which it took `seconds` to load."""
        self._start = Start(
            reference.url, reference.pathspec, reference.attempt, reference.size, seconds
        )
        self._tell()

    def passed_over(self, line: str) -> None:
        """A checkpoint is damaged."""
        self._passed_over.append(line)
        self._tell()

    def loaded(self, reference: Reference) -> None:
        """Every byte of it was verified."""
        self._loaded.add(reference.url)
        self._tell()

    def opened(self, manager: CheckpointManager) -> None:
        """The task has become the writer of its run."""
        self._manager = manager

    def saving(self, pending: Pending) -> None:
        """A save is on its way."""
        pending.when_done(lambda: self._saved(pending))

    def failed(self, version: int, error: BaseException) -> None:
        """The save of that number has failed, for the reason that the step's code gets."""
        if isinstance(error, Fenced):  # the card is a later attempt's
            self._given_up = True
            return
        message = error.message if isinstance(error, HoldfastError) else repr(error)
        with self._lock:
            self._failures.append(f"save {version}: {message}")
        self._tell()

    def _saved(self, pending: Pending) -> None:
        """In the thread that saves, which waits."""
        if (error := pending.exception()) is not None:
            self.failed(pending.step, error)
            return
        info = pending.result()
        seconds = pending.stats.total_s if pending.stats else None
        with self._lock:
            self._saves += 1
            if seconds is not None:
                self._seconds[info.id] = seconds
            self._points.append(_point(info, seconds))
            if len(self._points) > 2 * _POINTS:
                self._points = merged(self._points, _POINTS)
        self._tell()

    # -- the end ---------------------------------------------------------------------------

    def end(self, *, failed: bool) -> None:
        """The step's code has ended, and its saves have: the last page is on its way when this
        returns."""
        self._state = "failed" if failed else "finished"
        self._ending.set()
        self._tell()

    def wait(self) -> None:
        """For the last page, half a second at most."""
        if (thread := self._thread) is not None and self._pid == os.getpid():
            thread.join(_END_S)

    # -- writing ---------------------------------------------------------------------------

    def _tell(self) -> None:
        if self._pid != os.getpid():
            return  # a forked child: the card is its parent's
        with self._lock:
            self._news.set()
            if self._thread is None:
                # A daemon: a store that does not answer must not keep the process.
                self._thread = threading.Thread(
                    target=self._work, name="holdfast-card", daemon=True
                )
                try:
                    self._thread.start()
                except RuntimeError as error:  # too many threads, or the interpreter ends
                    logger.warning("there will be no card: %s", error)

    def _work(self) -> None:
        told = False
        while True:
            self._news.wait()
            self._news.clear()
            ending = self._ending.is_set()
            try:
                if not self._given_up:
                    self._write(page(self._story()))
            except Exception as error:  # noqa: BLE001 - anything of a store's, or of ours
                if not told:
                    logger.warning("the card of %s could not be written: %s", self._pathspec, error)
                told = True
            if ending:
                return
            self._ending.wait(self._interval_s)

    def _story(self) -> Story:
        manager = self._manager
        view = manager.written(ROWS) if manager else None
        if manager and not self._looked_back:
            self._look_back(manager.written(_POINTS))
        with self._lock:
            points, failures, seconds = tuple(self._points), tuple(self._failures), self._seconds
            rows = (
                [self._row(info, view, seconds.get(info.id)) for info in view.shown] if view else []
            )
        return Story(
            pathspec=self._pathspec,
            attempt=self._attempt,
            state=self._state,
            now_s=self._clock(),
            start=self._start,
            passed_over=tuple(self._passed_over),
            failures=failures,
            saves=self._saves,
            points=points,
            rows=rows,
            url=view.shown[0].ref if view and view.shown else "",
            kept=view.count if view else 0,
            committed=view.committed if view else 0,
            keep=self._keep,
            nbytes=view.nbytes if view else 0,
            stored_bytes=view.status.stored_bytes if view else 0,
        )

    def _look_back(self, view: Overview | None) -> None:
        """What is there of earlier attempts is on the timeline, too."""
        self._looked_back = True
        with self._lock:
            earlier = [i for i in view.shown if i.id not in self._seconds] if view else []
            self._points = [*(_point(info, None) for info in reversed(earlier)), *self._points]

    def _row(self, info: CheckpointInfo, view: Overview, seconds: float | None) -> Row:
        noted = read_note(info, "")
        best = [f"best:{name}" for name, id in view.status.best.items() if id == info.id]
        not_latest = ["not loaded by itself"] if noted and not noted.latest else []
        verified = ["loaded, verified"] if info.ref in self._loaded else []
        return Row(
            version=info.step,
            name=noted.name if noted else "",
            attempt=noted.attempt if noted else 0,
            time_s=info.time_s,
            nbytes=info.nbytes,
            new_bytes=info.new_bytes,
            seconds=seconds,
            metadata=noted.metadata if noted else {},
            marks=(*best, *info.tags, *not_latest, *verified),
        )


def _point(info: CheckpointInfo, seconds: float | None) -> Point:
    noted = read_note(info, "")
    attempt = noted.attempt if noted else 0
    return Point(info.time_s, attempt, info.nbytes, info.new_bytes, seconds, info.metrics)


def card_of(flow_datastore: Any, *, pathspec: str, attempt: int, keep: str | None) -> Card:
    """The card of a task of Metaflow's. Imports Metaflow; asks nothing of the datastore."""
    return Card(
        _into_cards(flow_datastore, pathspec), pathspec=pathspec, attempt=attempt, keep=keep
    )


def _into_cards(flow_datastore: Any, pathspec: str) -> Callable[[str], object]:
    """Writes a page where `card create` would for this task."""
    from metaflow.datastore.flow_datastore import FlowDataStore
    from metaflow.plugins.cards.card_datastore import CardDatastore

    # Now: the step may change its working directory, below which cards are looked for.
    root = CardDatastore.get_storage_root(flow_datastore.TYPE) or flow_datastore.datastore_root
    store = FlowDataStore(
        flow_datastore.flow_name, storage_impl=type(flow_datastore._storage_impl), ds_root=root
    )
    cards = CardDatastore(store, pathspec=pathspec)
    # The same in every attempt: Metaflow's commands would not know which of several to show.
    uuid = hashlib.sha256(json.dumps([TYPE, pathspec]).encode()).hexdigest()[:32]
    return lambda html: cards.save_card(uuid, TYPE, html)
