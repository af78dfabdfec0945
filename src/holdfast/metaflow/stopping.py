"""How a task ends before its machine does. Called by the decorator; imports Metaflow."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from holdfast.errors import Preempted
from holdfast.notices.detect import detect
from holdfast.notices.file import file_notifier
from holdfast.notices.listening import Listening, hold_back, notifiers_of
from holdfast.notices.notice import Notice
from holdfast.notices.notifier import Notifier

if TYPE_CHECKING:
    from holdfast.metaflow.current import CurrentCheckpoint


class Watch:
    """Whether one of `notifiers` has said that the machine is taken away; `tell` gets what it
    said, once, in another thread. Until `close`."""

    def __init__(self, notifiers: Sequence[Notifier], tell: Callable[[str], None]) -> None:
        self.notice = ""
        """What was said; "" as long as nothing was."""
        self._tell = tell
        self._leave = Listening(lambda: notifiers, linger_s=0).listen(self._hear)

    def close(self) -> None:
        """Look no more."""
        self._leave()

    def _hear(self, notice: Notice) -> None:
        if notice.stops and not self.notice:
            self.notice = notice.text or notice.source
            self._tell(self.notice)


class Stopping:
    """What a step does about a notice, and about SIGTERM, until `close`.

    `current` is Metaflow's. With the policy "stop" a save after a notice ends the attempt, if
    another one follows, which may begin on another machine; with "tell" `current.checkpoint`
    says that there is one; with "none" nobody looks.
    """

    def __init__(
        self,
        current: Any,
        checkpoint: CurrentCheckpoint,
        *,
        policy: str,
        may_retry: bool,
        tell: Callable[[str], None],
    ) -> None:
        self._tell = tell
        self._stops = policy == "stop" and may_retry and _is_remote(current)
        self._termination = Termination()
        # A Run in the step does what the policy says, and not by itself.
        self._give_back = hold_back()
        self._watch = None if policy == "none" else _watch(current, self._noticed)
        checkpoint.heed(self._watch, stops=self._stops)

    def close(self) -> None:
        """The step has ended. May be called again."""
        self._termination.close()
        if self._watch is not None:
            self._watch.close()
        self._give_back()

    def _noticed(self, notice: str) -> None:
        if not self._stops:
            self._tell(
                f"{notice}: what is saved by then stays; current.checkpoint.preempted is true"
            )
            return
        self._tell(f"{notice}: the task stops when its next save is durable, and is retried")
        if (signals := sys.modules.get("holdfast.notices.signals")) is not None:
            signals.stop_all("preempted")


def _watch(current: Any, tell: Callable[[str], None]) -> Watch | None:
    """Looks for a notice where one can come: in the file that Metaflow names on AWS Batch and
    Kubernetes, or from the machine itself. None elsewhere: no thread, no request."""
    if path := current.get("spot_termination_notice"):
        notifiers = [file_notifier(path)]
    else:
        notifiers = notifiers_of(detect())
    return Watch(notifiers, tell) if notifiers else None


def _is_remote(current: Any) -> bool:
    """Whether the next attempt of this task may begin on another machine. The local runtime
    begins it at once, on this one."""
    names = ("AWS_BATCH_JOB_ID", "METAFLOW_KUBERNETES_WORKLOAD")
    return bool(current.get("spot_termination_notice")) or any(map(os.environ.get, names))


def stop(notice: str, url: str) -> NoReturn:
    """End the attempt: Metaflow begins the next one, if there are retries left."""
    from metaflow.exception import MetaflowException

    class Stopped(Preempted, MetaflowException):
        """Metaflow prints its text instead of a traceback."""

        headline = "Preempted"

    raise Stopped(f"{notice}. Saved as {url}: the next attempt of the task goes on from there.")


class Termination:
    """While it is there SIGTERM ends the step by SystemExit, so that its saves are finished and
    the task fails: by itself the process would be gone at once. In the main thread.

    A handler of the user's stays, and one that comes later replaces this.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._installed = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        )
        if self._installed:
            signal.signal(signal.SIGTERM, self._handle)

    def close(self) -> None:
        """Give the signal back."""
        if self._installed and signal.getsignal(signal.SIGTERM) == self._handle:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked child, such as a loader's worker
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        signals = sys.modules.get("holdfast.notices.signals")
        if signals is not None and signals.is_awaited(frame):
            return  # a Run in the step saves at its next boundary, and leaves
        raise SystemExit(128 + number)
