"""What differs between two checkpoints, of one run or of two.

Digests decide, so equal leaves cost no reading, whatever their size. Leaves of one type
and shape that were cut in other places (by another version, or another number of
processes) are the exception: those are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

import msgspec

from holdfast.core.records import Leaf, Manifest, Record
from holdfast.core.types import Node
from holdfast.manager.info import CheckpointInfo, info_of
from holdfast.manager.nodes import leaf_indexes, mapping_pairs
from holdfast.repo.repo import Repo

if TYPE_CHECKING:
    from holdfast.manager.reader import ChunkReader

Section = Literal["state", "position", "random states", "metrics", "config", "environment"]
Kind = Literal["only a", "only b", "type", "dtype", "shape", "values", "value"]

COUNTED: tuple[Section, ...] = ("state", "position", "random states")
"""What decides how a resumed job goes on. The rest is about the checkpoint: a host name, or
a metric that was logged afterwards, makes no other state."""


@dataclass(frozen=True)
class Side:
    """What one of the two has at a path: a leaf, or a plain value."""

    node: Node
    """As the manifest has it; without the leaf's number."""
    leaf: Leaf | None = None


@dataclass(frozen=True)
class Apart:
    """The elements of two leaves of one type and shape, compared as numbers."""

    elements: int
    differing: int
    """Whose values differ: two NaNs are equal, and so are 0.0 and -0.0."""
    largest: float | None
    """The largest finite |a-b| (of integers beyond 2**53 about); None if nothing is a number."""
    nan_in_one: int
    """Elements that are NaN in one of the two only."""


@dataclass(frozen=True)
class Difference:
    section: Section
    kind: Kind
    path: str
    a: Side | None
    b: Side | None
    apart: Apart | None = None
    """With `values`, of leaves of one type and shape."""


@dataclass
class Part:
    """The leaves below one name of the state, counted."""

    name: str
    leaves: int = 0
    """In `a`, in `b`, or in both."""
    equal: int = 0
    differ: int = 0
    only_a: int = 0
    only_b: int = 0


@dataclass(frozen=True)
class Comparison:
    a: CheckpointInfo
    b: CheckpointInfo
    differences: tuple[Difference, ...]
    """The state first, in its own order."""
    parts: tuple[Part, ...]
    leaves: int
    values: int
    """Plain values of the state that were compared."""

    @property
    def equal(self) -> bool:
        """Whether a job would go on from either in the same way: step, state, position and
        random states are the same, bit for bit."""
        if self.a.step != self.b.step:
            return False
        return not any(difference.section in COUNTED for difference in self.differences)


def compare(
    repo_a: Repo, record_a: Record, repo_b: Repo, record_b: Record, *, values: bool = False
) -> Comparison:
    """Compare two checkpoints; with `values` also how far unequal numbers are apart, for
    which what is unequal is read and verified.

    Raises DamagedObject, CheckpointRemoved, StoreUnavailable.
    """
    sides = [
        _Opened(repo_a, record_a, repo_a.manifest(record_a)),
        _Opened(repo_b, record_b, repo_b.manifest(record_b)),
    ]
    a, b = sides
    state_a, state_b = a.items(a.manifest.tree), b.items(b.manifest.tree)
    runtime_a, runtime_b = a.items(a.manifest.runtime), b.items(b.manifest.runtime)
    pair = _Pair(a, b, values=values)
    differences = list(pair.differences("state", state_a, state_b))
    parts = parts_of(state_a, state_b, differences)
    around = list(pair.differences("position", runtime_a, runtime_b))
    differences += [d for d in around if d.path.partition("/")[0] != "rng"]
    differences += _generators(d for d in around if d.path.partition("/")[0] == "rng")
    info_a, info_b = info_of(repo_a.address, record_a), info_of(repo_b.address, record_b)
    differences += _plain_differences("metrics", _said(record_a), _said(record_b))
    differences += _plain_differences("config", a.manifest.config, b.manifest.config)
    differences += _plain_differences("environment", a.manifest.environment, b.manifest.environment)
    paths = {**state_a, **state_b}
    leaves = sum(1 for side in paths.values() if side.leaf is not None)
    return Comparison(info_a, info_b, tuple(differences), tuple(parts), leaves, len(paths) - leaves)


@dataclass(frozen=True)
class _Opened:
    repo: Repo
    record: Record
    manifest: Manifest

    def reader(self) -> ChunkReader:
        from holdfast.manager.reader import ChunkReader  # here: most comparisons read nothing

        return ChunkReader(self.repo, self.record, self.manifest)

    def items(self, tree: Node) -> dict[str, Side]:
        for _ in leaf_indexes(tree):
            pass  # it checks how deep the tree is
        return dict(flat(tree, self.manifest.leaves))


# -- leaves ---------------------------------------------------------------------


@dataclass
class _Pair:
    a: _Opened
    b: _Opened
    values: bool
    _readers: list[ChunkReader] = field(default_factory=list)

    def differences(
        self, section: Section, a: dict[str, Side], b: dict[str, Side]
    ) -> Iterator[Difference]:
        for path, side in a.items():
            other = b.get(path)
            if other is None:
                yield Difference(section, "only a", path, side, None)
            elif (kind := kind_of(side, other)) is not None:
                yield Difference(section, kind, path, side, other)
            elif side.leaf is not None and other.leaf is not None:
                yield from self._leaf(section, path, side, other)
        for path, side in b.items():
            if path not in a:
                yield Difference(section, "only b", path, None, side)

    def _leaf(self, section: Section, path: str, a: Side, b: Side) -> Iterator[Difference]:
        assert a.leaf is not None
        assert b.leaf is not None
        same = same_bytes(a.leaf, b.leaf)
        if same:
            return
        if same is None or self.values:
            from holdfast.manager.numbers import apart  # here: it imports NumPy

            numeric, row_bytes = numbers_in(a)
            if not self._readers:
                self._readers = [self.a.reader(), self.b.reader()]
            first, second = self._readers
            if same is None and not apart(first, a.leaf, second, b.leaf, numeric=False).differing:
                return
            if self.values:
                found = apart(first, a.leaf, second, b.leaf, numeric=numeric, row_bytes=row_bytes)
                yield Difference(section, "values", path, a, b, found)
                return
        yield Difference(section, "values", path, a, b)


def kind_of(a: Side, b: Side) -> Kind | None:
    """How the two differ without a look at their bytes; None if they do not."""
    if a.leaf is not None and b.leaf is not None:
        if a.leaf.dtype != b.leaf.dtype:
            return "dtype"
        if a.leaf.shape != b.leaf.shape:
            return "shape"
    elif a.leaf is not None or b.leaf is not None:
        return "type"
    if encoded(a.node) == encoded(b.node):
        return None
    return "value" if a.leaf is None else "type"


def encoded(node: Node) -> bytes:
    """Comparable: in Python 1, 1.0 and True are equal."""
    return msgspec.json.encode(node, order="sorted")


def same_bytes(a: Leaf, b: Leaf) -> bool | None:
    """By their digests; None if they were cut at other places, so that none can be compared."""
    # Sorted: chunks come in any order.
    pieces = sorted((chunk.start, chunk.shape, chunk.digest) for chunk in a.chunks)
    others = sorted((chunk.start, chunk.shape, chunk.digest) for chunk in b.chunks)
    if [piece[:2] for piece in pieces] != [other[:2] for other in others]:
        return None
    return pieces == others


_BYTE_TYPES = ("u1", "|u1", "uint8", "torch.uint8")
_ARRAYS = frozenset({"array", "torch.tensor", "jax.array"})


def numbers_in(side: Side) -> tuple[bool, int]:
    """(whether the leaf's dtype says what it holds, else bytes of one of its items)."""
    assert side.leaf is not None
    node = cast(dict[str, Any], side.node) if isinstance(side.node, dict) else {}
    if side.leaf.dtype != "U8" or node.get("dtype") in _BYTE_TYPES:
        return True, 1
    # What safetensors cannot name has the item's bytes as last dimension.
    wide = node.get("!") in _ARRAYS and side.leaf.shape
    return False, max(1, *side.leaf.shape[-1:]) if wide else 1


def parts_of(
    a: dict[str, Side], b: dict[str, Side], differences: Iterable[Difference]
) -> list[Part]:
    """The leaves of the two counted, by the first name of their paths."""
    parts: dict[str, Part] = {}
    for path in {**a, **b}:
        # Of one of the two it may be a plain value.
        if any(side[path].leaf is not None for side in (a, b) if path in side):
            name = path.partition("/")[0]
            parts.setdefault(name, Part(name)).leaves += 1
    for difference in differences:
        sides = [side for side in (difference.a, difference.b) if side is not None]
        part = parts.get(difference.path.partition("/")[0])
        if part is None or not any(side.leaf is not None for side in sides):
            continue
        if difference.kind == "only a":
            part.only_a += 1
        elif difference.kind == "only b":
            part.only_b += 1
        else:
            part.differ += 1
    for part in parts.values():
        part.equal = part.leaves - part.differ - part.only_a - part.only_b
    return list(parts.values())


# -- everything else ------------------------------------------------------------


def _generators(differences: Iterable[Difference]) -> Iterator[Difference]:
    """One for each generator: what is in its state says nothing to anybody."""
    seen: set[str] = set()
    for difference in differences:
        _, *names = difference.path.rstrip("~").split("/")
        name = "/".join(names[1:3] if names[:1] == ["frameworks"] else names[:1])
        if name not in seen:
            seen.add(name)
            kind: Kind = difference.kind if difference.kind in ("only a", "only b") else "values"
            yield Difference("random states", kind, name, None, None)


def _said(record: Record) -> dict[str, Any]:
    return {**record.metrics, **record.odd_metrics}


def _plain_differences(section: Section, a: Any, b: Any) -> Iterator[Difference]:
    old, new = dict(_flat_plain(a, "")), dict(_flat_plain(b, ""))
    for path in {**old, **new}:
        if path not in new:
            yield Difference(section, "only a", path, Side(old[path]), None)
        elif path not in old:
            yield Difference(section, "only b", path, None, Side(new[path]))
        elif encoded(old[path]) != encoded(new[path]):
            yield Difference(section, "value", path, Side(old[path]), Side(new[path]))


def _flat_plain(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    waiting: list[tuple[str, Any]] = [(path, value)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, dict) and value:
            items = cast(dict[str, Any], value).items()
            waiting.extend(
                (f"{path}.{key}" if path else key, item) for key, item in reversed(list(items))
            )
        elif path or value not in (None, {}):
            yield path, value


_ABOUT = frozenset({"!", "v", "id", "leaf", "fields"})
"""Of a node: what is not a property of the value itself."""


def flat(tree: Node, leaves: tuple[Leaf, ...]) -> Iterator[tuple[str, Side]]:
    """Every leaf and plain value of a tree by its path, in its order, without recursion.

    A container is there itself if it says more than "I am a list" or "a dict": an empty
    one, an object, an OrderedDict.
    """
    taken: set[str] = set()
    marked: dict[object, str] = {}
    """Number of a value that is named again -> its path."""

    def found(path: str, side: Side) -> tuple[str, Side]:
        while path in taken:
            path += "~"  # a container inside of another at the same place
        taken.add(path)
        return path, side

    waiting: list[tuple[str, Node]] = [("", tree)]
    while waiting:
        path, node = waiting.pop()
        if isinstance(node, list):
            items = cast(list[Node], node)
            if items and _tag(items[0]) == "id":
                marked[items[0]["v"]] = path
                items = items[1:]
            if not any(isinstance(item, dict | list) for item in items):
                yield found(path, Side(items))
            else:
                waiting.extend((_join(path, str(i)), items[i]) for i in reversed(range(len(items))))
            continue
        if not isinstance(node, dict):
            yield found(path, Side(node))
            continue
        tagged = cast(dict[str, Any], node)
        if "id" in tagged:
            marked[tagged["id"]] = path
        if tagged.get("!") == "ref":
            yield found(path, Side({"!": "ref", "v": marked.get(tagged.get("v"), "?")}))
            continue
        below, own = _divided(path, tagged)
        index = tagged.get("leaf")
        if isinstance(index, int) and 0 <= index < len(leaves):
            yield found(path, Side(own, leaves[index]))
        elif own != {"!": "dict"} or (path and not below):
            yield found(path, Side(own))
        waiting.extend(reversed(below))


def _divided(path: str, node: dict[str, Any]) -> tuple[list[tuple[str, Node]], dict[str, Any]]:
    """(what is below a node, what it is itself)."""
    own: dict[str, Any] = {"!": node.get("!")}
    below: list[tuple[str, Node]] = []
    for key, value in node.items():
        if key in _ABOUT:
            continue
        if _tag(value) is not None:
            below.append((_join(path, f"~{key}"), value))
        else:
            own[key] = value
    value = node.get("v")
    if node.get("!") in ("dict", "odict", "defaultdict", "counter"):
        pairs = mapping_pairs(node) or []
        return below + [(_join(path, _key(key)), item) for key, item in pairs], own
    fields = node.get("fields")
    if isinstance(fields, list) and isinstance(value, list):
        names = [str(name) for name in cast(list[Any], fields)]
        items = zip(names, cast(list[Node], value), strict=False)
        return below + [(_join(path, name), item) for name, item in items], own
    if _tag(value) is not None or isinstance(value, list):
        if isinstance(value, list) and not any(isinstance(i, dict | list) for i in value):
            own["v"] = value
        else:
            below.append((path, value))
    elif value is not None:
        own["v"] = value
    return below, own


def _tag(node: Node) -> Any:
    return cast(dict[str, Any], node).get("!") if isinstance(node, dict) else None


def _join(path: str, key: str) -> str:
    return f"{path}/{key}" if path else key


def _key(key: Node) -> str:
    """A dict's key: a string as it is, any other so that `0` and `"0"` differ."""
    return key if isinstance(key, str) else f"[{encoded(key).decode()}]"
