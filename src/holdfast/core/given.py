"""Values whose nodes are known already, while nobody has made the values themselves.

What comes from a file of another make is saved through these: a tensor of a framework that
is not imported, with its bytes still in that file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.core.adapters import Encoder, LeafSource
from holdfast.core.types import Node


@dataclass(frozen=True, eq=False)
class GivenLeaf:
    """A node that gets one leaf. Where the same one occurs again, it names the same leaf."""

    node: Mapping[str, Node]
    source: LeafSource


@dataclass(frozen=True, eq=False)
class GivenNode:
    """A node around the one of `content`, which becomes its "v"."""

    node: Mapping[str, Node]
    content: object


def _leaf(encoder: Encoder, value: GivenLeaf, path: str) -> Node:
    known = encoder.alias(GivenLeaf, None)
    memo = known.setdefault("leaves", {})
    leaf = memo.get(value)
    if leaf is None:
        leaf = memo[value] = encoder.leaf(value.source, path)
    return {**value.node, "leaf": leaf}


def _node(encoder: Encoder, value: GivenNode, path: str) -> Node:
    return {**value.node, "v": encoder.encode(value.content, path)}


NODES: dict[type, Callable[[Any, Any, str], Node]] = {GivenLeaf: _leaf, GivenNode: _node}
"""For the encoder: which function for which type."""
