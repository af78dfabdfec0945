"""What must hold between one newest entry and the next, and about what is listed.

I1  Every checkpoint that the newest entry lists has all its packs.
I2  A checkpoint leaves the list only through a save or a prune, and what was acknowledged
    survives a loss of power.
I3  Readers see one line of entries: each newest entry continues the one before; whatever
    a process takes for the newest, or is acknowledged, is on that line. There always is an
    entry that a reader can use.
I4  Epochs only rise, one at a time, through "open"; only the holder of the epoch saves.
I5  Packs that the child run lists are there, in the parent run.
I6  No pack is deleted that is needed now or will be by a save in flight. (A pack needed
    now: I1 and I5 at the deletion. By a save in flight: I1 when it commits.)
I7  A tagged or pinned checkpoint stays listed, and keeps its pins until they are released.
I8  A checkpoint is added once: what was retired, and perhaps deleted, never comes back.
"""

from __future__ import annotations

from collections.abc import Collection

from .entries import Entry
from .explore import Violation


def check_usable(newest: Entry, parent: Entry | None) -> None:
    """The highest entry of the log; `parent`: what is at its parent's number."""
    if newest.parent is not None and (parent is None or parent.id != newest.parent[1]):
        raise Violation("I3", f"no reader can use {newest}: its parent is not there")


def check_next(before: Entry, after: Entry, added_before: Collection[str]) -> None:
    """`after` becomes the newest entry when `before` was; names ever listed."""
    if after.parent != (before.number, before.id):
        raise Violation("I3", f"readers go from {before} to {after}")
    _check_epoch(before, after)
    new = {record.name: record for record in after.records}
    for record in before.records:
        kept = new.pop(record.name, None)
        if kept is None and after.action not in {"save", "prune"}:
            raise Violation("I2", f"{after} loses {record.name}")
        if kept is None and record.pins:
            raise Violation("I7", f"{after} retires {record.name}, pinned for {record.pins}")
        if kept and after.action != "unpin" and not set(kept.pins) >= set(record.pins):
            raise Violation("I7", f"{after} drops a pin of {record.name}")
    for name in new:
        if name in added_before:
            raise Violation("I8", f"{after} adds {name}, which was added before")


def _check_epoch(before: Entry, after: Entry) -> None:
    if after.action == "open":
        if after.epoch != before.epoch + 1:
            raise Violation("I4", f"{after} opens an epoch that is not new")
    elif (after.epoch, after.holder) != (before.epoch, before.holder):
        raise Violation("I4", f"{after} follows epoch {before.epoch}")
    if after.action == "save" and after.author != before.holder:
        raise Violation("I4", f"{after} is by {after.author}; {before.holder} is the writer")
