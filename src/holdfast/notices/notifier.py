"""Who can be asked whether this process is about to be stopped.

A module of this folder, or a package of others (entry point group `holdfast.notifiers`), makes
one for each place where such a thing is said. Each is asked in a thread of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from holdfast.notices.notice import Notice

Ask = Callable[[], Sequence[Notice]]


class Over(Exception):
    """Nobody will say anything: there is no more to ask in this process."""


@dataclass(frozen=True)
class Notifier:
    """A place where notices come from.

    >>> Notifier("drain", lambda: [Notice("drain", "this node is drained")]).interval_s
    5.0
    """

    name: str
    """What it asks, in a word or two, for logs: "AWS"."""
    ask: Ask
    """Gives the notices that stand now. It may wait until that changes, but has to return
    within a minute or so. What it raises is an answer that did not come: it is asked again,
    less often each time; `Over` ends it. Equal notices are told once."""
    interval_s: float = 5.0
    """Between two questions."""
