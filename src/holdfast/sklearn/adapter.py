"""The adapter: which node and which function belong to which value of scikit-learn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sklearn.base import BaseEstimator
from sklearn.utils import Bunch

from holdfast.core.adapters import Decoder, Encoder, Waiting
from holdfast.core.classes import type_name
from holdfast.core.types import Node
from holdfast.errors import FormatTooNew
from holdfast.sklearn import contents, settings
from holdfast.sklearn.birch import decode_leaves
from holdfast.sklearn.classes import is_plain_object, is_rebuilt
from holdfast.sklearn.estimators import decode_object, encode_object
from holdfast.sklearn.neighbors import decode_search_tree, encode_search_tree, is_search_tree
from holdfast.sklearn.trees import decode_tree, encode_tree, is_tree
from holdfast.sklearn.values import (
    decode_bunch,
    decode_global,
    decode_name,
    decode_partial,
    decode_rebuilt,
    decode_sparse,
    encode_bunch,
    encode_rebuilt,
)

_DECODERS: dict[str, Callable[[dict[str, Node], object, str, Decoder], Any]] = {
    "sklearn.estimator": decode_object,
    "sklearn.object": decode_object,
    "sklearn.tree": decode_tree,
    "sklearn.neighbors": decode_search_tree,
    "sklearn.leaves": decode_leaves,
    "sklearn.bunch": decode_bunch,
    "sklearn.rebuilt": decode_rebuilt,
    "sklearn.name": decode_name,
    "sklearn.partial": decode_partial,
    "sklearn.global": decode_global,
    "sklearn.sparse": decode_sparse,
}


class SklearnAdapter:
    """Implements core.adapters.Adapter for scikit-learn."""

    name = "sklearn"
    together: frozenset[type] = frozenset()
    contents = contents
    """What estimators hold, for the search for state that nobody saves."""

    def encode(self, value: object, path: str, encoder: Encoder) -> Node | None:
        if callable(getattr(type(value), "state_dict", None)):
            return None  # it knows better
        if isinstance(value, BaseEstimator):
            return encode_object(value, path, encoder, tag="sklearn.estimator")
        if is_tree(value):
            return encode_tree(value, path, encoder)
        if type(value) is Bunch:
            return encode_bunch(value, path, encoder)
        if is_search_tree(type(value)):
            return encode_search_tree(value, path, encoder)
        if is_rebuilt(type(value)):
            return encode_rebuilt(value, path, encoder)
        if is_plain_object(type(value)):
            return encode_object(value, path, encoder, tag="sklearn.object")
        return None

    def encode_together(self, waiting: Sequence[Waiting], encoder: Encoder) -> None:
        raise AssertionError("there are no types to be encoded together")

    def decode(self, node: dict[str, Node], target: object, path: str, decoder: Decoder) -> Any:
        decode = _DECODERS.get(str(node["!"]))
        if decode is None:
            raise FormatTooNew(
                f"{path!r} is a {str(node['!'])[:80]!r}, which this Holdfast does not know",
                hint="Upgrade: pip install -U holdfast",
            )
        if isinstance(target, BaseEstimator) and decode is not decode_object:
            decoder.changed(path, f"a {node['!']}", f"a {type_name(type(target))}")
            return target
        return decode(node, target, path, decoder)

    def is_live(self, value: object) -> bool:
        return isinstance(value, BaseEstimator)

    def settings(self, tracked: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters of tracked estimators that are not fitted yet, by name."""
        return settings.read(tracked)

    def put_settings(self, tracked: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """Set some of them."""
        settings.write(tracked, values)

    def is_derived(self, name: str) -> bool:
        """None is computed from others."""
        return False

    def capture_rng(self) -> dict[str, object]:
        return {}  # it draws from NumPy's global generator, or from what estimators hold

    def apply_rng(self, states: dict[str, Any]) -> None:
        pass

    def derived_rng(self, states: dict[str, Any], rank: int) -> dict[str, Any]:
        return states


adapter = SklearnAdapter()
