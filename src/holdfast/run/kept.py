"""What can be reached from the objects that a checkpoint holds, and from given loaders.

Neither this nor `unsaved` runs code of the program's: no `__getattr__`, no property, no
`state_dict`. What cannot be looked into without that is left alone.
"""

from __future__ import annotations

import types
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Iterable
from functools import partial
from typing import Any, Protocol, cast

import numpy as np

from holdfast.core.frameworks import loaded_adapters
from holdfast.run.callsite import variables_of
from holdfast.run.variables import Variables

MAX_ITEMS = 4096
"""Containers with more are data: looking into them would take too long."""
_MAX_OBJECTS = 30_000
"""Of tensors, that takes 0.2 s."""

PLAIN = frozenset({bool, int, float, complex, str, bytes, bytearray, type(None)})
_PLAIN_LOOKUP = frozenset({defaultdict, deque, partial})
"""They have a `__getattribute__` of their own, in C, that does what `object`'s does."""
_CLOSED = (type, types.ModuleType, types.CodeType, types.FrameType, np.generic)

Memory = tuple[str, int, int]
"""(device, first address, the one after the last)."""


class Contents(Protocol):
    """What a framework's adapter says about its objects (`adapter.contents`)."""

    def parts(self, value: object) -> list[Any] | None: ...

    def state(self, value: object) -> dict[str, Any] | None: ...

    def memory(self, value: object) -> Memory | None: ...

    def sample(self, value: object, nbytes: int) -> tuple[str, bytes] | None: ...


def frameworks() -> list[Contents]:
    """Of those that this process has imported."""
    found = (getattr(adapter, "contents", None) for adapter in loaded_adapters())
    return [cast(Contents, contents) for contents in found if contents is not None]


class Kept:
    """Objects by identity, and their memory. Keeps them alive: let go of it soon."""

    def __init__(self, tracked: Iterable[object], loaders: Iterable[object]) -> None:
        self._frameworks = frameworks()
        self._known: dict[int, object] = {}
        self._found: set[Memory] = set()
        self.complete = self._reach(tracked)
        """Whether all was seen. Data are vast, and seldom held by variables elsewhere: that
        not all of them were seen does not count."""
        self._reach(loaders)
        self._ranges = _joined(self._found)

    def __contains__(self, value: object) -> bool:
        return id(value) in self._known

    def shares(self, memory: Memory) -> bool:
        """Whether kept objects have some of this memory."""
        device, start, end = memory
        ranges = self._ranges.get(device, [])
        before = bisect_left(ranges, (end, 0))  # so many start in front of our end
        return before > 0 and start < ranges[before - 1][1]

    def _reach(self, roots: Iterable[object]) -> bool:
        waiting = deque(roots)
        limit = len(self._known) + _MAX_OBJECTS
        while waiting:
            value = waiting.popleft()
            if type(value) in PLAIN or id(value) in self._known:
                continue
            if len(self._known) >= limit:
                return False
            self._known[id(value)] = value
            waiting.extend(self._inside(value))
        return True

    def _inside(self, value: Any) -> Iterable[object]:
        if is_strange(value) or isinstance(value, _CLOSED):
            return ()
        if (memory := memory_of(value, self._frameworks)) is not None:
            self._found.add(memory)
        for framework in self._frameworks:
            if (parts := framework.parts(value)) is not None:
                return parts
        if isinstance(value, Variables):
            return list(value.state_dict().values())  # and not all of their namespace
        if (items := items_of(value)) is not None:
            return [item for _, item in items]
        if isinstance(value, set | frozenset):
            return list(value) if len(value) <= MAX_ITEMS else ()
        return [*_of_code(value), *attributes_of(value).values()]


def _joined(found: Iterable[Memory]) -> dict[str, list[tuple[int, int]]]:
    """By device, sorted and without overlaps."""
    ranges: dict[str, list[tuple[int, int]]] = {}
    for device, start, end in sorted(found):
        known = ranges.setdefault(device, [])
        if known and start < known[-1][1]:
            known[-1] = known[-1][0], max(end, known[-1][1])
        else:
            known.append((start, end))
    return ranges


def memory_of(value: object, known: Iterable[Contents]) -> Memory | None:
    """Of the whole buffer that an array or a framework's tensor is in."""
    if isinstance(value, np.ndarray):
        array = value
        while isinstance(array.base, np.ndarray):
            array = array.base
        start = array.__array_interface__["data"][0]
        return "cpu", start, start + array.nbytes
    return next((m for one in known if (m := one.memory(value)) is not None), None)


def items_of(value: object) -> list[tuple[object, Any]] | None:
    """Keys or indices, and items, of a container with an order; empty for a large one.
    None for anything else."""
    if isinstance(value, dict):
        return list(dict.items(value)) if dict.__len__(value) <= MAX_ITEMS else []
    kinds: tuple[Any, ...] = (list, tuple, deque)
    for kind in kinds:  # its own methods: a subclass may have others
        if isinstance(value, kind):
            small = kind.__len__(value) <= MAX_ITEMS
            return list(enumerate(list(kind.__iter__(value)))) if small else []
    return None


def attributes_of(value: object) -> dict[str, Any]:
    """The attributes that an object holds itself."""
    found: dict[str, Any] = {}
    for base in type(value).__mro__:
        own = vars(base).get("__dict__")
        if isinstance(own, types.GetSetDescriptorType):
            found.update(own.__get__(value))
        slots = list(vars(base).items()) if "__slots__" in vars(base) else []
        for name, slot in slots:
            if isinstance(slot, types.MemberDescriptorType):
                try:
                    found[name] = slot.__get__(value)
                except AttributeError:
                    pass  # nothing was assigned yet
    return found


def is_strange(value: object) -> bool:
    """Whether to ask what an object is could run code: a proxy, a mock."""
    return any(
        "__class__" in vars(base) or "__getattribute__" in vars(base)
        for base in type(value).__mro__
        if base.__module__ not in ("builtins", "types") and base not in _PLAIN_LOOKUP
    )


def _of_code(value: Any) -> list[object]:
    """What functions, and generators in progress, hold."""
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, types.MethodType | types.BuiltinMethodType):
        return [value.__self__]
    if isinstance(value, types.FunctionType):
        return [value.__closure__, value.__defaults__, value.__kwdefaults__]
    if isinstance(value, types.GeneratorType) and value.gi_frame is not None:
        return list(variables_of(value.gi_frame).values())
    if isinstance(value, types.CellType):
        try:
            return [value.cell_contents]
        except ValueError:
            return []  # a name that is bound later
    return []
