"""Looking into a manifest's tree without decoding it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from holdfast.core.types import Node
from holdfast.core.values import MAX_DEPTH, malformed

_MAPPINGS = frozenset({"dict", "odict", "defaultdict", "counter"})
_FILES = frozenset({"file", "dir"})
# A level of a state takes up to three in its JSON: the node, its pairs, a pair.
_DEEPEST = 3 * MAX_DEPTH + 8


def mapping_pairs(node: Node) -> list[tuple[Node, Node]] | None:
    """(key node, value node) of a dict, or of an object that was saved as one.

    None for every other node. Raises DamagedObject for a malformed one.

    >>> mapping_pairs({"!": "object", "type": "m:C", "v": {"!": "dict", "v": [["a", 1]]}})
    [('a', 1)]
    """
    if not isinstance(node, dict):
        return None
    tagged = cast(dict[str, Any], node)
    inner = tagged.get("v")
    if tagged.get("!") not in _MAPPINGS:
        return mapping_pairs(inner) if isinstance(inner, dict) else None
    if not isinstance(inner, list):
        raise malformed("", "a dict has no pairs")
    pairs: list[tuple[Node, Node]] = []
    for pair in cast(list[Any], inner):
        if not isinstance(pair, list) or len(cast(list[Any], pair)) != 2:
            raise malformed("", "a dict has a malformed pair")
        pairs.append((pair[0], pair[1]))
    return pairs


def file_nodes(node: Node, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Node]]:
    """Every file and folder in a tree, with the keys that lead to it, as text."""
    if isinstance(node, list):
        for index, item in enumerate(cast(list[Any], node)):
            yield from file_nodes(item, (*path, str(index)))
        return
    if not isinstance(node, dict):
        return
    if cast(dict[str, Any], node).get("!") in _FILES:
        yield path, node
        return
    pairs = mapping_pairs(node)
    if pairs is not None:
        for key, value in pairs:
            yield from file_nodes(value, (*path, key if isinstance(key, str) else repr(key)))
        return
    yield from file_nodes(cast(dict[str, Any], node).get("v"), path)


def leaf_indexes(tree: Node) -> Iterator[int]:
    """The leaves that a tree refers to. Raises DamagedObject if it is nested too deeply
    for the other functions here, which recurse."""
    level: list[Any] = [tree]
    for _ in range(_DEEPEST):
        below: list[Any] = []
        for node in level:
            if isinstance(node, list):
                below.extend(cast(list[Any], node))
            elif isinstance(node, dict):
                for key, value in cast(dict[str, Any], node).items():
                    if key == "leaf" and type(value) is int:
                        yield value
                    else:
                        below.append(value)
        if not below:
            return
        level = below
    raise malformed("", "it is nested too deeply")
