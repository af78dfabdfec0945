"""Objects found again by the variables of the program.

A process that goes on runs the same code, so what the variable `loader` reaches by
`.sampler.rng` is the same object there. A path is that, as plain data:
`["loader", ["attribute", "sampler"], ["attribute", "rng"]]`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from types import BuiltinFunctionType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any

from holdfast.run.callsite import variables_of
from holdfast.run.search import small_items

Path = list[Any]

MAX_DEPTH = 6
MAX_OBJECTS = 10_000  # about 10 ms

_CLOSED = (
    *(str, bytes, int, float, complex, type(None), type, ModuleType, FrameType),
    *(FunctionType, BuiltinFunctionType, MethodType),
)


def variables(frame: FrameType) -> dict[str, Any]:
    """What code in `frame` can name."""
    names = {**frame.f_globals, **variables_of(frame)}
    return {name: value for name, value in names.items() if not name.startswith("__")}


def find_paths(scope: Mapping[str, Any], wanted: Iterable[object]) -> dict[int, Path]:
    """Paths from the variables in `scope` to the objects `wanted`, by their ids: for each
    the shortest, through attributes and small containers. Not all have one."""
    missing = {id(one) for one in wanted}
    found: dict[int, Path] = {}
    seen: set[int] = set()
    queue: deque[tuple[Any, Path]] = deque((value, [name]) for name, value in scope.items())
    while queue and missing and len(seen) < MAX_OBJECTS:
        value, path = queue.popleft()
        if id(value) in seen or issubclass(type(value), _CLOSED):
            continue
        seen.add(id(value))
        if id(value) in missing:
            missing.discard(id(value))
            found[id(value)] = path
        if len(path) > MAX_DEPTH or type(value).__module__.split(".")[0] == "holdfast":
            continue
        queue += [(child, [*path, step]) for step, child in _children(value)]
    return found


def follow(scope: Mapping[str, Any], path: Path) -> Any:
    """The object at `path`; None if there is none now."""
    value = scope.get(path[0])
    for kind, key in path[1:]:
        if kind == "attribute":
            value = _attributes(value).get(key)
        else:
            value = next((one for (_, k), one in _items(value) if k == key), None)
    return value


def _attributes(value: Any) -> dict[str, Any]:
    own = getattr(value, "__dict__", None)
    return own if isinstance(own, dict) else {}


def _children(value: Any) -> list[tuple[list[Any], Any]]:
    attributes = [(["attribute", name], child) for name, child in list(_attributes(value).items())]
    return [*_items(value), *attributes]


def _items(value: Any) -> list[tuple[list[Any], Any]]:
    if small_items(value) is None:
        return []
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return [(["item", key], child) for key, child in pairs if isinstance(key, str | int)]
