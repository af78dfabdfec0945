"""A manifest's tree as plain text and plain JSON, without decoding a value of it.

Nothing is imported or built from what a tree names, so that `show` is safe on a
checkpoint from anywhere.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.core.codecs import decoded_nbytes
from holdfast.core.records import Leaf, Manifest
from holdfast.core.types import Node
from holdfast.repo.check import leaf_nbytes

_DEPTH = 60
_TEXT = 200
_ITEMS = 8
"""Of a list on one line."""


@dataclass(frozen=True)
class Part:
    """One top-level name of the state."""

    name: str
    leaves: int
    nbytes: int
    dtypes: tuple[str, ...]
    value: Any
    """The plain value of a part without leaves."""


def new_and_compressed(manifest: Manifest) -> tuple[int, bool]:
    """(bytes of the chunks that were written for this checkpoint, before they were
    compressed; whether any was)."""
    packs = enumerate(manifest.packs)
    own = {index for index, pack in packs if pack.born == manifest.ordinal and not pack.run}
    nbytes, compressed = 0, False
    for leaf in manifest.leaves:
        for chunk in leaf.chunks:
            if chunk.pack in own:
                nbytes += decoded_nbytes(leaf, chunk)
                compressed = compressed or bool(chunk.codec)
    return nbytes, compressed


def parts(manifest: Manifest) -> list[Part]:
    """The state by top-level name, in its own order. A tied leaf counts where it is first."""
    counted: set[int] = set()
    found: list[Part] = []
    for key, node in _items(manifest.tree):
        own = [i for i in _leaf_indexes(node) if 0 <= i < len(manifest.leaves)]
        leaves = [manifest.leaves[i] for i in dict.fromkeys(own) if i not in counted]
        counted.update(own)
        found.append(
            Part(
                name=_key(key),
                leaves=len(leaves),
                nbytes=sum(map(leaf_nbytes, leaves)),
                dtypes=tuple(sorted({leaf.dtype for leaf in leaves})),
                value=None if own else plain(node, manifest.leaves),
            )
        )
    return found


def state_leaves(manifest: Manifest) -> list[Leaf]:
    """The leaves of the state, without those of the runtime section (random states)."""
    indexes = dict.fromkeys(_leaf_indexes(manifest.tree))
    return [manifest.leaves[i] for i in indexes if 0 <= i < len(manifest.leaves)]


def runtime_entry(manifest: Manifest, name: str) -> Any:
    """The plain value of an entry of the runtime section; None if there is none."""
    for key, node in _items(manifest.runtime):
        if key == name:
            return plain(node, manifest.leaves)
    return None


def _items(node: Node) -> Iterator[tuple[Node, Node]]:
    """Pairs of a dict node; nothing for any other."""
    pairs = node.get("v") if isinstance(node, dict) else None
    for pair in pairs if isinstance(pairs, list) else ():
        if isinstance(pair, list) and len(pair) == 2:
            yield pair[0], pair[1]


def _leaf_indexes(node: Node) -> Iterator[int]:
    """Every leaf that `node` refers to, in order. Depth is no matter: no recursion."""
    waiting: list[Node] = [node]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            if isinstance(index := node.get("leaf"), int):
                yield index
            waiting.extend(reversed(list(node.values())))
        elif isinstance(node, list):
            waiting.extend(reversed(node))


def plain(node: Node, leaves: Sequence[Leaf], depth: int = 0) -> Any:
    """`node` as JSON without tags: what has no JSON form is a text in angle brackets."""
    if depth > _DEPTH:
        return "<…>"
    if isinstance(node, list):
        return [plain(item, leaves, depth + 1) for item in node]
    if not isinstance(node, dict):
        return node
    tag, value = node.get("!"), node.get("v")
    if isinstance(index := node.get("leaf"), int):
        if not 0 <= index < len(leaves):
            return f"<{tag}>"
        leaf = leaves[index]
        return f"<{leaf.dtype}{list(leaf.shape)}>"
    if tag in ("dict", "odict", "defaultdict", "counter"):
        return {_key(k): plain(v, leaves, depth + 1) for k, v in _items(node)}
    if isinstance(names := node.get("fields"), list) and isinstance(value, list):
        pairs = zip(names, value, strict=False)
        return {_key(k): plain(v, leaves, depth + 1) for k, v in pairs}
    if isinstance(value, list):
        return [plain(item, leaves, depth + 1) for item in value]
    if tag == "int" and isinstance(value, str):
        return cut_text(value)  # hexadecimal, as it was written
    if tag == "float" and isinstance(bits := node.get("bits"), str):
        return _float(bits)
    if isinstance(value, dict):
        return plain(value, leaves, depth + 1)
    named = next((str(node[k]) for k in ("v", "name", "type") if node.get(k) is not None), "")
    return f"<{tag} {cut_text(named)}>" if named else f"<{tag}>"


def _float(bits: str) -> str:
    try:
        return str(struct.unpack(">d", bytes.fromhex(bits))[0])
    except (ValueError, struct.error):
        return "<float>"


def _key(key: Node) -> str:
    """A dict's key: a string as it is, any other so that `0` and `"0"` differ."""
    return key if isinstance(key, str) else f"[{plain(key, ())}]"


def cut_text(text: str) -> str:
    """At most a few lines of it."""
    return text if len(text) <= _TEXT else text[:_TEXT] + "…"


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """`value` as lines of (path, text): `data.seed`, `1`. Lists of scalars are one line."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from flat(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        for index, item in enumerate(value):
            yield from flat(item, f"{prefix}[{index}]")
    elif isinstance(value, list):
        if len(value) <= _ITEMS + 1:
            yield prefix, cut_text(", ".join(map(_scalar, value)))
            return
        # A glimpse of what may be thousands of losses: short numbers.
        items = [f"{x:.4g}" if isinstance(x, float) else _scalar(x) for x in value[:_ITEMS]]
        yield prefix, cut_text(", ".join(items) + f", … ({len(value):,} in all)")
    else:
        yield prefix, _scalar(value)


def _scalar(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return cut_text(str(value))


def loops(position: Any) -> list[str]:
    """The open loops of a position, outermost first: "epochs: 3 of 20 done".

    Where none is open, those that are over.
    """
    frames = list(_frames(position, "frames", 0)) or list(_frames(position, "done", 0))
    lines: list[str] = []
    for frame in frames:
        name = " ".join(
            filter(None, (str(frame.get("kind", "loop")), str(frame.get("name") or "")))
        )
        limit = f" of {frame['limit']}" if frame.get("limit") is not None else ""
        tail = ", end of the body pending" if frame.get("phase") == "tail" else ""
        lines.append(f"{name}: {frame['completed']}{limit} done{tail}")
    return lines


def _frames(value: Any, name: str, depth: int) -> Iterable[dict[str, Any]]:
    """The first list called `name`, near the top."""
    if not isinstance(value, dict) or depth > 2:
        return ()
    found = value.get(name)
    if isinstance(found, list):
        return [f for f in found if isinstance(f, dict) and "completed" in f]
    return next((f for item in value.values() if (f := _frames(item, name, depth + 1))), ())
