"""How nodes of containers become containers: new ones, or live ones in place."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from holdfast.core import classes, frameworks
from holdfast.core.adapters import NOTHING
from holdfast.core.leaves import Later, settle, together
from holdfast.core.types import Node
from holdfast.core.values import FACTORIES, key_label, kind_name, malformed
from holdfast.errors import UsageError

if TYPE_CHECKING:
    from holdfast.core.decode import TreeDecoder

_OPEN = frozenset({"box"})
"""Paths of structures that take what they have no place for: names of `run.box` may be
declared later."""

DICTS: frozenset[type] = frozenset((dict, OrderedDict, defaultdict, Counter))


def items_of(node: dict[str, Node], path: str) -> list[Node]:
    """The list under "v"."""
    found = node.get("v")
    if not isinstance(found, list):
        raise malformed(path, "its items are malformed")
    return cast(list[Node], found)


def pairs_of(decoder: TreeDecoder, node: dict[str, Node], path: str) -> list[tuple[Any, Node]]:
    """The keys, decoded, with the nodes of their values."""
    pairs: list[tuple[Any, Node]] = []
    for pair in items_of(node, path):
        if type(pair) is not list or len(cast(list[Node], pair)) != 2:
            raise malformed(path, "an item is malformed")
        key, inner = cast(list[Node], pair)
        if type(key) is not str:
            key = _hashable(decoder, key, path)
        pairs.append((key, inner))
    return pairs


def _hashable(decoder: TreeDecoder, node: Node, path: str) -> Any:
    value = decoder.decode_node(node, NOTHING, f"{path}/<key>")
    try:
        hash(value)
    except TypeError:
        raise malformed(path, "a key or an item of a set is not hashable") from None
    if type(value) is Later:
        raise malformed(path, "a key or an item of a set is a leaf")
    return value


def decode_list(
    decoder: TreeDecoder, items: list[Node], node: Node, target: object, path: str
) -> Any:
    """`items` without the marker that `node` may have."""
    if decoder.is_live(target):
        decoder.changed(path, "a list", kind_name(target))
        return target
    live = cast(list[Any], target) if type(target) is list else []
    if _other_length(decoder, len(items), live, path):
        return live
    result = _children(decoder, items, live, path)
    for index in range(len(items), len(live)):
        if decoder.is_live(live[index]):
            decoder.missing(f"{path}/{index}")
    if type(cast(object, target)) is list and decoder.adopt(live, node):

        def update() -> None:
            live[:] = [settle(value) for value in result]

        decoder.finish(update)
        return live
    if any(type(value) is Later for value in result):

        def fill() -> None:
            result[:] = [settle(value) for value in result]

        decoder.finish(fill)
    return result


def decode_dict(decoder: TreeDecoder, node: dict[str, Node], target: object, path: str) -> Any:
    live = cast(dict[Any, Any], target) if isinstance(target, dict) else dict[Any, Any]()
    target = cast(object, target)
    result = _new_dict(node, path)
    # A structure of the program's takes what it has a place for.
    closed = bool(live) and path not in _OPEN and frameworks.is_structural(live)
    late = False
    for key, inner in pairs_of(decoder, node, path):
        name = key if type(key) is str else key_label(key)
        if key in result:
            raise malformed(path, f"the key {name!r} is there twice")
        where = f"{path}/{name}" if path else name
        if decoder.selecting and not decoder.selection.wanted(where):
            continue  # `select` does not look behind references
        child = live.get(key, NOTHING) if live else NOTHING
        if closed and child is NOTHING and key not in live:
            decoder.unexpected(where)
            continue
        value = decoder.decode_node(inner, child, where)
        result[key] = value
        late = late or type(value) is Later
    attributes = _attributes(decoder, node, target, result, path)
    kept = _absent(decoder, live, result, path) if live else {}
    if type(target) in DICTS and decoder.adopt(target, node):

        def update() -> None:
            settled = {key: settle(value) for key, value in result.items()}
            live.clear()
            for key, value in (*settled.items(), *kept.items()):
                live[key] = value  # Counter.update would add
            if attributes is not None:
                getattr(live, "__dict__", {}).update(attributes)

        decoder.finish(update)
        return live
    if attributes is not None:
        cast(Any, result).__dict__.update(attributes)
    if late:

        def fill() -> None:
            for key, value in result.items():
                result[key] = settle(value)

        decoder.finish(fill)
    return result


def _attributes(
    decoder: TreeDecoder, node: dict[str, Node], target: object, result: object, path: str
) -> dict[str, Any] | None:
    """Instance attributes of an OrderedDict (`_metadata`)."""
    if "attrs" not in node:
        return None
    found = decoder.decode_node(node["attrs"], NOTHING, path)
    if type(found) is not dict or type(result) is not OrderedDict:
        raise malformed(path, "its attributes are malformed")
    names = cast(dict[Any, Any], found)
    if any(type(name) is not str or name.startswith("__") for name in names):
        raise malformed(path, "its attributes are malformed")
    late = {name: value for name, value in names.items() if type(value) is Later}
    if late:
        owner = cast(Any, target if type(target) is OrderedDict else result)
        decoder.finish(
            lambda: owner.__dict__.update({name: value.get() for name, value in late.items()})
        )
    return names


def _new_dict(node: dict[str, Node], path: str) -> dict[Any, Any]:
    match node["!"]:
        case "odict":
            return OrderedDict()
        case "counter":
            return Counter()
        case "defaultdict":
            name = node.get("factory")
            if not isinstance(name, str) or name not in FACTORIES:
                raise malformed(path, "its factory is malformed")
            return defaultdict(FACTORIES[name])
        case _:
            return {}


def _absent(
    decoder: TreeDecoder, live: dict[Any, Any], saved: dict[Any, Any], path: str
) -> dict[Any, Any]:
    """Report live things that the checkpoint lacks; return what stays as it is."""
    kept: dict[Any, Any] = {}
    for key, value in live.items():
        if key in saved:
            continue
        name = key if type(key) is str else key_label(key)
        inner = f"{path}/{name}" if path else name
        if not decoder.selection.wanted(inner):
            kept[key] = value
        elif decoder.is_live(value) or frameworks.is_structural(value):
            decoder.missing(inner)
            kept[key] = value
    return kept


def _children(
    decoder: TreeDecoder, items: list[Node], live: Sequence[Any], path: str, *, whole: bool = False
) -> list[Any]:
    """The values of `items`; at indices that are not wanted, what is live there, which may
    be nothing at the end. `whole`: nothing may be left out there either."""
    if not (decoder.selecting and decoder.selection.divides(path)):
        return [
            decoder.decode_node(
                item, live[index] if index < len(live) else NOTHING, f"{path}/{index}"
            )
            for index, item in enumerate(items)
        ]
    result: list[Any] = []
    left_out = ""
    for index in range(max(len(items), len(live))):
        where = f"{path}/{index}"
        child = live[index] if index < len(live) else NOTHING
        if decoder.selection.wanted(where) or (child is NOTHING and decoder.adapters):
            if index >= len(items):
                continue  # the saved one is shorter
            value = decoder.decode_node(items[index], child, where)
        elif child is NOTHING:
            left_out = where
            continue
        else:
            value = child
        if left_out:
            raise _needed(left_out)
        result.append(value)
    if left_out and whole:
        raise _needed(left_out)
    return result


def _needed(path: str) -> UsageError:
    return UsageError(
        f"{path!r} cannot be left out: nothing live stays in its place",
        hint="Restore it too, or into an object that has something there.",
    )


def _items_in(target: object) -> tuple[Any, ...]:
    return cast("tuple[Any, ...]", target) if isinstance(target, tuple) else ()


def decode_tuple(decoder: TreeDecoder, node: dict[str, Node], target: object, path: str) -> Any:
    items, live = items_of(node, path), _items_in(target)
    if _other_length(decoder, len(items), live, path):
        return target
    return together(_children(decoder, items, live, path), tuple)


def _other_length(decoder: TreeDecoder, saved: int, live: Sequence[Any], path: str) -> bool:
    """Report a structure of the program's with more or fewer items than were saved."""
    if not live or len(live) == saved or not frameworks.is_structural(live):
        return False
    if decoder.selecting and decoder.selection.divides(path):
        return False
    decoder.changed(path, f"{saved} items", f"{len(live)} items")
    return True


def decode_namedtuple(
    decoder: TreeDecoder, node: dict[str, Node], target: object, path: str
) -> Any:
    names, name = node.get("fields"), node.get("type")
    if classes.is_namedtuple(type(target)) and frameworks.is_structural(target):
        live = cast(Any, target)
        if classes.class_for(name, live) is not type(live) or names != list(live._fields):
            decoder.changed(path, f"{name}{names}", f"{kind_name(live)}{list(live._fields)}")
            return live
    children = _children(decoder, items_of(node, path), _items_in(target), path, whole=True)
    if (
        not isinstance(name, str)
        or not isinstance(names, list)
        or len(cast(list[Any], names)) != len(children)
        or not all(type(field) is str for field in cast(list[Any], names))
    ):
        raise malformed(path, "its fields are malformed")
    fields = cast(list[str], names)
    kind = classes.class_for(name, target)
    return together(children, lambda values: classes.make_namedtuple(kind, name, fields, values))


def decode_dataclass(decoder: TreeDecoder, node: dict[str, Node], target: object, path: str) -> Any:
    name = node.get("type")
    if not isinstance(name, str):
        raise malformed(path, "its type is malformed")
    kind = classes.class_for(name, target)
    if kind is not None and not classes.is_plain_dataclass(kind):
        kind = None
    live = kind is not None and type(target) is kind
    current = classes.dataclass_fields(target) if live else {}
    fields: dict[str, Any] = {}
    for key, inner in pairs_of(decoder, node, path):
        if type(key) is not str or key in fields:
            raise malformed(path, "its fields are malformed")
        where = f"{path}/{key}"
        if decoder.selecting and key not in current and not decoder.selection.wanted(where):
            raise _needed(where)
        fields[key] = decoder.decode_node(inner, current.get(key, NOTHING), where)
    if kind is None:
        return together(
            list(fields.values()),
            lambda values: classes.Record(name, dict(zip(fields, values, strict=True))),
        )
    if live and not classes.is_frozen(kind) and decoder.adopt(target, node):
        decoder.finish(lambda: classes.set_fields(target, _settled(fields), path))
        return target
    instance = classes.blank(kind, path)
    # Now, for its hash as a key; again once late values are there.
    classes.set_fields(instance, fields, path)
    if any(type(value) is Later for value in fields.values()):
        decoder.finish(lambda: classes.set_fields(instance, _settled(fields), path))
    return instance


def _settled(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: settle(value) for name, value in fields.items()}


def decode_set(decoder: TreeDecoder, node: dict[str, Node], target: object, path: str) -> Any:
    found = [_hashable(decoder, item, path) for item in items_of(node, path)]
    values = set(found)
    if len(values) != len(found):
        raise malformed(path, "an item is there twice")
    if node["!"] == "frozenset":
        return frozenset(found)
    if type(target) is set and decoder.adopt(cast(object, target), node):
        live = cast(set[Any], target)

        def update() -> None:
            live.clear()
            live.update(found)

        decoder.finish(update)
        return live
    return values


def decode_deque(decoder: TreeDecoder, node: dict[str, Node], target: object, path: str) -> Any:
    limit = node.get("maxlen")
    items = items_of(node, path)
    if not (limit is None or (type(limit) is int and len(items) <= limit < 1 << 62)):
        raise malformed(path, "its maxlen is malformed")
    live = cast(deque[Any], target) if type(target) is deque else deque[Any]()
    result = _children(decoder, items, live, path)
    if type(cast(object, target)) is deque and live.maxlen == limit and decoder.adopt(live, node):
        value = live
    else:
        value = deque[Any](result, limit)
        if not any(type(item) is Later for item in result):
            return value

    def update() -> None:
        value.clear()
        value.extend(settle(item) for item in result)

    decoder.finish(update)
    return value
