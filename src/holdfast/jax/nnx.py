"""Modules, optimizers and metrics of flax.nnx: objects that change in place.

    {"!": "jax.nnx", "type": "__main__:Model", "v": <node of a dict>}

The dict has what `nnx.state` finds (parameters, statistics, random streams, the optimizer's
state), nested by attribute. Everything else is the program's. flax is never imported here:
whoever has such an object has done it.
"""

from __future__ import annotations

import sys
from typing import Any

from holdfast.core.adapters import NOTHING, Decoder, Encoder
from holdfast.core.classes import type_name
from holdfast.core.types import Node
from holdfast.errors import DamagedObject


def library() -> Any:
    """`flax.nnx`, if the program has imported it."""
    found = sys.modules.get("flax.nnx")
    return found if hasattr(found, "replace_by_pure_dict") else None


def is_module(value: object) -> bool:
    """Whether `value` is an object of nnx's that is filled in place."""
    nnx = library()
    if nnx is None or isinstance(value, type):
        return False
    return isinstance(value, getattr(nnx, "Pytree", None) or nnx.Object)


def content(value: Any) -> dict[Any, Any]:
    """What is saved of it: nested dicts of arrays, made for the occasion."""
    nnx: Any = library()
    return nnx.to_pure_dict(nnx.state(value))


def encode_module(value: Any, path: str, encoder: Encoder) -> dict[str, Node]:
    inner = encoder.encode(content(value), path)
    return {"!": "jax.nnx", "type": type_name(type(value)), "v": inner}


def decode_module(node: dict[str, Node], target: Any, path: str, decoder: Decoder) -> Any:
    inner = node.get("v")
    if not isinstance(inner, dict) or inner.get("!") != "dict":
        raise DamagedObject("the tree", "the state of a module is malformed", leaf=path)
    if not is_module(target):
        if decoder.filling:
            kind = str(node.get("type")).replace(":", ".")
            decoder.changed(path, f"a {kind}", f"no module of nnx ({type(target).__name__})")
            return target
        return decoder.decode(inner, NOTHING, path)
    nnx: Any = library()
    state = nnx.state(target)
    live = nnx.to_pure_dict(state)
    decoder.decode(inner, live, path)

    def update() -> None:
        nnx.replace_by_pure_dict(state, live)
        nnx.update(target, state)

    decoder.finish(update)
    return target
