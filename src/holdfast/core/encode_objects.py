"""How objects become nodes: what is known by what it can do, generators, and pickles."""

from __future__ import annotations

import enum
import pickle
from typing import TYPE_CHECKING, Any, cast

from holdfast.core import classes, generators
from holdfast.core.types import Node
from holdfast.errors import UnsupportedValue

if TYPE_CHECKING:
    from holdfast.core.encode import TreeEncoder


def encode(encoder: TreeEncoder, value: Any, path: str) -> Node | None:
    """The node of an object with a state, an enum's member, a named tuple or a dataclass;
    None if `value` is none of them."""
    kind = type(cast(object, value))
    if isinstance(value, type):
        return None
    if callable(getattr(value, "state_dict", None)):
        return _object(encoder, value, path)
    if isinstance(value, enum.Enum):
        return _enum(encoder, value, path)
    if classes.is_namedtuple(kind):
        return _namedtuple(encoder, cast("tuple[Any, ...]", value), path)
    if classes.is_dataclass(kind):
        return _dataclass(encoder, value, path)
    return None


def _object(encoder: TreeEncoder, value: Any, path: str) -> Node:
    if not callable(getattr(value, "load_state_dict", None)):
        raise UnsupportedValue(
            path,
            f"{type(value).__qualname__} with state_dict() but no load_state_dict()",
            hint="Give it load_state_dict(state), or save value.state_dict() itself.",
        )
    encoder.enter(value, path)
    kind = classes.type_name(type(cast(object, value)))
    node: dict[str, Node] = {"!": "object", "type": kind}
    node["v"] = encoder.encode(value.state_dict(), path)
    encoder.leave(value, node)
    return node


def _enum(encoder: TreeEncoder, value: enum.Enum, path: str) -> Node:
    node = classes.encode_enum(value)
    plain = classes.enum_value(value)
    if plain is not None:
        node["v"] = encoder.encode(plain, path)
    return node


def _namedtuple(encoder: TreeEncoder, value: tuple[Any, ...], path: str) -> Node:
    encoder.enter(value, path)
    names: list[str] = list(cast(Any, value)._fields)
    items = [
        encoder.encode(item, f"{path}/{name}") for name, item in zip(names, value, strict=True)
    ]
    kind = classes.type_name(type(value))
    node: dict[str, Node] = {"!": "namedtuple", "type": kind, "fields": names, "v": items}
    encoder.leave(value, node)
    return node


def _dataclass(encoder: TreeEncoder, value: object, path: str) -> Node:
    encoder.enter(value, path)
    node: dict[str, Node] = {"!": "dataclass", "type": classes.type_name(type(value))}
    node["v"] = encoder.pairs(classes.dataclass_fields(value), path)
    encoder.leave(value, node)
    return node


def encode_generator(encoder: TreeEncoder, value: Any, path: str) -> Node:
    """The node of a random generator."""
    known = encoder.reference(value, path)
    if known is not None:
        return known
    encoder.enter(value, path)
    tag, state = generators.state_of(value)
    node: dict[str, Node] = {"!": tag, "v": encoder.encode(state, path)}
    encoder.leave(value, node)
    return node


def encode_pickle(encoder: TreeEncoder, value: object, path: str) -> Node:
    """Any other value, as pickle writes it. Raises UnsupportedValue if it cannot."""
    try:
        data = pickle.dumps(value, protocol=5)
    except Exception as error:
        raise UnsupportedValue(
            path,
            f"value of type {type(value).__qualname__} that cannot be pickled: {error}",
            hint="Convert it to plain values.",
        ) from error
    encoder.note_pickle()
    node = cast(dict[str, Node], encoder.encode(data, path))
    node.update({"!": "pickle", "type": classes.type_name(type(value))})
    return encoder.remembered(value, node)
