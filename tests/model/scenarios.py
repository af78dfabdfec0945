"""The bounded configurations that are explored, and where each bug shows."""

from __future__ import annotations

from collections.abc import Callable

from .protocol import (
    Bug,
    Entry,
    Pin,
    Process,
    Program,
    Prune,
    Record,
    Settings,
    Touch,
    Transaction,
)
from .world import Scenario, Thread

# Two checkpoints, saved by A in epoch 1. Numbers 1 and 2, so that pruning has something
# to leave: the first entry stays for ever.
C0 = Record("c0", ("p0",))
C1 = Record("c1", ("p1",))
FIRST = Entry(1, "first", None, (), 1, "A", "A", "open", (C0,))
SECOND = Entry(2, "second", (1, "first"), (), 1, "A", "A", "save", (C0, C1))
LOG = (FIRST, SECOND)
PACKS = ("p0", "p1")
CHILD_LOG = (Entry(1, "child", None, (), 0, "", "", "open", ()),)


def writer(
    saves: int,
    *,
    opened: bool = False,
    keep: int = 2,
    reuse: str = "oldest",
    gc_after: bool = False,
) -> Callable[[Process], Program]:
    head = SECOND if opened else None
    return lambda process: process.writer(
        saves, head, keep=keep, reuse=reuse, gc_after=gc_after
    )


def guest(*transactions: Transaction) -> Callable[[Process], Program]:
    return lambda process: process.guest(*transactions)
