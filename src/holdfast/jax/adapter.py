"""The adapter: which node and which function belong to which value of JAX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.core import Tracer

from holdfast.core.adapters import Decoder, Encoder, Waiting
from holdfast.core.classes import is_namedtuple, type_name
from holdfast.core.types import Node
from holdfast.errors import FormatTooNew, UnsupportedValue
from holdfast.jax import contents
from holdfast.jax.arrays import decode_array, decode_key, encode_arrays, encode_key, is_key
from holdfast.jax.nnx import decode_module, encode_module, is_module
from holdfast.jax.trees import decode_code, decode_node, encode_node, parts_of

try:
    from jax._src.array import ArrayImpl

    _TOGETHER: frozenset[type] = frozenset({ArrayImpl})
except ImportError:  # then they are encoded one by one
    _TOGETHER = frozenset()


class JaxAdapter:
    """Implements core.adapters.Adapter for JAX."""

    name = "jax"
    together = _TOGETHER
    contents = contents
    """What values hold, for the search for state that nobody saves."""

    def claims(self, value: object) -> bool:
        """Whether the program has registered the class of `value` as a node of pytrees. One
        with a state of its own (`state_dict`) is asked for that instead."""
        kind = type(value)
        if isinstance(value, type) or hasattr(kind, "load_state_dict"):
            return False
        if isinstance(value, dict | list) or is_namedtuple(kind):
            return False  # the tree has names for them, and values for them anywhere
        return parts_of(value) is not None

    def encode(self, value: object, path: str, encoder: Encoder) -> Node | None:
        if is_key(value) and not isinstance(value, Tracer):
            return encode_key(value, path, encoder)
        if isinstance(value, jax.Array):
            node: dict[str, Node] = {}
            encode_arrays([(value, path, node)], encoder)
            return node
        if isinstance(value, jax.ShapeDtypeStruct):
            raise UnsupportedValue(
                path,
                f"{value}, without data",
                hint="It says what to restore into; a save needs the array itself.",
            )
        if is_module(value):
            return encode_module(value, path, encoder)
        if hasattr(type(value), "load_state_dict"):
            return None
        parts = parts_of(value)
        return None if parts is None else encode_node(value, parts, path, encoder)

    def encode_together(self, waiting: Sequence[Waiting], encoder: Encoder) -> None:
        encode_arrays(waiting, encoder)

    def decode(self, node: dict[str, Node], target: object, path: str, decoder: Decoder) -> Any:
        tag = node["!"]
        if tag == "jax.code":
            return decode_code(target)
        if tag in ("jax.node", "jax.tuple"):
            return decode_node(node, target, path, decoder)
        if tag == "jax.nnx":
            kind, words, decode = object, "a module of nnx", decode_module
            fits = is_module(target)
        elif tag in ("jax.array", "jax.key"):
            kind = (jax.Array, jax.ShapeDtypeStruct)
            words = "an array" if tag == "jax.array" else "a random key"
            decode = decode_array if tag == "jax.array" else decode_key
            fits = isinstance(target, kind)
        else:
            raise FormatTooNew(
                f"{path!r} is a {str(tag)[:80]!r}, which this Holdfast does not know",
                hint="Upgrade: pip install -U holdfast",
            )
        if not fits and self.is_live(target):
            decoder.changed(path, words, f"a {type_name(type(target))}")
            return target
        return decode(node, target, path, decoder)

    def is_live(self, value: object) -> bool:
        if isinstance(value, jax.Array | jax.ShapeDtypeStruct) or is_module(value):
            return True
        kind = type(value)
        if kind.__module__ in ("builtins", "numpy") or isinstance(value, dict | list):
            return False
        return parts_of(value) is not None

    def is_structural(self, value: object) -> bool:
        """Whether containers of it are part of a pytree, which a restore adds nothing to."""
        if is_namedtuple(type(value)):  # the tree looks at its items
            return type(value).__module__.partition(".")[0] in ("optax", "flax", "equinox")
        return self.is_live(value)

    def is_replaced(self, value: object) -> bool:
        """Whether a program replaces it at each step, so that to track it is a mistake."""
        if isinstance(value, tuple):
            return any(self.is_replaced(item) for item in value)
        return self.is_live(value) and not is_module(value)

    def find_untracked(self, scope: Mapping[str, Any], tracked: Mapping[str, Any]) -> list[str]:
        """Names in a caller's frame of modules and optimizers that should be tracked, too."""
        return contents.find_untracked(scope, tracked)

    def capture_rng(self) -> dict[str, object]:
        """Keys are values: the program's."""
        return {}

    def apply_rng(self, states: dict[str, Any]) -> None: ...

    def derived_rng(self, states: dict[str, Any], rank: int) -> dict[str, Any]:
        return states


adapter = JaxAdapter()
