"""What the end of a process means, and how long to wait before the next one."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from holdfast.errors import UsageError

Verdict = Literal["restart", "stop"]

PREEMPTED = 75
"""What a `Run` exits with after it has answered a signal with a save (EX_TEMPFAIL)."""
TIMED_OUT = 124
"""As timeout(1) has it."""

FIRST_BACKOFF_S = 1.0

_RULE = re.compile(r"(?P<codes>[^=]+)=(?P<verdict>restart|stop)")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True)
class Rules:
    """Which exit statuses are answered with a restart.

    >>> Rules.parse(["3,10-12=stop", "SIGSEGV=stop"]).verdict(139)
    'stop'
    """

    rules: tuple[tuple[range, Verdict], ...] = ()
    """Looked at in order, before the defaults."""

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Rules:
        """From words like "75=restart", "3,10-12=stop", "SIGSEGV=stop"; the last one that
        names a status counts. Raises UsageError."""
        found: list[tuple[range, Verdict]] = []
        for text in texts:
            match = _RULE.fullmatch(text.strip())
            if match is None:
                raise _unreadable(text)
            verdict: Verdict = "restart" if match["verdict"] == "restart" else "stop"
            found.extend((_codes(word, text), verdict) for word in match["codes"].split(","))
        return cls(tuple(reversed(found)))

    def names(self, status: int) -> bool:
        """Whether a rule was given for it."""
        return any(status in codes for codes, _ in self.rules)

    def verdict(self, status: int) -> Verdict:
        """By default 0 is the end of the work; 2 (a wrong argument, to Python and most
        programs), 126 and 127 (it could not be started) come again however often it is
        tried; everything else is worth another start."""
        for codes, verdict in self.rules:
            if status in codes:
                return verdict
        return "stop" if status in (0, 2, 126, 127) else "restart"


def _codes(word: str, text: str) -> range:
    name = word.strip().upper()
    if name.startswith("SIG"):
        try:
            number = signal.Signals[name].value
        except KeyError:
            raise _unreadable(text) from None
        return range(128 + number, 129 + number)
    match = _RANGE.fullmatch(name)
    if match is None:
        raise _unreadable(text)
    low, high = int(match[1]), int(match[2] or match[1])
    if not low <= high <= 255:
        raise _unreadable(text)
    return range(low, high + 1)


def _unreadable(text: str) -> UsageError:
    return UsageError(
        f"{text!r} is no rule for exit statuses",
        hint="Write statuses (0 to 255), ranges or names of signals, and what to do: "
        "75=restart, 3,10-12=stop, SIGSEGV=stop.",
    )


def exit_status(returncode: int) -> int:
    """What `subprocess` gives, as a shell reports it: 128 + the signal's number.

    >>> exit_status(-9), exit_status(3)
    (137, 3)
    """
    return 128 - returncode if returncode < 0 else returncode


def status_text(status: int) -> str:
    """
    >>> status_text(137), status_text(1), status_text(75)
    ('was killed by SIGKILL', 'ended with status 1', 'ended with status 75')
    """
    if status > 128:
        try:
            return f"was killed by {signal.Signals(status - 128).name}"
        except ValueError:
            pass
    return f"ended with status {status}"


def backoff_s(restarts: int, jitter: float, longest_s: float) -> float:
    """How long to wait before a restart, after so many in a row without progress. `jitter`
    is random, from 0 to 1.

    Exponential with full jitter (M. Brooker, "Exponential Backoff And Jitter", AWS
    Architecture Blog, 2015): a hundred workers that died of one cause, say a file server's
    restart, do not come back all at once.

    >>> [backoff_s(n, 1.0, 60.0) for n in range(8)]
    [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    """
    doublings = min(restarts, 60)  # 2.0**1024 would be an error
    return jitter * min(longest_s, FIRST_BACKOFF_S * 2.0**doublings)
