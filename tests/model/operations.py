"""What a process asks of the store, one step each."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, NamedTuple

from .entries import Entry, NumberAndId

Program = Generator[Any, Any, Any]
"""Yields operations, is sent their results."""


class Put(NamedTuple):
    """Create log entry `entry.number` unless there is one: "ok", "exists", "error"; "wrong" if
    this created it, and other bytes are there."""

    run: str
    entry: Entry


class Get(NamedTuple):
    """Log entry `number`: an Entry, None (absent), "damaged" or "error"."""

    run: str
    number: int


class Highest(NamedTuple):
    """The highest number that a listing of the log shows; 0 for none.

    After a `ListBegin` the listing is no snapshot.
    """

    run: str


class Shown(NamedTuple):
    """The highest number that a listing of the log shows; 0 if it does not show `entry`.

    After a `ListBegin` the listing is no snapshot.
    """

    run: str
    entry: NumberAndId


class ListBegin(NamedTuple):
    """Start a listing that takes its time."""

    run: str


class ReadNewest(NamedTuple):
    """`read_newest` as one step, for scenarios where its own races do not matter."""

    run: str


class DeleteOldest(NamedTuple):
    """Delete the lowest entry that is at least `first` and at most `last`; was there one?"""

    run: str
    first: int
    last: int


class Turn(NamedTuple):
    """Another guest commits something that matters to nobody: the number of its entry."""

    run: str
    prune: bool
    """Whether it also prunes the log, all in this step."""


class Sync(NamedTuple):
    """Make the visible log durable: fsync of its directory. Nothing on object stores."""

    run: str


class PutPack(NamedTuple):
    """Write a pack; its name is registered as in flight before."""

    name: str


class ListPacks(NamedTuple):
    """Names of all packs of the parent run."""


class DeletePack(NamedTuple):
    name: str


class InFlight(NamedTuple):
    """The names that this process's saves have in flight."""


class Settled(NamedTuple):
    """Nothing that this process's saves wrote is in flight any more."""


class Acknowledge(NamedTuple):
    """Tell the user that the entry is committed. No operation; the world checks it."""

    run: str
    entry: Entry


class Observe(NamedTuple):
    """Take the entry for the newest. No operation; the world checks it."""

    run: str
    entry: Entry
