"""Who is told of notices, for this process: one set of pollers for all who listen.

    leave = listen(print)
    ...
    leave()

The first listener starts what asks the places that this machine has, each in a daemon thread.
They end when the last one has left: a few seconds later, so that the loops of a program, which
listen one after the other, do not each begin anew.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from holdfast.core.aside import Helper, NoThread, aside
from holdfast.notices import slurm
from holdfast.notices.detect import Place, detect, is_wanted
from holdfast.notices.notice import Notice
from holdfast.notices.notifier import Notifier, Over

Tell = Callable[[Notice], None]

logger = logging.getLogger("holdfast")

_LINGER_S = 5.0
# Between two questions to somebody who has never answered, and to somebody who has: that one comes
# back, and the shortest notice is 30 s.
_LONGEST_S = 60.0
_LONGEST_ANSWERED_S = 5.0
_SHORTEST_S = 0.01
# Failures in a row after which it is said: a service that starts again fails once or twice.
_WORTH_A_LINE = 3


class Listening:
    """The listeners and the pollers of one process. `find` names who is asked; `others` may
    take its time, and is called in a thread."""

    def __init__(
        self,
        find: Callable[[], Iterable[Notifier]],
        others: Callable[[], Iterable[Notifier]] = tuple,
        *,
        linger_s: float = _LINGER_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._find = find
        self._others = others
        self._linger_s = linger_s
        self._clock = clock
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._listeners: list[_Listener] = []
        self._alone_s = clock()
        """Since when there are no listeners, if there are none."""
        self._polled: dict[str, _Polled] = {}
        """Those that a thread asks, by the notifier's name."""
        self._over: set[str] = set()

    @aside
    def listen(self, tell: Tell) -> Callable[[], None]:
        """Have notices told until the function that this returns is called.

        `tell` is called in a poller's thread; before this returns, in some thread, if a notice
        that stops this process stands already.
        """
        listener = _Listener(tell)
        with self._lock:
            is_first = not self._listeners
            self._listeners.append(listener)
            said = [notice for one in self._polled.values() for notice in one.stands]
        if is_first:
            self._start(self._find())
            _in_thread(lambda: self._start(self._others()))
        for notice in said:
            if notice.stops:
                listener.hear(notice)
        return lambda: self._leave(listener)

    def _leave(self, listener: _Listener) -> None:
        if os.getpid() == self._pid:  # else a forked child: the lock may be taken for ever
            self._leave_here(listener)

    @aside
    def _leave_here(self, listener: _Listener) -> None:
        listener.left = True
        with self._lock:
            self._listeners = [one for one in self._listeners if one is not listener]
            if not self._listeners:
                self._alone_s = self._clock()

    # -- the pollers -------------------------------------------------------------------

    def _start(self, notifiers: Iterable[Notifier]) -> None:
        for notifier in notifiers:
            with self._lock:
                if notifier.name in self._polled or notifier.name in self._over:
                    continue
                polled = self._polled[notifier.name] = _Polled(notifier)
            if not _in_thread(lambda polled=polled: self._poll(polled)):
                self._end(polled)

    def _poll(self, polled: _Polled) -> None:
        """In a thread of its own, until nobody listens."""
        notifier = polled.notifier
        interval_s = max(_SHORTEST_S, notifier.interval_s)
        failures = 0
        answered = False
        try:
            while not self._ends_alone(polled):
                wait_s = interval_s
                try:
                    notices = _checked(notifier.ask())
                except Over as error:
                    logger.debug("%s is not asked any more: %s", notifier.name, error)
                    self._over.add(notifier.name)
                    return
                except Exception as error:  # noqa: BLE001 - code of others; asked again
                    wait_s = _wait_s(interval_s, failures, answered=answered)
                    failures += 1
                    level = logging.WARNING if failures == _WORTH_A_LINE else logging.DEBUG
                    logger.log(level, "no notices from %s for now: %s", notifier.name, error)
                else:
                    failures, answered = 0, True
                    self._found(polled, notices)
                time.sleep(wait_s)
        finally:
            self._end(polled)

    def _found(self, polled: _Polled, notices: Sequence[Notice]) -> None:
        with self._lock:
            before, polled.stands = polled.stands, notices
            listeners = tuple(self._listeners)
        for notice in notices:
            if notice not in before:
                logger.debug("%s says: %s", polled.notifier.name, notice)
                for listener in listeners:
                    listener.hear(notice)

    def _ends_alone(self, polled: _Polled) -> bool:
        """Whether nobody listens any more. Then the next one to listen starts another thread."""
        with self._lock:
            if self._listeners or self._clock() - self._alone_s < self._linger_s:
                return False
            del self._polled[polled.notifier.name]
            return True

    def _end(self, polled: _Polled) -> None:
        with self._lock:
            if self._polled.get(polled.notifier.name) is polled:
                del self._polled[polled.notifier.name]


@dataclass(eq=False)
class _Polled:
    notifier: Notifier
    stands: Sequence[Notice] = ()
    """What it was told last."""


class _Listener:
    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self.left = False

    def hear(self, notice: Notice) -> None:
        if self.left:
            return
        try:
            self._tell(notice)
        except Exception:
            logger.exception("a notice could not be told: %s", notice)


def _checked(notices: Iterable[object]) -> list[Notice]:
    """What code of others has returned. Raises TypeError, so that no listener meets it."""
    checked: list[Notice] = []
    for notice in notices:
        if not isinstance(notice, Notice):
            raise TypeError(f"{notice!r} is no Notice")
        checked.append(notice)
    return checked


def _wait_s(interval_s: float, failures: int, *, answered: bool) -> float:
    """Until somebody is asked again who has not answered, after `failures` in a row before.

    >>> [_wait_s(1.0, failures, answered=False) for failures in (0, 1, 5, 6, 100_000)]
    [1.0, 2.0, 32.0, 60.0, 60.0]
    >>> [_wait_s(1.0, failures, answered=True) for failures in (0, 2, 3)]
    [1.0, 4.0, 5.0]
    >>> _wait_s(30.0, 3, answered=True)
    30.0
    """
    longest_s = _LONGEST_ANSWERED_S if answered else _LONGEST_S
    doublings = min(failures, 16)  # days of failures would be no float
    return max(interval_s, min(longest_s, interval_s * 2**doublings))


def _in_thread(work: Callable[[], object]) -> bool:
    try:
        Helper(work, name="holdfast-notices")
    except NoThread:
        return False
    return True


# -- of this process ------------------------------------------------------------------


def notifiers_of(places: Iterable[Place]) -> list[Notifier]:
    """Who asks at those places that are here."""
    return [notifier for place in places if place.found for notifier in _made(place)]


def _made(place: Place) -> list[Notifier]:
    # Imported where needed: `http.client` is not for every program.
    if place.name == "aws":
        from holdfast.notices.aws import spot_notifier

        return [spot_notifier(place.where)]
    if place.name == "gcp":
        from holdfast.notices.gcp import gcp_notifiers

        return gcp_notifiers(place.where)
    if place.name == "azure":
        from holdfast.notices.azure import azure_notifier

        return [azure_notifier(place.where)]
    if place.name == "slurm":
        return [slurm.slurm_notifier(float(place.where))]
    from holdfast.notices.file import file_notifier

    return [file_notifier(place.where)]


def _third_party() -> Iterable[Notifier]:
    from holdfast.notices.third_party import third_party_notifiers

    return third_party_notifiers()


def _of_this_process() -> Listening:
    return Listening(lambda: notifiers_of(detect()), _third_party)


_listening = _of_this_process()


def _forked() -> None:
    """In a forked child, such as a loader's worker: the threads are its parent's."""
    global _listening
    _listening = _of_this_process()


_held_back: list[object] = []


os.register_at_fork(after_in_child=_forked)


def listen(tell: Tell) -> Callable[[], None]:
    """Have the notices for this process told until the function that this returns is called.

    `tell` is called in another thread, and once for each notice; at once if one stands that
    stops this process. A forked child hears nothing.
    """
    if _held_back:
        return lambda: None
    return _listening.listen(tell)


def hold_back() -> Callable[[], None]:
    """Who comes to listen hears nothing until the function that this returns is called: the
    caller decides in this process what a notice means, as for a task of Metaflow."""
    mine = object()
    _held_back.append(mine)

    def give_back() -> None:
        if mine in _held_back:
            _held_back.remove(mine)

    return give_back


def deadline_s() -> float | None:
    """When this process will be stopped as far as is known without a notice, Unix time: the
    end of its Slurm job. None if nobody says."""
    return slurm.end_s(os.environ) if is_wanted("slurm") else None
