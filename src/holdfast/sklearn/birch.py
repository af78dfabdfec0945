"""The leaves of a `Birch` tree, which name each other in both directions.

{"!": "sklearn.leaves", "v": [node, ...]}     from the first on; it stands for the first
"""

from __future__ import annotations

from typing import Any

from holdfast.core.adapters import NOTHING, Decoder, Encoder
from holdfast.core.types import Node
from holdfast.core.values import malformed

LINKS = ("prev_leaf_", "next_leaf_")
"""Attributes of its nodes that are not saved with them."""


def is_node(kind: type) -> bool:
    return kind.__qualname__ == "_CFNode" and kind.__module__.startswith("sklearn.")


def encode_leaves(first: Any, path: str, encoder: Encoder) -> Node:
    nodes: list[Node] = []
    leaf = first
    while leaf is not None:
        nodes.append(encoder.encode(leaf, f"{path}/{len(nodes)}"))
        leaf = leaf.next_leaf_
    return {"!": "sklearn.leaves", "v": nodes}


def decode_leaves(node: dict[str, Node], target: object, path: str, decoder: Decoder) -> Any:
    """The first leaf; all are linked again once they are filled in."""
    nodes = node.get("v")
    if not isinstance(nodes, list) or not nodes:
        raise malformed(path, "its leaves are malformed")
    leaves = [decoder.decode(one, NOTHING, f"{path}/{number}") for number, one in enumerate(nodes)]
    if not all(is_node(type(leaf)) for leaf in leaves) or len({*map(id, leaves)}) < len(leaves):
        raise malformed(path, "its leaves are malformed")

    def link() -> None:
        for before, leaf in zip([None, *leaves], [*leaves, None], strict=True):
            if before is not None:
                before.next_leaf_ = leaf
            if leaf is not None:
                leaf.prev_leaf_ = before

    decoder.finish(link)
    return leaves[0]
