"""One tree, encoded by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from holdfast.core.encode import CapturedLeaf, TreeEncoder
from holdfast.core.types import Node


@dataclass(frozen=True)
class Captured:
    """One encoded tree."""

    tree: Node
    leaves: list[CapturedLeaf]
    pickled: bool


def capture(
    state: Mapping[str, object], *, allow_pickle: bool = False, prefix: str = ""
) -> Captured:
    """Encode a whole state. Raises UnsupportedValue or StateError with the path.

    >>> capture({"step": 3, "name": "a"}).tree
    {'!': 'dict', 'v': [['step', 3], ['name', 'a']]}
    """
    encoder = TreeEncoder(allow_pickle=allow_pickle)
    try:
        tree = encoder.encode(dict(state), prefix)
    except BaseException:
        encoder.close()
        raise
    return Captured(tree, encoder.leaves, encoder.pickled)
