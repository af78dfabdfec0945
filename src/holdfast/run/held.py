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
from collections.abc import Callable, Mapping
from typing import Any

from holdfast.run.ledger import Ledger
from holdfast.run.randomness import Library, libraries, owner_of
from holdfast.run.search import find_generators, small_items
from holdfast.run.values import SCALARS, Key, Place, assign, built_as, digest_of, leave

DATA_NAMES = frozenset({"dataset", "data_source"})
"""Attributes in which samplers keep the data."""
_MAX_DEPTH = 8

Follow = Callable[[object], bool]
Closed = Callable[[str, object], bool]


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
        self._built = {
            path: built_as(place, digest_of(place)) for path, place in self.places().items()
        }
        self.touched = False
        self._ledger: Ledger | None = None
        self._begun = False
        self._ended: dict[str, str] | None = None
        self._outside: dict[str, bool] = {}
        """Whether the program sets a generator between epochs, where that was seen."""
        self._lasts: dict[str, bool | None] = {}
        """Whether the object at a path outlives an epoch, where that was seen."""
        self._guessed: set[str] = set()
        """Paths whose saved value was put back though nobody knew whether it lasts."""

    def join(self, ledger: Ledger) -> None:
        """Share what is known of objects with all others that hold them."""
        self._ledger = ledger
        known = self._known()
        for path, place in self.places().items():
            if place.key in known:
                self._built[path] = known[place.key]
        ledger.join(self)

    def _known(self) -> dict[Key, str | None]:
        """Objects that others have brought up to date in this process."""
        return {} if self._ledger is None else self._ledger.known(besides=self)

    def _passing(self) -> bool:
        """Whether the loop had ended before the checkpoint, and is passed over."""
        return self._ledger is not None and self._ledger.passing

    def built(self, path: str) -> str | None:
        """A digest of the value that the program built."""
        return self._built.get(path)

    def inherit(self, before: Held) -> list[str]:
        """The program built an iterable anew; `before` is what the one before it held.
        Returns the paths that a resume took to last and that turn out not to."""
        places, old = self.places(), before.places()
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
        for path, place in self.places().items():
            now = digest_of(place)
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
            elif isinstance(place.value, SCALARS) or now != entry["built"]:
                entry["value"] = copy.deepcopy(place.value)
            saved[path] = entry
        return saved

    def generators(self) -> dict[str, Any]:
        """The states of the generators alone, for `put`."""
        return {
            path: {"library": place.library.name, "state": place.library.read(place.value)}
            for path, place in self.places().items()
            if place.library is not None
        }

    def put(self, saved: dict[str, Any]) -> None:
        """Set the generators to what `generators` returned."""
        live = self.places()
        for path, entry in saved.items():
            place = live.get(path)
            if place is not None and place.library is not None:
                self._restore_generator(path, place, entry)

    def begin(self) -> None:
        """An epoch begins: note which generators the program has set since the last
        one ended (`generator.manual_seed(epoch)` in an epoch's prologue)."""
        self.touched = True
        self._deep = self._search()
        if self._begun:
            self._lasts = dict.fromkeys(self.places(), True)
        self._begun = True
        if self._ended is None:
            return
        for path, place in self.places().items():
            if place.library is not None and path in self._ended:
                moved = digest_of(place) != self._ended[path]
                self._outside[path] = self._outside.get(path, False) or moved
        self._ended = None

    def end(self) -> None:
        """An epoch has ended."""
        self._ended = {}
        for path, place in self.places().items():
            now = digest_of(place)
            if now is not None:
                self._ended[path] = now
                leave(place, now, self._built.get(path))

    def restore(self, saved: dict[str, Any]) -> list[str]:
        """Put back what the run changed, as it was when an epoch began. Returns what
        differs for another reason, in words; the caller must then not go on inside
        that epoch."""
        live, known, self.touched = self.places(), self._known(), True
        problems = [
            f"{path} is new" for path in live if path not in saved and digest_of(live[path])
        ]
        for path, entry in saved.items():
            place = live.get(path)
            if place is None:
                problems.append(f"{path} is gone")
            elif place.library is not None:
                problems += self._restore_generator(path, place, entry)
            elif (now := digest_of(place)) == entry["now"]:
                continue
            elif "value" in entry and entry["built"] in (now, known.get(place.key)):
                assign(place, entry["value"])
            elif isinstance(entry.get("value", ...), SCALARS):
                problems.append(f"{path} was {entry['value']!r}, is {place.value!r}")
            else:
                problems.append(f"{path} has changed")
        self._begun = True
        self._note(saved)
        return problems

    def settle(self, saved: dict[str, Any]) -> None:
        """Put back what lasts from one epoch to the next, at an epoch's end. What the
        program sets or builds anew before each epoch is left as it has just made it, and
        so is what another loop has used since."""
        live, known, self.touched = self.places(), self._known(), True
        passing = self._passing()
        self._note(saved)
        for path, entry in saved.items():
            place = live.get(path)
            lasts = entry.get("lasts")
            if place is None:
                continue
            if not passing and (lasts is False or place.key in known):
                continue
            now = digest_of(place)
            if now == entry["now"]:
                continue
            as_built = entry["built"] in (built_as(place, now), known.get(place.key))
            if place.library is None:
                if as_built and "value" in entry:
                    assign(place, entry["value"])
                    self._note_guess(path, lasts)
                continue
            outside = entry.get("outside")
            if outside is None and not as_built:
                # Seeded or built in this epoch's prologue, or before the loop, with a
                # seed from the clock? The latter has another one in each process.
                outside = place.library.seeded(place.value)
            if passing or not outside:
                self._restore_generator(path, place, entry)
                self._note_guess(path, lasts)
        self._ended = {path: entry["now"] for path, entry in saved.items()}

    def _note_guess(self, path: str, lasts: bool | None) -> None:
        if lasts is None and not self._passing():
            self._guessed.add(path)

    def _restore_generator(self, path: str, place: Place, entry: dict[str, Any]) -> list[str]:
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

    def places(self) -> dict[str, Place]:
        found: dict[str, Place] = {}
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
                    found[here] = Place(owner, name, value, None)

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
                found[path] = Place(owner, name, value, library)

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


def _is_same(place: Place, before: Place) -> bool:
    """Whether what a run changes at one of them is seen at the other."""
    if place.library is not None:
        return place.value is before.value
    shared = place.value is before.value and not isinstance(place.value, SCALARS)
    return place.owner is before.owner or shared
