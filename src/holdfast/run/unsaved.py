"""What changes in a program's variables and is in no checkpoint: one line about it.

An average of the weights, a hidden state, a prefetched batch, a generator: what is not
tracked starts anew after a resume, without a word. So the variables that a loop can reach
by name are looked at twice: when the first body of a counted loop begins, and when the
inner loop ends or the first save comes, whichever is sooner. (Behind an inner loop come
evaluations, whose variables say nothing.) What changed in between is named at the first
save. Only fingerprints are kept from one look to the other.

A false alarm would teach people to ignore the line, so it errs towards silence. Not named:
plain numbers and texts; what can be reached from tracked objects, the box or the loaders, or
shares their memory; variables that each body assigns before it reads them; objects that
belong to installed packages and cannot be tracked; what was not there at the first look.
`holdfast rehearse` finds all of it, by doing it.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from types import CodeType, FrameType
from typing import Any, NamedTuple

import numpy as np

from holdfast.core.digest import fingerprint
from holdfast.core.frameworks import loaded_adapters
from holdfast.run.attributes import Attributes, shortened
from holdfast.run.callsite import Callsite, variables_of
from holdfast.run.console import Console
from holdfast.run.installed import is_installed
from holdfast.run.kept import (
    PLAIN,
    Kept,
    attributes_of,
    frameworks,
    is_strange,
    items_of,
    memory_of,
)
from holdfast.run.loop import Loop
from holdfast.run.randomness import libraries, owner_of
from holdfast.run.survey import digest_of
from holdfast.run.tracking import Tracked
from holdfast.run.uses import first_uses

SAMPLED_BYTES = 32 << 10
"""Of larger arrays only so much is read."""
_MAX_CHILDREN = 100  # of one container or module that are looked at
_MAX_OBJECTS = 10_000  # in the variables of one frame: some 20 ms
_MAX_DEPTH = 6
_BLOCKS = 16


class _Owner(NamedTuple):
    """What a program would track."""

    path: str
    kind: str
    identity: int


class _Value(NamedTuple):
    """An array or a generator: its owner, and a text that is equal where contents are."""

    owner: _Owner
    text: str


class _Variable(NamedTuple):
    identity: int
    blank: bool
    """It held nothing (None), or something that is saved."""
    values: dict[str, _Value]
    """By their paths."""


class _Watch(NamedTuple):
    """A frame, by the outermost loop of the run that it is in."""

    site: Callsite
    code: CodeType
    instruction: int
    variables: dict[str, _Variable]


class Unsaved:
    """Tells of what changes and is not saved, once in a process."""

    def __init__(self, tracked: Tracked, attributes: Attributes, late: Collection[str]) -> None:
        self._tracked = tracked
        self._attributes = attributes
        self._late = frozenset(late)
        self._watches: dict[int, _Watch] | None = {}
        """By the id of the frame. None: there was a second look."""
        self._step = 0
        """Of the first look."""
        self._places: set[str] = set()
        self._found: list[str] = []

    def began(self, loop: Loop, step: int, *, landed: bool) -> None:
        """A body of `loop` is about to run; cheap after the first."""
        if self._watches is None or loop.place in self._places or not loop.counted:
            return
        site = loop.site
        frame = None if site is None else site.frame(sys._getframe())
        if site is None or frame is None or (where := site.loop()) is None:
            return
        code, instruction = where
        known = self._watches.get(id(frame))
        if known is None or known.code is not code:
            known = _Watch(site, code, instruction, {})
        if landed:
            self._step = step
            self._places.add(loop.place)
            kept = self._kept()
            known = known._replace(variables=dict(self._look(frame, known, kept)))
        self._watches[id(frame)] = known

    def inner_ended(self, step: int) -> None:
        """The code behind an inner loop is about to run."""
        if self._watches and self._places and step > self._step:
            self._compare()

    def tell(self, state: Mapping[str, Any], console: Console, address: str) -> None:
        """At a save of `state`: what was not told yet."""
        if numbers := self._attributes.unsaved(loaded_adapters(), state):
            console.loud(
                f"{address}: these numbers change and are in no checkpoint: "
                f"{', '.join(numbers)}; keep them in run.box, a buffer or get_extra_state"
            )
        if self._watches is not None:
            self._compare()
        found, self._found = self._found, []
        if found:
            console.loud(
                f"{address}: changed since the loop began and in no checkpoint: "
                f"{', '.join(found)}; run.track(...) what a resume needs, or keep it in run.box"
            )

    def _kept(self) -> Kept:
        return Kept(*self._tracked.kept())

    def _compare(self) -> None:
        watches, self._watches = self._watches or {}, None
        kept = self._kept()
        if not kept.complete:
            return
        changed: dict[int, _Owner] = {}
        for watch in watches.values():
            frame = watch.site.frame(sys._getframe())
            if frame is None:
                continue  # its function has returned
            for name, now in self._look(frame, watch, kept):
                before = watch.variables.get(name)
                if before is None:
                    continue
                read = _first_uses(watch, frame).get(name) == "read"
                for owner in _changed(before, now, read):
                    changed.setdefault(owner.identity, owner)
        self._found = shortened([f"{owner.path} ({owner.kind})" for owner in changed.values()])

    def _look(self, frame: FrameType, watch: _Watch, kept: Kept) -> Iterator[tuple[str, _Variable]]:
        uses = _first_uses(watch, frame)
        own = variables_of(frame)
        visitor = _Visitor(kept)
        for name, value in ({**frame.f_globals, **own} if kept.complete else {}).items():
            skipped = name.startswith("__") or name in self._late
            if not skipped and uses.get(name) != "assigned":
                blank = value is None or value in kept
                yield name, _Variable(id(value), blank, visitor.visit(value, name))


def _first_uses(watch: _Watch, frame: FrameType) -> Mapping[str, str]:
    return first_uses(watch.code, watch.instruction, frame.f_lasti)


def _changed(before: _Variable, now: _Variable, read: bool) -> list[_Owner]:
    if not read and before.identity != now.identity:
        return []  # assigned by a function: scratch, or kept, nobody knows
    if read and before.blank and not before.values:
        return [value.owner for value in now.values.values()]
    return [
        value.owner
        for path, value in now.values.items()
        if path in before.values and before.values[path].text != value.text
    ]


class _Visitor:
    """Finds the arrays and generators that variables hold and that are not kept."""

    def __init__(self, kept: Kept) -> None:
        self._kept = kept
        self._frameworks = frameworks()
        self._libraries = libraries()
        self._samples: dict[int, tuple[str, str] | None] = {}
        self._objects_left = _MAX_OBJECTS

    def visit(self, value: Any, name: str) -> dict[str, _Value]:
        """All in the variable `name`, by path."""
        values, _ = self._visit(value, name, 0, set())
        return values

    def _visit(
        self, value: Any, path: str, depth: int, seen: set[int]
    ) -> tuple[dict[str, _Value], bool]:
        """What is in `value`, and whether there is something kept in it, too."""
        if type(value) in PLAIN or id(value) in seen or depth > _MAX_DEPTH:
            return {}, False
        if value in self._kept:
            return {}, True
        self._objects_left -= 1
        if self._objects_left < 0 or _root(type(value)) == "holdfast" or is_strange(value):
            return {}, False
        seen.add(id(value))
        owner = _Owner(path, type(value).__name__, id(value))
        if (library := owner_of(value, self._libraries)) is not None:
            if library.is_global(value):
                return {}, True
            if _root(type(value)) not in ("random", "numpy", "torch"):
                return {}, False  # a subclass: its methods are the program's
            owner = owner._replace(kind=f"random generator of {library.name}")
            return {path: _Value(owner, digest_of(library.read(value)))}, False
        if (memory := memory_of(value, self._frameworks)) is not None:
            if self._kept.shares(memory):
                return {}, True
            if (sample := self._sample(value)) is None:
                return {}, False
            return {path: _Value(owner._replace(kind=sample[0]), "".join(sample))}, False
        for framework in self._frameworks:
            if (state := framework.state(value)) is not None:
                found, _ = self._all(
                    _some([(f".{name}", v) for name, v in state.items()]), path, depth, seen
                )
                return _owned(found, owner), False
        if (items := items_of(value)) is not None:
            pairs = [(_index(number, key), item) for number, (key, item) in enumerate(items)]
            found, mixed = self._all(_some(pairs), path, depth, seen)
            return found if mixed else _owned(found, owner), mixed
        trackable = _has(type(value), "state_dict") and _has(type(value), "load_state_dict")
        if not trackable and is_installed(type(value).__module__):
            return {}, False
        pairs = [(f".{name}", item) for name, item in attributes_of(value).items()]
        found, mixed = self._all(pairs, path, depth, seen)
        # An object that cannot be tracked is named by what is in it and can.
        return _owned(found, owner) if trackable else found, mixed

    def _all(
        self, pairs: list[tuple[str, Any]], path: str, depth: int, seen: set[int]
    ) -> tuple[dict[str, _Value], bool]:
        found: dict[str, _Value] = {}
        mixed = False
        for where, item in pairs:
            values, has_kept = self._visit(item, f"{path}{where}", depth + 1, seen)
            found.update(values)
            mixed = mixed or has_kept
        return found, mixed

    def _sample(self, value: Any) -> tuple[str, str] | None:
        """Dtype and shape, and a digest of the elements or of some of them."""
        if id(value) not in self._samples:
            if isinstance(value, np.ndarray):
                found = _sample_of_array(value)
            else:
                found = next(
                    (s for one in self._frameworks if (s := one.sample(value, SAMPLED_BYTES))), None
                )
            digested = found and (found[0], fingerprint(found[1]).hex())
            self._samples[id(value)] = digested
        return self._samples[id(value)]


def _owned(found: dict[str, _Value], owner: _Owner) -> dict[str, _Value]:
    return {path: value._replace(owner=owner) for path, value in found.items()}


def _some(pairs: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    if len(pairs) <= _MAX_CHILDREN:
        return pairs
    last = len(pairs) - 1
    return [pairs[last * index // (_MAX_CHILDREN - 1)] for index in range(_MAX_CHILDREN)]


def _index(number: int, key: object) -> str:
    return f"[{key!r}]" if type(key) in (str, int) else f"[#{number}]"


def _sample_of_array(array: np.ndarray[Any, Any]) -> tuple[str, bytes] | None:
    """None for numbers (one element), objects, subclasses, and large arrays with gaps."""
    if type(array) is not np.ndarray or array.dtype.hasobject or array.size <= 1:
        return None
    words = f"{array.dtype}{list(array.shape)}"
    items = array.T if array.flags.f_contiguous else array
    if array.nbytes <= SAMPLED_BYTES:
        return words, items.tobytes()
    if not items.flags.c_contiguous:
        return None
    data = items.reshape(-1).view(np.uint8)
    size = SAMPLED_BYTES // _BLOCKS
    starts = [(data.nbytes - size) * index // (_BLOCKS - 1) for index in range(_BLOCKS)]
    return words, b"".join(data[start : start + size].tobytes() for start in starts)


def _root(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _has(kind: type, method: str) -> bool:
    return any(method in vars(base) for base in kind.__mro__)
