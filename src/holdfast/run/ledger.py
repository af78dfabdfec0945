"""The objects in which loaders keep state, each with one value.

A generator, a sampler, a dataset outlive the loop in which they are used: the next loop
over the same loader, or over another that shares them, goes on with what they have become.
Where that loop is elsewhere in the program (a second phase), a new process comes there
without having met the first. So these objects are saved like tracked ones, under the paths
by which the variables around their loops reach them (see `scopes`). On the way back, where
such a loop is met again, they are found by these paths and get their last value, and once
more at each loop up to the one where the run goes on: code in between may draw from them.

What has no such path (it is built in the loop's body, or hidden in a closure) is brought
back where its own loop opens again, by its feed.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol
from weakref import WeakSet

from holdfast.run.randomness import libraries, owner_of
from holdfast.run.readahead import Origin
from holdfast.run.scopes import Path, find_paths, follow, variables
from holdfast.run.values import SCALARS, Key, Place, assign, built_as, digest_of


class Holder(Protocol):
    """What the ledger asks of a `Held`."""

    touched: bool
    """It began or went on with an epoch, so that its objects are up to date."""

    def places(self) -> dict[str, Place]: ...

    def built(self, path: str) -> str | None: ...

    def __hash__(self) -> int: ...


@dataclass
class _Row:
    place: Place
    built: str
    paths: dict[str, Path] = field(default_factory=dict)
    """By the place of the loop in whose frame they start."""
    bound: bool = False
    """Found by a path, so a variable of the program holds it."""

    def now(self) -> Place:
        """The place with its value of now."""
        if self.place.library is not None:
            return self.place
        return replace(self.place, value=vars(self.place.owner).get(self.place.name))


@dataclass(frozen=True)
class _Scope:
    origin: Origin
    bound: dict[str, int]
    """What each variable was bound to when the loop started, by id. One that the body
    binds is bound to something else, or nothing, where a new process meets the loop."""


class Ledger:
    """Of one run in one process."""

    def __init__(self) -> None:
        self.passing = False
        self._rows: dict[Key, _Row] = {}
        self._scopes: dict[str, _Scope] = {}
        self._saved: list[dict[str, Any]] = []
        self._again: dict[Key, dict[str, Any]] = {}
        self._refused: dict[Key, tuple[Place, str]] = {}
        """Generators that were found, but built otherwise, and a loop that drew from them."""
        self._loaders: dict[str, dict[str, Path]] = {}
        """Paths to loaders that are themselves at a place, by the place of their loop."""
        self._holders: WeakSet[Holder] = WeakSet()

    def restore(self, saved: Iterable[dict[str, Any]]) -> None:
        """Go on from what `state` returned."""
        self._saved = list(saved)

    def join(self, holder: Holder) -> None:
        self._holders.add(holder)

    # -- what others have done -----------------------------------------------------

    def known(self, besides: Holder) -> dict[Key, str | None]:
        """Objects that are up to date because of others than the holder `besides`, and
        what they were as built."""
        found: dict[Key, str | None] = {}
        for one in self._holders:
            if one is not besides and one.touched:
                found |= {place.key: one.built(path) for path, place in one.places().items()}
        return found | {key: row.built for key, row in self._rows.items()}

    def explains(self, built: str) -> bool:
        """Whether an object was found that was built with this value."""
        return any(row.built == built for row in self._rows.values())

    def refused(self, place: Place) -> str:
        """The loop that drew from this generator, if its value was not put back; else ""."""
        return self._refused.get(place.key, (place, ""))[1]

    # -- loops ---------------------------------------------------------------------

    def opened(self, place: str, origin: Origin | None) -> None:
        """A loop starts. What another one at this place reached may be something else."""
        for key, row in list(self._rows.items()):
            _forget(row.paths, place)
            if not row.paths:
                del self._rows[key]
        for paths in self._loaders.values():
            _forget(paths, place)
        self._enter(place, origin)

    def met(self, place: str, origin: Origin | None) -> list[tuple[str, Any]]:
        """A loop of the checkpoint is met on the way back: what its variables reach gets
        its last value, unless the program has built it otherwise. Returns loaders that
        are themselves at a place, with those of their loops."""
        self._put_again()
        scope = self._enter(place, origin)
        loaders: list[tuple[str, Any]] = []
        for saved in [row for row in self._saved if place in row["paths"]]:
            target = follow(scope, saved["paths"][place])
            if target is None:
                continue
            if "loader" in saved:
                loaders.append((saved["loader"], target))
                self._loaders.setdefault(saved["loader"], dict(saved["paths"]))
            elif self._bind(saved, target):
                self._saved.remove(saved)
        return loaders

    def land(self) -> None:
        """The way back ends: where its last loop was met, all objects were given their
        values, and if that loop goes on inside an epoch, its feed has then set its own."""
        self._again.clear()
        self._saved.clear()

    @contextmanager
    def passed(self) -> Iterator[None]:
        """Inside, feeds are told where they were at the save, not where an epoch ended."""
        self.passing = True
        try:
            yield
        finally:
            self.passing = False

    def _enter(self, place: str, origin: Origin | None) -> dict[str, Any]:
        self._scopes.pop(place, None)
        around = [one for one in self._scopes if place.startswith(f"{one}/")]
        if around and place.rpartition("/")[2].startswith("batches"):
            return {}  # what it reaches, those around it nearly always reach too
        frame = None if origin is None else origin.frame(sys._getframe())
        if origin is None or frame is None:
            return {}
        scope = variables(frame)
        self._scopes[place] = _Scope(origin, {name: id(one) for name, one in scope.items()})
        return scope

    # -- objects -------------------------------------------------------------------

    def note(self, place: str, holders: Iterable[Holder], loaders: Iterable[object]) -> None:
        """A loop at `place` has loaders that no loop had: look how their objects are
        reached from the loops around it, or from itself if there is none around, and
        `loaders`, the one that is itself at a place."""
        found = {
            one.key: _Row(one, holder.built(path) or "")
            for holder in holders
            for path, one in holder.places().items()
        }
        targets = {key: _target(row.place) for key, row in found.items()}
        for around, scope in self._scopes.items():
            if not f"{place}/".startswith(f"{around}/"):
                continue
            frame = scope.origin.frame(sys._getframe())
            if frame is None:
                continue
            fixed = {
                name: one
                for name, one in variables(frame).items()
                if scope.bound.get(name) == id(one)
            }
            paths = find_paths(fixed, [*targets.values(), *loaders])
            for loader in loaders:
                if id(loader) in paths:
                    self._loaders.setdefault(place, {})[around] = paths[id(loader)]
            for key, target in targets.items():
                if id(target) in paths:
                    row = self._rows.setdefault(key, found[key])
                    row.paths[around] = paths[id(target)]

    def release(self, place: str, holders: Iterable[Holder]) -> None:
        """The loop at `place` has another loader; these are not used any more. What nobody
        else holds is not kept alive."""
        self._loaders.pop(place, None)
        gone = set(holders)
        mine = {one.key for holder in gone for one in holder.places().values()}
        others = [holder for holder in self._holders if holder not in gone]
        kept = {one.key for holder in others for one in holder.places().values()}
        for key in mine - kept:
            if key in self._rows and not self._rows[key].bound:
                del self._rows[key]

    def state(self, inside: Iterable[Holder]) -> list[dict[str, Any]]:
        """A plain tree for `restore`. `inside`: holders of an epoch in progress where the
        run is to go on; their feed saves more than a value."""
        theirs = {place.key for one in inside for place in one.places().values()}
        rows = [_saved(row) for key, row in self._rows.items() if key not in theirs]
        loaders = [
            {"loader": place, "paths": dict(paths)}
            for place, paths in self._loaders.items()
            if paths
        ]
        return [*(row for row in rows if row is not None), *loaders]

    def _bind(self, saved: dict[str, Any], target: Any) -> bool:
        place = _place(saved, target)
        if place is None or place.key in self._rows:
            return False
        now = digest_of(place)
        if place.library is None:
            if now not in (saved["built"], saved["now"]):
                return False
            if now != saved["now"]:
                assign(place, copy.deepcopy(saved["value"]))
        else:
            # Built with another seed, the program was edited. Unless nobody chose it:
            # then it is another one in each process.
            as_saved = now == saved["now"] or built_as(place, now) == saved["built"]
            if not as_saved and place.library.seeded(target):
                self._refused[place.key] = (place, next(iter(saved["paths"])))
                return False
            place.library.write(target, saved["state"])
        self._again[place.key] = saved
        self._rows[place.key] = _Row(place, saved["built"], dict(saved["paths"]), bound=True)
        return True

    def _put_again(self) -> None:
        for key, saved in self._again.items():
            place = self._rows[key].now()
            if place.library is not None:
                place.library.write(place.value, saved["state"])
            elif digest_of(place) != saved["now"]:
                assign(place, copy.deepcopy(saved["value"]))


def _forget(paths: dict[str, Path], place: str) -> None:
    for one in [one for one in paths if f"{one}/".startswith(f"{place}/")]:
        del paths[one]


def _target(place: Place) -> Any:
    return place.owner if place.library is None else place.value


def _place(saved: dict[str, Any], target: Any) -> Place | None:
    library = owner_of(target, libraries())
    if saved["library"] is not None:
        if library is None or library.name != saved["library"]:
            return None
        return Place(None, "", target, library)
    own = getattr(target, "__dict__", {})
    name = saved["attribute"]
    return Place(target, name, own[name], None) if library is None and name in own else None


def _saved(row: _Row) -> dict[str, Any] | None:
    place = row.now()
    now = digest_of(place)
    if now is None or (place.library is None and now == row.built):
        return None
    entry: dict[str, Any] = {
        "paths": dict(row.paths),
        "attribute": place.name if place.library is None else "",
        "library": None,
        "now": now,
        "built": row.built,
    }
    if place.library is None:
        value = place.value
        return {**entry, "value": value if isinstance(value, SCALARS) else copy.deepcopy(value)}
    return {**entry, "library": place.library.name, "state": place.library.read(place.value)}
