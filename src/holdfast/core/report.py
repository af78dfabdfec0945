"""How live objects and a checkpoint differ, and which parts a restore is about."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from holdfast.core.types import Node
from holdfast.errors import StructureMismatch, UsageError

MAX_LINES = 20  # of each kind in a message; a renamed layer must not print 10,000 lines

_HINT = (
    "Use strict=False to leave what differs as it is, only=[...] or skip=[...] to "
    'restore a part, or rename={"saved": "live"}.'
)


@dataclass
class Mismatch:
    """What a restore found to differ. Empty: everything fits."""

    missing: list[str] = field(default_factory=list[str])
    unexpected: list[str] = field(default_factory=list[str])
    changed: list[str] = field(default_factory=list[str])

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.changed)

    def lines(self) -> list[str]:
        """For people: at most 20 lines of each kind, and how many there are."""
        kinds = (
            ("missing in the checkpoint", self.missing),
            ("unexpected in the checkpoint", self.unexpected),
            ("different", self.changed),
        )
        text: list[str] = []
        for title, items in kinds:
            if items:
                text.append(f"{title} ({len(items)}):")
                text += [f"  {item}" for item in items[:MAX_LINES]]
                if len(items) > MAX_LINES:
                    text.append(f"  ... and {len(items) - MAX_LINES} more")
        return text

    def error(self) -> StructureMismatch:
        head = "the live objects and the checkpoint do not fit:"
        return StructureMismatch(
            "\n".join([head, *self.lines()]),
            missing=self.missing,
            unexpected=self.unexpected,
            changed=self.changed,
            hint=_HINT,
        )


def _under(path: str, prefix: str) -> bool:
    """Whether `path` is `prefix` or below it: "/" and, in names of layers, "." end one."""
    return path.startswith(prefix) and (len(path) == len(prefix) or path[len(prefix)] in "/.")


@dataclass(frozen=True)
class Selection:
    """`only=`, `skip=` and `rename=`: names or path prefixes like `model/layers.0`.

    >>> Selection(only=("model",), skip=("model/head",)).wanted("model/head.weight")
    False
    """

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    rename: tuple[tuple[str, str], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.only or self.skip or self.rename)

    def wanted(self, path: str) -> bool:
        """Whether the (live) path, or something below it, is to be restored."""
        if any(_under(path, prefix) for prefix in self.skip):
            return False
        return not self.only or any(
            _under(path, prefix) or _under(prefix, path) for prefix in self.only
        )

    def live_path(self, saved: str) -> str:
        """Where a saved path goes. At each level the longest prefix decides; both
        sides of a rename name the saved parent.

        >>> Selection(rename=(("a", "b"), ("a/x", "a/y"))).live_path("a/x/w")
        'b/y/w'
        """
        prefixes = [old for old, _ in self.rename if _under(saved, old)]
        if not prefixes:
            return saved
        old = max(prefixes, key=len)
        parent, slash, _ = old.rpartition("/")
        name = dict(self.rename)[old].rpartition("/")[2]
        return (self.live_path(parent) if parent else "") + slash + name + saved[len(old) :]


def make_selection(
    only: Collection[str], skip: Collection[str], rename: Mapping[str, str]
) -> Selection:
    """Raises UsageError if a value is no collection of names, or a rename would move
    something to another parent."""
    for name, value in (("only", only), ("skip", skip)):
        if isinstance(value, str):
            raise UsageError(
                f"{name}={value!r} must be a list of names", hint=f"{name}=[{value!r}]"
            )
    for old, new in rename.items():
        if old.rpartition("/")[0] != new.rpartition("/")[0]:
            raise UsageError(
                f"rename={{{old!r}: {new!r}}} would move it elsewhere",
                hint='Rename within one level: {"model/encoder": "model/backbone"}.',
            )
    return Selection(tuple(only), tuple(skip), tuple(rename.items()))


def _pairs_of(node: Node) -> list[Any] | None:
    """The [key, node] pairs of a dict-like node; for adapters' nodes and objects those
    of the state under "v"."""
    while isinstance(node, dict):
        tagged = cast(dict[str, Node], node)
        inner = tagged.get("v")
        if tagged.get("!") in ("dict", "odict", "defaultdict", "counter"):
            return cast("list[Any]", inner) if isinstance(inner, list) else None
        node = inner
    return None


def select(node: Node, selection: Selection, path: str, seen: set[str]) -> Node:
    """The node as if it had been saved with the new names and without what is not
    wanted. Adds to `seen` the selection's entries that named something."""
    pairs = _pairs_of(node)
    if pairs is None:
        return node
    kept: list[Any] = []
    for pair in pairs:
        if not (isinstance(pair, list) and len(cast(list[Any], pair)) == 2):
            kept.append(pair)  # the decoder refuses it
            continue
        key, inner = cast(list[Any], pair)
        name = key if isinstance(key, str | int) else None
        if name is None or isinstance(name, bool):
            kept.append(pair)
            continue
        saved = f"{path}/{name}" if path else str(name)
        live = selection.live_path(saved) if isinstance(name, str) else saved
        seen.update(old for old, _ in selection.rename if _under(saved, old))
        seen.update(entry for entry in selection.skip if _under(live, entry))
        if not selection.wanted(live):
            continue
        seen.update(entry for entry in selection.only if _under(live, entry))
        parent = selection.live_path(path) if path else ""
        new_key = live[len(parent) + 1 :] if parent else live
        inner = select(inner, selection, saved, seen)
        kept.append([new_key if isinstance(name, str) else key, inner])
    return _with_pairs(node, kept)


def _with_pairs(node: Node, pairs: list[Any]) -> Node:
    tagged = cast(dict[str, Node], node)
    if tagged.get("!") in ("dict", "odict", "defaultdict", "counter"):
        return {**tagged, "v": pairs}
    return {**tagged, "v": _with_pairs(tagged["v"], pairs)}
