"""What samplers and other iterables keep in their attributes from epoch to epoch.

An epoch can be replayed only from what its iterable was when the epoch began: the states
of the generators it holds, counters such as `sampler.epoch`, an index list that is
shuffled in place. `Held` finds these in attributes, records them, and puts them back
into the objects of a new process.

A saved value and a live one may differ for two reasons: the run changed it (put the saved
one back) or the program was edited (never overrule that). They are told apart by what
the value was when the iterable was first seen, "as built": an iterable built by the same
program starts from the same value.
"""

from __future__ import annotations

import copy
import hashlib
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from holdfast.run.randomness import Library, libraries
from holdfast.run.search import find_generators, small_items

# Larger attributes are data, not state: hashing them at each epoch would cost seconds.
MAX_ARRAY_BYTES = 64 << 20
MAX_ITEMS = 1_000_000

_SCALARS = (bool, int, float, complex, str, bytes, type(None))
DATA_NAMES = frozenset({"dataset", "data_source"})
"""Attributes in which samplers keep the data."""
_MAX_DEPTH = 8

Follow = Callable[[object], bool]
Closed = Callable[[str, object], bool]


@dataclass(frozen=True)
class _Place:
    """One attribute. `library` is that of a generator object, None for plain data."""

    owner: object
    name: str
    value: Any
    library: Library | None


class Held:
    """The state held in the attributes of `roots` and of objects in them that `follow`
    accepts, and generators wherever `find_generators` finds them. Neither looks into
    attributes for which `closed` holds."""

    def __init__(
        self,
        roots: Mapping[str, object],
        follow: Follow = lambda value: False,
        *,
        closed: Closed = lambda name, value: False,
    ) -> None:
        self._roots = dict(roots)
        self._follow = follow
        self._closed = closed
        self._deep = self._search()
        self._built = {path: _print(place) for path, place in self._places().items()}
        self._begun = False
        self._ended: dict[str, str] | None = None
        self._outside: dict[str, bool] = {}
        """Whether the program sets a generator between epochs, where that was seen."""
        self._lasts: dict[str, bool | None] = {}
        """Whether the object at a path outlives an epoch, where that was seen."""
        self._guessed: set[str] = set()
        """Paths whose saved value was put back though nobody knew whether it lasts."""

    def inherit(self, before: Held) -> list[str]:
        """The program built an iterable anew; `before` is what the one before it held.
        Returns the paths that a resume took to last and that turn out not to."""
        places, old = self._places(), before._places()
        for path, place in places.items():
            if path in old and _is_same(place, old[path]):
                self._lasts[path] = True
                self._built[path] = before._built.get(path)
                if path in before._outside:
                    self._outside[path] = before._outside[path]
            else:
                # One that had lasted was exchanged: another that lasts, for all we know.
                self._lasts[path] = None if before._lasts.get(path) else False
        if before._ended is not None:
            lasting = {path for path, lasts in self._lasts.items() if lasts}
            self._ended = {path: now for path, now in before._ended.items() if path in lasting}
        return sorted(path for path in before._guessed if self._lasts.get(path) is False)

    def state(self) -> dict[str, Any]:
        """A plain tree of all that `restore` needs. Copies what may change."""
        saved: dict[str, Any] = {}
        for path, place in self._places().items():
            now = _print(place)
            if now is None:
                continue
            entry: dict[str, Any] = {
                "now": now,
                "built": self._built.get(path) or "",
                "lasts": self._lasts.get(path),
            }
            if place.library is not None:
                entry["library"] = place.library.name
                entry["state"] = place.library.read(place.value)
                if path in self._outside:
                    entry["outside"] = self._outside[path]
            elif isinstance(place.value, _SCALARS) or now != entry["built"]:
                entry["value"] = copy.deepcopy(place.value)
            saved[path] = entry
        return saved

    def generators(self) -> dict[str, Any]:
        """The states of the generators alone, for `put`."""
        return {
            path: {"library": place.library.name, "state": place.library.read(place.value)}
            for path, place in self._places().items()
            if place.library is not None
        }

    def put(self, saved: dict[str, Any]) -> None:
        """Set the generators to what `generators` returned."""
        live = self._places()
        for path, entry in saved.items():
            place = live.get(path)
            if place is not None and place.library is not None:
                self._restore_generator(path, place, entry)

    def begin(self) -> None:
        """An epoch begins: note which generators the program has set since the last
        one ended (`generator.manual_seed(epoch)` in an epoch's prologue)."""
        self._deep = self._search()
        if self._begun:
            self._lasts = dict.fromkeys(self._places(), True)
        self._begun = True
        if self._ended is None:
            return
        for path, place in self._places().items():
            if place.library is not None and path in self._ended:
                moved = _print(place) != self._ended[path]
                self._outside[path] = self._outside.get(path, False) or moved
        self._ended = None

    def end(self) -> None:
        """An epoch has ended."""
        prints = {path: _print(place) for path, place in self._places().items()}
        self._ended = {path: now for path, now in prints.items() if now is not None}

    def restore(self, saved: dict[str, Any]) -> list[str]:
        """Put back what the run changed, as it was when an epoch began. Returns what
        differs for another reason, in words; the caller must then not go on inside
        that epoch."""
        live = self._places()
        problems = [f"{path} is new" for path in live if path not in saved and _print(live[path])]
        for path, entry in saved.items():
            place = live.get(path)
            if place is None:
                problems.append(f"{path} is gone")
            elif place.library is not None:
                problems += self._restore_generator(path, place, entry)
            elif _print(place) == entry["now"]:
                continue
            elif "value" in entry and _print(place) == entry["built"]:
                _assign(place, entry["value"])
            elif isinstance(entry.get("value", ...), _SCALARS):
                problems.append(f"{path} was {entry['value']!r}, is {place.value!r}")
            else:
                problems.append(f"{path} has changed")
        self._begun = True
        self._note(saved)
        return problems

    def settle(self, saved: dict[str, Any]) -> None:
        """Put back what lasts from one epoch to the next, at an epoch's end. What the
        program sets or builds anew before each epoch is left as it has just made it."""
        live = self._places()
        self._note(saved)
        for path, entry in saved.items():
            place = live.get(path)
            lasts = entry.get("lasts")
            if place is None or lasts is False:
                continue
            now = _print(place)
            if now == entry["now"]:
                continue
            as_built = now == entry["built"]
            if place.library is None:
                if as_built and "value" in entry:
                    _assign(place, entry["value"])
                    self._note_guess(path, lasts)
                continue
            outside = entry.get("outside")
            if outside is None and not as_built:
                # Seeded or built in this epoch's prologue, or before the loop, with a
                # seed from the clock? The latter has another one in each process.
                outside = place.library.seeded(place.value)
            if not outside:
                self._restore_generator(path, place, entry)
                self._note_guess(path, lasts)
        self._ended = {path: entry["now"] for path, entry in saved.items()}

    def _note_guess(self, path: str, lasts: bool | None) -> None:
        if lasts is None:
            self._guessed.add(path)

    def _restore_generator(self, path: str, place: _Place, entry: dict[str, Any]) -> list[str]:
        assert place.library is not None
        try:
            if entry.get("library") != place.library.name:
                raise ValueError
            place.library.write(place.value, entry["state"])
        except (ValueError, TypeError, KeyError, RuntimeError):
            return [f"{path} is another kind of generator"]
        return []

    def _note(self, saved: dict[str, Any]) -> None:
        """Go on from what the saved run had learned."""
        self._outside = {
            path: bool(entry["outside"]) for path, entry in saved.items() if "outside" in entry
        }
        self._lasts = {path: entry.get("lasts") for path, entry in saved.items()}

    def _places(self) -> dict[str, _Place]:
        found: dict[str, _Place] = {}
        known = libraries()
        seen: set[int] = set()

        def visit(owner: object, path: str, depth: int) -> None:
            if id(owner) in seen or depth > _MAX_DEPTH:
                return
            seen.add(id(owner))
            for name, value in list(getattr(owner, "__dict__", {}).items()):
                here = f"{path}.{name}"
                library = owner_of(value, known)
                if library is not None:
                    generator(here, owner, name, value, library)
                elif self._closed(name, value):
                    continue
                elif not enter(value, here, depth) and name not in DATA_NAMES:
                    found[here] = _Place(owner, name, value, None)

        def enter(value: object, path: str, depth: int) -> bool:
            """Visit `value`, or what is in it if it is a small container; whether there
            was anything to visit."""
            if self._follow(value):
                visit(value, path, depth + 1)
                return True
            entered = False
            for where, item in (small_items(value) or ()) if depth <= _MAX_DEPTH else ():
                entered = enter(item, f"{path}{where}", depth + 1) or entered
            return entered

        def generator(path: str, owner: object, name: str, value: Any, library: Library) -> None:
            if id(value) not in seen:
                seen.add(id(value))
                found[path] = _Place(owner, name, value, library)

        for path, root in self._roots.items():
            library = owner_of(root, known)
            if library is not None:
                generator(path, None, "", root, library)
            else:
                visit(root, path, 0)
        for path, library, value in self._deep:
            generator(path, None, "", value, library)
        return found

    def _search(self) -> list[tuple[str, Library, Any]]:
        """Generators in places that are no attributes of what is followed: in lists, in
        objects of other kinds, in closures."""
        known = libraries()
        return [
            (f"{path}, generator {number}", library, value)
            for path, root in self._roots.items()
            for number, (library, value) in enumerate(
                find_generators(root, known, closed=self._closed)
            )
        ]


def _is_same(place: _Place, before: _Place) -> bool:
    """Whether what a run changes at one of them is seen at the other."""
    if place.library is not None:
        return place.value is before.value
    shared = place.value is before.value and not isinstance(place.value, _SCALARS)
    return place.owner is before.owner or shared


def owner_of(value: object, known: Iterable[Library]) -> Library | None:
    """The library whose generator object `value` is."""
    return next((library for library in known if library.owns(value)), None)


# -- plain values -------------------------------------------------------------


class _NotPlain(Exception):
    pass


def _print(place: _Place) -> str | None:
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
    if isinstance(value, _SCALARS):
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


def _assign(place: _Place, saved: Any) -> None:
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
