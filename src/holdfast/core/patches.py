"""The differences between two nodes: what makes one of the other.

Ranks save nearly the same tree, so that a manifest has one whole and of the others what is
different in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import copysign
from typing import Any, cast

from holdfast.core.records import Change
from holdfast.core.types import Node
from holdfast.core.values import MAX_DEPTH

# A node is a few lists and objects deep for each container.
_MOST_STEPS = 6 * MAX_DEPTH


def differences(node: Node, other: Node) -> tuple[Change, ...]:
    """What to change in `node` so that it is `other`.

    >>> differences({"a": [1, 2], "b": 3}, {"a": [1, 5], "b": 3})
    (Change(path=('a', 1), node=5),)
    """
    return tuple(_differences(node, other, ()))


def _differences(node: Node, other: Node, path: tuple[int | str, ...]) -> Iterator[Change]:
    if isinstance(node, list) and isinstance(other, list):
        items, others = cast(list[Node], node), cast(list[Node], other)
        if len(items) == len(others):
            for number, (one, two) in enumerate(zip(items, others, strict=True)):
                yield from _differences(one, two, (*path, number))
            return
    elif isinstance(node, dict) and isinstance(other, dict):
        fields, wanted = cast(dict[str, Node], node), cast(dict[str, Node], other)
        if list(fields) == list(wanted):
            for name, one in fields.items():
                yield from _differences(one, wanted[name], (*path, name))
            return
    elif _same(node, other):
        return
    yield Change(path, other)


def _same(one: Any, other: Any) -> bool:
    # 1, 1.0 and True are equal, and so are 0.0 and -0.0: not here.
    if type(one) is not type(other) or one != other:
        return False
    return type(one) is not float or copysign(1.0, one) == copysign(1.0, other)


def patched(node: Node, changes: Iterable[Change]) -> Node:
    """`node` with the changes; it stays as it is, and what does not change is shared.
    Raises ValueError for a place that is not there.

    >>> patched({"a": [1, 2], "b": 3}, differences({"a": [1, 2], "b": 3}, {"a": [1, 5], "b": 3}))
    {'a': [1, 5], 'b': 3}
    """
    fresh: dict[int, Any] = {}
    for change in changes:
        if len(change.path) > _MOST_STEPS:
            raise ValueError("a path is too long")
        node = _put(node, change.path, change.node, fresh)
    return node


def _put(node: Node, path: tuple[int | str, ...], value: Node, fresh: dict[int, Any]) -> Node:
    """Containers that were copied already, by an earlier change, are in `fresh`."""
    if not path:
        return value
    root = current = _copied(node, fresh)
    for step in path[:-1]:
        inner = _copied(_item(current, step), fresh)
        current[step] = inner
        current = inner
    _item(current, path[-1])
    current[path[-1]] = value
    return root


def _item(container: Any, step: int | str) -> Any:
    try:
        if isinstance(container, dict) and isinstance(step, str):
            return cast(dict[str, Node], container)[step]
        if isinstance(container, list) and isinstance(step, int) and step >= 0:
            return cast(list[Node], container)[step]
    except LookupError:
        pass
    raise ValueError(f"there is no {step!r} there")


def _copied(node: Node, fresh: dict[int, Any]) -> Any:
    if id(node) in fresh:
        return node
    if isinstance(node, list):
        copy: Any = list(cast(list[Node], node))
    elif isinstance(node, dict):
        copy = dict(cast(dict[str, Node], node))
    else:
        raise ValueError("it goes into what holds nothing")
    fresh[id(copy)] = copy  # kept, so that no other gets its id
    return copy
