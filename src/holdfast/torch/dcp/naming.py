"""Names that DCP gives to what is in a state, and where they are in a manifest's tree.

DCP takes a state apart: dicts, and lists that hold tensors or dicts. What is left are tensors
and values, and each is called by its keys, joined with points (`model.layers.0.weight`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from holdfast.core.address import AtStep, Selector, parse_selector
from holdfast.core.types import Node
from holdfast.core.values import MAX_DEPTH
from holdfast.manager.nodes import mapping_pairs
from holdfast.torch.dcp.shares import Path

_STEP = re.compile(r"(?:.*(?:step|iter|[-_=/]))?(\d{1,18})", re.IGNORECASE)


@dataclass(frozen=True)
class Named:
    """A value of a state."""

    path: Path
    node: Node
    is_tensor: bool

    @property
    def name(self) -> str:
        return ".".join(map(str, self.path))


def named(tree: Node) -> Iterator[Named]:
    """What DCP would call the parts of a state that was saved in any way."""
    yield from _Walk(tree).below(tree, (), MAX_DEPTH)


class _Walk:
    def __init__(self, tree: Node) -> None:
        self._tensors: dict[int, Node] = {}
        pending: list[Any] = [tree]
        while pending:
            node = pending.pop()
            if isinstance(node, list):
                pending += cast(list[Any], node)
            elif isinstance(node, dict):
                tagged = cast(dict[str, Any], node)
                if _is_tensor(node) and type(tagged.get("id")) is int:
                    self._tensors[tagged["id"]] = tagged
                pending += tagged.values()

    def below(self, node: Node, path: Path, depth: int) -> Iterator[Named]:
        node = self._meant(node)
        if depth and (pairs := _pairs(node)) is not None:
            for key, item in pairs:
                yield from self.below(item, (*path, str(key)), depth - 1)
        elif depth and isinstance(node, list) and self._is_taken_apart(node, depth):
            for index, item in enumerate(_items(node)):
                yield from self.below(item, (*path, index), depth - 1)
        else:
            yield Named(path, node, _is_tensor(node))

    def _is_taken_apart(self, node: Node, depth: int) -> bool:
        if not depth or not isinstance(node, list):
            return False
        for item in map(self._meant, _items(node)):
            if (
                _is_tensor(item)
                or _pairs(item) is not None
                or self._is_taken_apart(item, depth - 1)
            ):
                return True
        return False

    def _meant(self, node: Node) -> Node:
        """The tensor that a reference stands for (tied weights). Other references are values:
        to follow those would take for ever in a tree that was made for it."""
        tagged = cast(dict[str, Any], node) if isinstance(node, dict) else {}
        return self._tensors.get(tagged.get("v", 0), node) if tagged.get("!") == "ref" else node


def _items(node: Any) -> list[Any]:
    items = cast(list[Any], node)
    marker = items[0] if items else None
    marked = isinstance(marker, dict) and cast(dict[str, Any], marker).get("!") == "id"
    return items[1:] if marked else items


def _pairs(node: Node) -> list[tuple[Node, Node]] | None:
    """Of a dict, or of an object that was saved as one, if its keys are texts and numbers."""
    pairs = mapping_pairs(node)
    if pairs is not None and all(type(key) in (str, int) for key, _ in pairs):
        return pairs
    return None


def _is_tensor(node: Node) -> bool:
    return (
        isinstance(node, dict) and node.get("!") == "torch.tensor" and type(node.get("leaf")) is int
    )


def selector_of(checkpoint_id: object) -> Selector:
    """The checkpoint that DCP's `checkpoint_id` means: a number, alone or after `step`, `iter` or
    one of `-_=/`, is a step; of anything else the last part is what can follow an `@`. Raises
    BadAddress.

    >>> selector_of(1000), selector_of("outputs/checkpoint/step-1000"), selector_of("best:loss")
    (AtStep(step=1000), AtStep(step=1000), BestBy(metric='loss', mode=None))
    """
    text = checkpoint_id if isinstance(checkpoint_id, int) else str(checkpoint_id).rstrip("/")
    if isinstance(text, str) and (match := _STEP.fullmatch(text)):
        return AtStep(int(match[1]))
    if isinstance(text, str) and not text.startswith("best:"):  # a metric may have slashes
        text = text.rpartition("/")[2]
    return parse_selector(text)
