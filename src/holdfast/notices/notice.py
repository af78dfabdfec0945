"""What a notice says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Notice:
    """This process, or its machine, is about to be stopped.

    >>> Notice("SIGTERM")
    Notice(source='SIGTERM', text='', deadline_s=None, stops=True)
    """

    source: str
    """Who says so, in a word or two: "SIGTERM", "AWS spot", "Slurm"."""
    text: str = ""
    """What was said, for people: "the instance will terminate at 2026-11-26T10:00:00Z"."""
    deadline_s: float | None = None
    """When it will be stopped, Unix time; None if nobody said."""
    stops: bool = True
    """False: it may be, so that a save is wise, but work goes on (AWS's rebalance
    recommendation)."""
