"""One value that a loader holds: a generator, or plain data in an attribute of an object.

Read as a digest, to tell whether it changed; given a saved value in place, so that all who
share it see that.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from holdfast.run.randomness import Library, libraries

# Larger attributes are data, not state: hashing them at each epoch would cost seconds.
MAX_ARRAY_BYTES = 64 << 20
MAX_ITEMS = 1_000_000

SCALARS = (bool, int, float, complex, str, bytes, type(None))

Key = tuple[int, str]


@dataclass(frozen=True)
class Place:
    """One attribute. `library` is that of a generator object, None for plain data."""

    owner: object
    name: str
    value: Any
    library: Library | None

    @property
    def key(self) -> Key:
        """The same for all ways to one object, while that is alive."""
        return (id(self.owner), self.name) if self.library is None else (id(self.value), "")


_left: dict[int, tuple[str, str | None]] = {}
"""Generators as an epoch left them, and as the program built them, by their ids."""


def leave(place: Place, now: str, built: str | None) -> None:
    """An epoch ends: `now` is the digest of the value, `built` that of the one it once was."""
    if place.library is not None:
        _left[id(place.value)] = (now, built)


def built_as(place: Place, now: str | None) -> str | None:
    """A digest of what the program built, if only loops of ours have used it since: a later
    run in this process (a cell that runs again, the next fold) goes on with a generator that
    an earlier one has moved. Else `now`, the digest of what it is."""
    left, built = _left.get(id(place.value), ("", None)) if place.library else ("", None)
    # By the state too: an object that is gone may leave its id to another one.
    return built if now == left else now


class _NotPlain(Exception):
    pass


def digest_of(place: Place) -> str | None:
    """A digest of the value; None for what is no plain data or too much of it."""
    value = place.value
    known = libraries()
    if place.library is not None:
        value = place.library.read(value)
    hasher = hashlib.blake2b(digest_size=16)
    try:
        _feed(hasher, value, [MAX_ITEMS], known, set())
    except _NotPlain:
        return None
    return hasher.hexdigest()


def _feed(
    hasher: Any, value: Any, budget: list[int], known: tuple[Library, ...], above: set[int]
) -> None:
    budget[0] -= 1
    if budget[0] < 0:
        raise _NotPlain
    if isinstance(value, SCALARS):
        hasher.update(f"{type(value).__name__}:{value!r};".encode("utf-8", "surrogatepass"))
        return
    numbers = next((a for one in known if (a := one.array(value)) is not None), None)
    if numbers is None and isinstance(value, np.generic):
        numbers, value = np.asarray(value), None
    if numbers is not None:
        if numbers.dtype.hasobject or numbers.nbytes > MAX_ARRAY_BYTES:
            raise _NotPlain
        shown = numbers if value is None else value  # a framework's array comes as bytes
        hasher.update(f"array:{shown.dtype}{tuple(shown.shape)};".encode())
        hasher.update(np.ascontiguousarray(numbers).data.cast("B") if numbers.size else b"")
        return
    if id(value) in above:
        raise _NotPlain  # a cycle
    inner = above | {id(value)}
    if type(value) in (list, tuple, deque):
        hasher.update(f"{type(value).__name__}{len(value)}[".encode())
        if value and (packed := _packed(value)) is not None:
            hasher.update(packed)
            return
        for item in value:
            _feed(hasher, item, budget, known, inner)
    elif isinstance(value, dict):
        hasher.update(f"dict{len(value)}[".encode())
        for key, item in value.items():
            _feed(hasher, key, budget, known, inner)
            _feed(hasher, item, budget, known, inner)
    else:
        # Sets too: their order differs between processes, and so would an epoch.
        raise _NotPlain


def _packed(value: Iterable[Any]) -> bytes | None:
    """A sequence of machine integers as bytes: 50 times faster than one by one."""
    try:
        return b"int64:" + array("q", value).tobytes()
    except (TypeError, OverflowError):
        return None


def assign(place: Place, saved: Any) -> None:
    """Give an attribute its saved value; containers keep their identity."""
    live: Any = place.value
    if isinstance(live, list | deque):
        live.clear()
        live.extend(saved)
    elif isinstance(live, dict):
        live.clear()
        live.update(saved)
    elif isinstance(live, np.ndarray):
        if live.shape == np.shape(saved) and live.flags.writeable:
            np.copyto(live, saved)
        else:
            vars(place.owner)[place.name] = saved
    elif hasattr(live, "copy_") and live.shape == saved.shape:
        live.copy_(saved)  # a tensor; this package knows none
    else:
        vars(place.owner)[place.name] = saved
