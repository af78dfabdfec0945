"""Who writes a run: another process, another writer of this one, or nobody any more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol
from weakref import WeakValueDictionary

from holdfast.core.process import current, is_alive
from holdfast.core.records import Entry, Holder
from holdfast.errors import RunHeld
from holdfast.stores.addresses import real_address

Alive = Callable[[Holder], bool | None]
"""Whether a process lives; None if that cannot be known from here."""


class Holding(Protocol):
    """A writer, as far as it matters here."""

    epoch: int

    @property
    def closed(self) -> bool: ...


_open_here: WeakValueDictionary[tuple[str, int, str], Holding] = WeakValueDictionary()
"""Writers of this process: (run id, epoch, where) -> writer. A run and its copies share the id."""


def note_open(writer: Holding, run: str, address: str) -> None:
    """A writer of this process has become that of the run at `address`."""
    _open_here[run, writer.epoch, real_address(address)] = writer


def is_held(entry: Entry, address: str, me: Holder, alive: Alive) -> bool:
    """Whether a live process other than `me` writes the run, or a writer of `me` that is open."""
    if entry.holder is None:
        return False
    if entry.holder != me:
        return bool(alive(entry.holder))
    # Ours, unless an opening of ours failed after its entry had landed.
    writer = _open_here.get((entry.run, entry.epoch, real_address(address)))
    return writer is not None and not writer.closed


def run_held(address: str, other: Holder, me: Holder) -> RunHeld:
    """The error that says who writes the run at `address`."""
    if other == me:
        return RunHeld(
            f"{address} is already open for writing in this process",
            hint="Close the other Run or CheckpointManager first (`with` does it for you).",
        )
    return RunHeld(
        f"{address} is held by process {other.pid} on {other.host}",
        hint=f"Wait for it, stop it (kill {other.pid}), or pass take_over=True.",
    )


def refuse_if_held(
    entry: Entry | None, address: str, *, take_over: bool, alive: Alive = is_alive
) -> None:
    """Raise RunHeld if a process writes the run, or may do so on another machine."""
    holder = entry.holder if entry else None
    if entry is None or holder is None or take_over:
        return
    if not is_held(entry, address, current(), lambda other: alive(other) is not False):
        return
    doubt = ", and whether it still runs cannot be known from here" if alive(holder) is None else ""
    raise RunHeld(
        f"{address} is held by process {holder.pid} on {holder.host}{doubt}",
        hint="Wait for it or stop it. --take-over goes on without asking: that process can "
        "then save no more.",
    )


def seen_alive(holder: Holder) -> bool:
    """Whether a process is known to live. For mirrors, as for the run itself: one of another
    machine, of which nothing is known, is taken over. If it lives after all, its next commit is
    refused."""
    return bool(is_alive(holder))
