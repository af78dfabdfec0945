"""Generator objects that code holds: in attributes, small containers, closures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from types import (
    BuiltinMethodType,
    CellType,
    FunctionType,
    GeneratorType,
    MethodType,
    ModuleType,
)
from typing import Any

from holdfast.run.randomness import Library, owner_of

MAX_DEPTH = 8
MAX_CHILDREN = 64  # a container with more is data: looking into it would take seconds
MAX_OBJECTS = 20_000  # about 20 ms


def find_generators(
    root: object,
    known: Iterable[Library],
    *,
    closed: Callable[[str, object], bool] = lambda name, value: False,
) -> list[tuple[Library, Any]]:
    """Generator objects of the `known` libraries that are reachable from `root` through
    attributes, small containers, closures, partials and the variables of a Python generator;
    each once, in a fixed order. Attributes for which `closed` holds are not entered."""
    libraries = tuple(known)
    found: list[tuple[Library, Any]] = []
    seen: set[int] = set()

    def visit(value: object, depth: int) -> None:
        if id(value) in seen or depth > MAX_DEPTH or isinstance(value, _LEAVES):
            return
        if len(seen) >= MAX_OBJECTS:
            return
        seen.add(id(value))
        library = owner_of(value, libraries)
        if library is not None:
            found.append((library, value))
            return
        if any(one.array(value) is not None for one in libraries):
            return
        for child in _children(value, closed):
            visit(child, depth + 1)

    visit(root, 0)
    return found


_LEAVES = (str, bytes, int, float, complex, type(None), type)


def small_items(value: Any) -> list[tuple[str, Any]] | None:
    """What a small container holds, by words for where; None for anything else."""
    if not isinstance(value, dict | list | tuple) or len(value) > MAX_CHILDREN:
        return None
    # A list at once: another thread may be at work on it.
    pairs = list(value.items()) if isinstance(value, dict) else enumerate(value)
    return [(f"[{key!r}]", item) for key, item in pairs]


def _children(value: Any, closed: Callable[[str, object], bool]) -> Iterable[object]:
    if isinstance(value, dict | list | tuple):
        return [item for _, item in small_items(value) or ()]
    children: list[object] = []
    if isinstance(value, partial):
        children += [value.func, value.args, value.keywords]
    if isinstance(value, MethodType | BuiltinMethodType):
        children.append(value.__self__)
    if isinstance(value, FunctionType):
        children += [value.__closure__ or (), value.__defaults__ or (), value.__kwdefaults__ or {}]
    if isinstance(value, GeneratorType) and value.gi_frame is not None:
        children.append(dict(value.gi_frame.f_locals))
    if isinstance(value, CellType):
        try:
            children.append(value.cell_contents)
        except ValueError:
            pass  # a name that is bound later
    own = getattr(value, "__dict__", None)
    if isinstance(own, dict) and not isinstance(value, ModuleType):
        children.extend(item for name, item in list(own.items()) if not closed(name, item))
    return children
