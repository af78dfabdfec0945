"""Which parts of a checkpoint a restore is about: `only=`, `skip=`, `rename=`."""

from __future__ import annotations

import dataclasses
import difflib
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from holdfast.core.types import Node
from holdfast.core.values import key_label
from holdfast.errors import UsageError

_DICTS = ("dict", "odict", "defaultdict", "counter")
_LISTS = ("tuple", "namedtuple", "deque")
_MAX_NAMES = 10_000  # that are compared with a misspelt one


def under(path: str, prefix: str) -> bool:
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
        if any(under(path, prefix) for prefix in self.skip):
            return False
        return not self.only or any(
            under(path, prefix) or under(prefix, path) for prefix in self.only
        )

    def divides(self, path: str) -> bool:
        """Whether only a part of what is below `path` is to be restored, or is renamed."""
        entries = (*self.only, *self.skip, *(old for old, _ in self.rename))
        return any(len(entry) > len(path) and under(entry, path) for entry in entries)

    def live_path(self, saved: str) -> str:
        """Where a saved path goes. At each level the longest prefix decides; both
        sides of a rename name the saved parent.

        >>> Selection(rename=(("a", "b"), ("a/x", "a/y"))).live_path("a/x/w")
        'b/y/w'
        """
        prefixes = [old for old, _ in self.rename if under(saved, old)]
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


# -- nodes -----------------------------------------------------------------------------


def select(node: Node, selection: Selection, path: str = "") -> Node:
    """The node as if it had been saved with the new names and without what is not wanted
    of its dicts. Items of lists stay: the decoder knows what is live in their place."""
    live_path = selection.live_path(path) if path else ""
    if path and not selection.divides(path) and not selection.divides(live_path):
        return node
    holder, kind = _holder(node)
    if kind == "dict":
        return _with_items(node, _selected_pairs(_items(holder), selection, path, live_path))
    if kind == "list":
        items = _items(holder)
        return _with_items(
            node,
            [
                item if number < 0 else select(item, selection, f"{path}/{number}")
                for number, item in enumerate(items, -_marked(items))
            ],
        )
    return node


def alike(node: Node, live: object) -> bool:
    """Whether paths below the two can mean the same things: no list here and dict there."""
    if isinstance(node, dict) and cast(dict[str, Node], node).get("!") in ("ref", "numbers"):
        return True  # told by those who decode them
    holder, kind = _holder(node)
    if isinstance(live, Mapping):
        return kind == "dict"
    if isinstance(live, list):
        return isinstance(holder, list)
    if isinstance(live, tuple | deque):
        tags = ("deque",) if isinstance(live, deque) else ("tuple", "namedtuple")
        return isinstance(holder, dict) and cast(dict[str, Node], holder).get("!") in tags
    return True


def _selected_pairs(
    pairs: list[Node], selection: Selection, path: str, live_path: str
) -> list[Node]:
    kept: list[Node] = []
    for pair in pairs:
        name = _name_of(pair)
        if name is None:
            kept.append(pair)  # a key of another kind, or the decoder refuses it
            continue
        key, inner = cast(list[Node], pair)
        saved = f"{path}/{name}" if path else name
        live = selection.live_path(saved) if isinstance(key, str) else saved
        if selection.wanted(live):
            new_key = live[len(live_path) + 1 :] if live_path else live
            kept.append([new_key if isinstance(key, str) else key, select(inner, selection, saved)])
    return kept


def _name_of(pair: Node) -> str | None:
    """How paths show the key of a dict's item, if that is text or a whole number."""
    if not isinstance(pair, list) or len(cast(list[Node], pair)) != 2:
        return None
    key = cast(list[Node], pair)[0]
    return key_label(key) if type(key) is int else key if isinstance(key, str) else None


def _holder(node: Node) -> tuple[Node, str]:
    """The node that holds the items, and "dict", "dataclass", "list" or "". For adapters'
    nodes and objects it is that of their state, under "v"."""
    while isinstance(node, dict):
        tagged = cast(dict[str, Node], node)
        tag = tagged.get("!")
        if tag in _DICTS:
            return tagged, "dict"
        if tag == "dataclass":
            return tagged, "dataclass"
        if tag in _LISTS:
            return tagged, "list"
        node = tagged.get("v") if tag not in ("set", "frozenset", "range", "slice") else None
    return node, "list" if isinstance(node, list) else ""


def _items(holder: Node) -> list[Node]:
    found = cast(dict[str, Node], holder).get("v") if isinstance(holder, dict) else holder
    return cast(list[Node], found) if isinstance(found, list) else []


def _marked(items: list[Node]) -> int:
    """1 if the first item only says that references name this list."""
    first = items[0] if items else None
    return int(isinstance(first, dict) and cast(dict[str, Node], first).get("!") == "id")


def _with_items(node: Node, items: list[Node]) -> Node:
    if isinstance(node, list):
        return items
    tagged = cast(dict[str, Node], node)
    if tagged.get("!") in (*_DICTS, *_LISTS):
        return {**tagged, "v": items}
    return {**tagged, "v": _with_items(tagged["v"], items)}


# -- entries that name nothing ---------------------------------------------------------

Children = Iterator[tuple[str, Any]]


def check_names(
    tree: Node,
    definitions: Callable[[], Mapping[int, Node]],
    into: Mapping[str, Any] | None,
    selection: Selection,
    path: str = "",
) -> None:
    """Raises UsageError for entries that name nothing in the checkpoint and nothing live.

    `definitions`: the nodes that references name. A rename whose new name is in the
    checkpoint was done before.
    """

    def saved_children(node: Node) -> Children:
        return _children(node, definitions)

    def saved(entry: str, name: Callable[[str], str]) -> bool:
        return _finds(entry, tree, path, saved_children, name)

    def live(entry: str) -> bool:
        return into is not None and _finds(entry, dict(into), path, _live_children, str)

    unknown = [
        entry
        for entry in (*selection.only, *selection.skip)
        if not saved(entry, selection.live_path) and not live(entry)
    ]
    unknown += [old for old, new in selection.rename if not saved(old, str) and not saved(new, str)]
    if not unknown:
        return
    names = _some_names(tree, path, saved_children)
    if into is not None:
        names |= _some_names(dict(into), path, _live_children)
    hints: list[str] = []
    for entry in unknown:
        close = difflib.get_close_matches(entry, sorted(names))
        if close:
            hints.append(f"Closest to {entry!r}: {', '.join(close)}.")
    top = ", ".join(name for name, _ in saved_children(tree))
    raise UsageError(
        f"nothing in the checkpoint is called {', '.join(map(repr, unknown))}",
        hint=" ".join([*hints, f"At the top level it has: {top}."]),
    )


def _finds(
    entry: str,
    value: Any,
    path: str,
    children: Callable[[Any], Children],
    name: Callable[[str], str],
) -> bool:
    """Whether something below `value` is called `entry`. Looks only where it can be."""
    for label, inner in children(value):
        found = f"{path}/{label}" if path else label
        called = name(found)
        if under(called, entry):
            return True
        if under(entry, called) and _finds(entry, inner, found, children, name):
            return True
    return False


def _children(node: Node, definitions: Callable[[], Mapping[int, Node]]) -> Children:
    """What is directly below a node, as paths show it."""
    if isinstance(node, dict) and cast(dict[str, Node], node).get("!") == "ref":
        node = definitions().get(cast(Any, node).get("v"))
    holder, kind = _holder(node)
    items = _items(holder)
    if kind == "list":
        for number, item in enumerate(items[_marked(items) :]):
            yield str(number), item
    elif kind:
        for pair in items:
            name = _name_of(pair)
            if name is not None:
                yield name, cast(list[Node], pair)[1]


def _live_children(value: Any) -> Children:
    """What is directly below a live value; for objects, in their state_dict."""
    if callable(getattr(value, "state_dict", None)) and not isinstance(value, type):
        value = value.state_dict()
    if isinstance(value, Mapping):
        for key, inner in cast(Mapping[Any, Any], value).items():
            yield key if isinstance(key, str) else key_label(key), inner
    elif isinstance(value, list | tuple | deque):
        for number, inner in enumerate(cast("list[Any]", value)):
            yield str(number), inner
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield field.name, getattr(value, field.name, None)


def _some_names(value: Any, path: str, children: Callable[[Any], Children]) -> set[str]:
    """Paths below `value`, those near the top first, and the layers in names of layers."""
    names: set[str] = set()
    level = [(path, value)]
    while level and len(names) < _MAX_NAMES:
        below: list[tuple[str, Any]] = []
        for above, parent in level:
            for label, inner in children(parent):
                found = f"{above}/{label}" if above else label
                names.add(found)
                names.update(
                    found[: len(found) - len(label) + at]
                    for at, letter in enumerate(label)
                    if letter == "."
                )
                below.append((found, inner))
                if len(names) >= _MAX_NAMES:
                    return names
        level = below
    return names
