"""How nodes of text, bytes, objects, generators and pickles become values."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from holdfast.core import classes, generators, values
from holdfast.core.adapters import NOTHING
from holdfast.core.containers import items_of
from holdfast.core.leaves import BufferDestination, Later, settle, then, together
from holdfast.core.types import Node
from holdfast.core.values import kind_name, malformed
from holdfast.errors import PickleRefused, StateError

if TYPE_CHECKING:
    from holdfast.core.decode import TreeDecoder


def _data(
    decoder: TreeDecoder, node: dict[str, Node], path: str, make: Callable[[Any], Any]
) -> Any:
    """`make` of the node's bytes: now if they are in the tree, else later."""
    if "leaf" not in node:
        return make(values.unb64(node.get("b64"), path))
    buffer = _buffer(decoder, node, path)
    return Later(lambda: make(bytes(buffer)))


def _buffer(decoder: TreeDecoder, node: dict[str, Node], path: str) -> bytearray:
    dtype, shape = decoder.spec(node["leaf"])
    if dtype != "U8" or len(shape) != 1:
        raise malformed(path, "its bytes are not stored as bytes")
    buffer = bytearray(shape[0])
    destination = BufferDestination(buffer)
    decoder.request(node["leaf"], destination)
    decoder.finish(destination.release)
    return buffer


def decode_str(decoder: TreeDecoder, node: dict[str, Node], target: object, path: str) -> Any:
    return _data(decoder, node, path, lambda data: values.from_utf8(data, path))


def decode_bytes(decoder: TreeDecoder, node: dict[str, Node], target: object, path: str) -> Any:
    return _data(decoder, node, path, bytes)


def decode_bytearray(decoder: TreeDecoder, node: dict[str, Node], target: object, path: str) -> Any:
    data = _buffer(decoder, node, path) if "leaf" in node else None
    if data is None:
        data = bytearray(values.unb64(node.get("b64"), path))
    if type(target) is bytearray and decoder.adopt(target, node):
        live, saved = target, data

        def update() -> None:
            live[:] = saved

        decoder.finish(update)
        return live
    return data


def decode_npstr(decoder: TreeDecoder, node: dict[str, Node], target: object, path: str) -> Any:
    """np.str_ and np.bytes_ are `str` and `bytes` of their own type."""
    kind, plain = (np.str_, str) if node["!"] == "npstr" else (np.bytes_, bytes)

    def make(value: object) -> Any:
        if type(value) is not plain:
            raise malformed(path, "its text is malformed")
        return kind(cast(Any, value))

    return then(decoder.decode_node(node.get("v"), NOTHING, path), make)


def decode_path(decoder: TreeDecoder, node: dict[str, Node], target: object, path: str) -> Any:
    text = decoder.decode_node(node.get("v"), NOTHING, path)
    return then(text, lambda text: values.decode_path(node, text, path))


def decode_enum(decoder: TreeDecoder, node: dict[str, Node], target: object, path: str) -> Any:
    name = node.get("type")
    if not isinstance(name, str):
        raise malformed(path, "its type is malformed")
    value = decoder.decode_node(node.get("v"), NOTHING, path)
    kind = classes.class_for(name, target)
    return then(value, lambda value: classes.make_enum(kind, node.get("name"), value, name))


def decode_range(decoder: TreeDecoder, node: dict[str, Node], target: object, path: str) -> Any:
    bounds = [decoder.decode_node(item, NOTHING, path) for item in items_of(node, path)]
    if len(bounds) != 3 or any(type(bound) is not int for bound in bounds) or bounds[2] == 0:
        raise malformed(path, "its bounds are malformed")
    return range(*bounds)


def decode_slice(decoder: TreeDecoder, node: dict[str, Node], target: object, path: str) -> Any:
    bounds = [decoder.decode_node(item, NOTHING, path) for item in items_of(node, path)]
    if len(bounds) != 3:
        raise malformed(path, "its bounds are malformed")
    return together(bounds, lambda bounds: slice(*bounds))


def decode_ellipsis(decoder: TreeDecoder, node: dict[str, Node], target: object, path: str) -> Any:
    return ...


def decode_pickle(decoder: TreeDecoder, node: dict[str, Node], target: object, path: str) -> Any:
    if not decoder.allow_pickle:
        raise PickleRefused(
            f"{path!r} is stored as a pickle (of {str(node.get('type'))[:200]}), "
            "which runs code when it is read",
            hint="Pass allow_pickle=True if you trust whoever wrote this run.",
        )

    def load(data: bytes) -> Any:
        try:
            return pickle.loads(data)  # noqa: S301 -- the caller asked for it by name
        except Exception as error:  # unpickling runs user code that raises anything
            raise StateError(
                f"cannot unpickle {path!r}: {error}",
                hint="It needs the modules and classes that it was saved with.",
            ) from error

    # Never before the whole checkpoint was accepted.
    data = _data(decoder, node, path, bytes)
    return Later(lambda: load(settle(data)))


# -- objects ----------------------------------------------------------------------


def decode_object(decoder: TreeDecoder, node: dict[str, Node], target: object, path: str) -> Any:
    """Without a live object: the state itself."""
    if callable(getattr(target, "load_state_dict", None)) and not isinstance(target, type):
        state = decoder.decode_node(node.get("v"), NOTHING, path)
        live = cast(Any, target)
        if decoder.adopt(target, node):
            decoder.finish(lambda: live.load_state_dict(settle(state)))
        return target
    if target is NOTHING or isinstance(target, dict | list):
        return decoder.decode_node(node.get("v"), cast(object, target), path)
    decoder.changed(path, str(node.get("type")), kind_name(target))
    return target


# -- random generators ------------------------------------------------------------------


def _state(decoder: TreeDecoder, node: dict[str, Node], path: str) -> dict[str, Any]:
    state = decoder.decode_node(node.get("v"), NOTHING, path)
    if type(state) is not dict:
        raise malformed(path, "its state is malformed")
    return cast(dict[str, Any], state)


_BIT_GENERATOR_TYPES = tuple(generators.BIT_GENERATORS.values())


def decode_generator(decoder: TreeDecoder, node: dict[str, Node], target: object, path: str) -> Any:
    """`random.Random`, RandomState and bit generators; in place if there is a live one."""
    tag = node["!"]
    state = _state(decoder, node, path)
    if tag == "random":
        value = target if type(target) is random.Random else random.Random(0)
    elif tag == "randomstate":
        live = type(target) is np.random.RandomState
        value = target if live else np.random.RandomState(np.random.MT19937(0))
    else:
        kind = generators.BIT_GENERATORS.get(str(state.get("bit_generator")))
        if kind is None:
            raise malformed(path, "it is an unknown bit generator")
        value = target if type(target) is kind else kind(0)
    if value is not target and decoder.is_live(target):
        decoder.changed(path, str(state.get("bit_generator", "random.Random")), kind_name(target))
        return target
    if value is target and not decoder.adopt(target, node):
        return decode_generator(decoder, node, NOTHING, path)
    decoder.finish(lambda: generators.set_state(tag, value, state))
    return value


def decode_numpy_generator(
    decoder: TreeDecoder, node: dict[str, Node], target: object, path: str
) -> Any:
    """A `numpy.random.Generator` is a bit generator and nothing else."""
    live = target if type(target) is np.random.Generator else None
    if live is None and decoder.is_live(target):
        decoder.changed(path, "numpy Generator", kind_name(target))
        return target
    inner: object = NOTHING if live is None else live.bit_generator
    fields = node.get("v")
    pairs = items_of(cast(Any, fields), path) if isinstance(fields, dict) else []
    if len(pairs) != 1 or not isinstance(pairs[0], list) or len(cast(list[Any], pairs[0])) != 2:
        raise malformed(path, "its state is malformed")
    bit_generator = decoder.decode_node(cast(list[Any], pairs[0])[1], inner, path)
    if live is not None and bit_generator is inner:
        return live
    if not isinstance(bit_generator, _BIT_GENERATOR_TYPES):
        raise malformed(path, "its state is malformed")
    return np.random.Generator(bit_generator)


def decode_seed_sequence(
    decoder: TreeDecoder, node: dict[str, Node], target: object, path: str
) -> Any:
    state = _state(decoder, node, path)
    return Later(lambda: generators.seed_sequence(state))
