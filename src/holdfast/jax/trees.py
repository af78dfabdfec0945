"""Registered nodes of pytrees: classes of Equinox, Flax and Optax, and of a program's own.

    {"!": "jax.node", "type": "equinox.nn._linear:Linear", "v": <dict of children>}
    {"!": "jax.tuple", "type": "optax._src.transform:ScaleByAdamState", "v": <dict of children>}

Only the children are saved, by the names that the class has registered. How a node is put
together from them, and what else it has (static fields, functions), is the program's: a
restore needs a live node of the same class in its place. A named tuple has nothing else.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax

from holdfast.core import classes
from holdfast.core.adapters import NOTHING, Decoder, Encoder
from holdfast.core.leaves import together
from holdfast.core.types import Node
from holdfast.errors import DamagedObject

_PLAIN = (bool, int, float, complex, str, bytes, type(None))


class Parts(NamedTuple):
    """A node, taken apart by one level."""

    children: dict[str, Any]
    treedef: Any


def parts_of(value: object) -> Parts | None:
    """None if no class of `value` is registered."""
    if value is None or isinstance(value, type):
        return None
    keyed, treedef = jax.tree_util.tree_flatten_with_path(
        value, is_leaf=lambda child: child is not value
    )
    if treedef.num_leaves == 1 and jax.tree_util.treedef_is_leaf(treedef):
        return None  # and not one without children
    children: dict[str, Any] = {}
    for path, child in keyed:
        name = _name(path[0])
        while name in children:  # a class that gives two children one name
            name += "'"
        children[name] = child
    return Parts(children, treedef)


def _name(entry: Any) -> str:
    for attribute in ("name", "key", "idx"):
        found = getattr(entry, attribute, None)
        if found is not None:
            return str(found)
    return str(entry)


def is_program(value: object) -> bool:
    """Whether a child is code: a function, a class. It is in no checkpoint.

    A node with parts of its own is none, though modules can be called, too.
    """
    return callable(value) and not isinstance(value, jax.Array) and parts_of(value) is None


def encode_node(value: Any, parts: Parts, path: str, encoder: Encoder) -> dict[str, Node]:
    pairs: list[Node] = []
    for name, child in parts.children.items():
        pairs.append([name, encode_child(child, f"{path}/{name}", encoder)])
    tag = "jax.tuple" if classes.is_namedtuple(type(value)) else "jax.node"
    kind = classes.type_name(type(value))
    return {"!": tag, "type": kind, "v": {"!": "dict", "v": pairs}}


def encode_child(child: Any, path: str, encoder: Encoder) -> Node:
    """Of a registered node; code among them, or in their containers, is left out."""
    if is_program(child):
        return {"!": "jax.code"}
    kind = type(child)
    if kind in (tuple, list) and any(is_program(item) for item in child):
        items: list[Node] = [
            encode_child(item, f"{path}/{index}", encoder) for index, item in enumerate(child)
        ]
        return {"!": "tuple", "v": items} if kind is tuple else items
    return encoder.encode(child, path)


def decode_node(node: dict[str, Node], target: object, path: str, decoder: Decoder) -> Any:
    name, pairs = node.get("type"), _pairs(node, path)
    if not isinstance(name, str):
        raise DamagedObject("the tree", "its type is malformed", leaf=path)
    live = None if target is NOTHING or isinstance(target, _PLAIN) else parts_of(target)
    if live is None:
        return _without_structure(node["!"] == "jax.tuple", name, pairs, target, path, decoder)
    kind = type(cast(object, target))
    if kind is not classes.class_for(name, target):
        decoder.changed(path, f"a {_short(name)}", f"a {_short(classes.type_name(kind))}")
        return target
    found: dict[str, Any] = {}
    for child, inner in pairs.items():
        where = f"{path}/{child}"
        if child in live.children:
            found[child] = decoder.decode(inner, live.children[child], where)
        else:
            decoder.unexpected(where)
    for child, value in live.children.items():
        if child not in found:
            decoder.missing(f"{path}/{child}")
            found[child] = value
    values = [found[child] for child in live.children]
    return together(values, lambda made: jax.tree_util.tree_unflatten(live.treedef, made))


def _without_structure(
    named_tuple: bool,
    name: str,
    pairs: dict[str, Node],
    target: object,
    path: str,
    decoder: Decoder,
) -> Any:
    """No live node says how the children belong together."""
    names = list(pairs)
    if not named_tuple and (target is not NOTHING or decoder.filling):
        here = "nothing" if target is NOTHING or target is None else type(target).__name__
        decoder.changed(
            path,
            f"a {_short(name)}",
            f"{here}, which does not say how one is made: declare it, as run.box(name=value)",
        )
        return target
    values = [decoder.decode(inner, NOTHING, f"{path}/{child}") for child, inner in pairs.items()]
    if named_tuple:
        kind = classes.find_class(name)
        return together(values, lambda made: classes.make_namedtuple(kind, name, names, made))
    return together(values, lambda made: classes.Record(name, dict(zip(names, made, strict=True))))


def decode_code(target: object) -> Any:
    """What a program has in the place of code; None where there is no program."""
    return None if target is NOTHING else target


def _short(name: str) -> str:
    return name.replace(":", ".")


def _pairs(node: dict[str, Node], path: str) -> dict[str, Node]:
    inner = node.get("v")
    items = inner.get("v") if isinstance(inner, dict) and inner.get("!") == "dict" else None
    found: dict[str, Node] = {}
    for item in items if isinstance(items, list) else [None]:
        if not isinstance(item, list) or len(item) != 2 or not isinstance(item[0], str):
            raise DamagedObject("the tree", "its children are malformed", leaf=path)
        if item[0] in found:
            raise DamagedObject("the tree", "a child is there twice", leaf=path)
        found[item[0]] = item[1]
    return found
