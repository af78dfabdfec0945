"""KD trees and ball trees, which are built again from their points.

    {"!": "sklearn.neighbors", "type": "sklearn.neighbors._kd_tree:KDTree",
     "v": dict node of data, leaf_size, metric, p, sample_weight}

What their compiled code has built of the points is not saved: it would be followed without
looking. The same points give the same tree.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from holdfast.core.adapters import NOTHING, Decoder, Encoder
from holdfast.core.classes import type_name
from holdfast.core.leaves import Later, settle
from holdfast.core.types import Node
from holdfast.core.values import malformed
from holdfast.errors import StateError, UnsupportedValue
from holdfast.sklearn.classes import class_called

_TREES = {"KDTree": "_kd_tree", "BallTree": "_ball_tree"}
_METRICS = {
    "EuclideanDistance": "euclidean",
    "ManhattanDistance": "manhattan",
    "ChebyshevDistance": "chebyshev",
    "MinkowskiDistance": "minkowski",
    "HaversineDistance": "haversine",
}


def is_search_tree(kind: type) -> bool:
    """Whether it is one of scikit-learn's own two."""
    module = _TREES.get(kind.__name__.removesuffix("64"))
    found = sys.modules.get(f"sklearn.neighbors.{module}")
    return found is not None and kind.__module__ == found.__name__


def encode_search_tree(value: Any, path: str, encoder: Encoder) -> Node:
    kind = type(value)
    state = value.__getstate__()
    weight, metric, leaf_size = state[-1], state[-2], state[4]
    name = _METRICS.get(type(metric).__name__.removesuffix("64"))
    p, *others = metric.__getstate__()
    if name is None or (name == "minkowski" and len(others[0])):
        raise UnsupportedValue(
            path,
            f"{kind.__qualname__} with a {type(metric).__name__}",
            hint="Fit that estimator anew instead of tracking it, or pass allow_pickle=True.",
        )
    found = {
        "data": np.asarray(state[0]),
        "leaf_size": int(leaf_size),
        "metric": name,
        "p": float(p) if name == "minkowski" else None,
        "sample_weight": None if weight is None else np.asarray(weight),
    }
    qualified = type_name(kind)
    return {"!": "sklearn.neighbors", "type": qualified, "v": encoder.encode(found, path)}


def decode_search_tree(node: dict[str, Node], target: object, path: str, decoder: Decoder) -> Any:
    """A new tree, once its points are there."""
    state = decoder.decode(node.get("v"), NOTHING, path)
    kind = class_called(node.get("type"))
    if kind is None or not is_search_tree(kind):
        raise StateError(
            f"{path!r} is a {str(node.get('type'))[:200]}, which this scikit-learn does not have",
            hint="Install the version that wrote it.",
        )
    if (
        type(state) is not dict
        or not isinstance(state.get("data"), np.ndarray)
        or state.get("metric") not in _METRICS.values()
        or type(state.get("leaf_size")) is not int
    ):
        raise malformed(path, "its search tree is malformed")
    return Later(lambda: _built(kind, {name: settle(item) for name, item in state.items()}, path))


def _built(kind: Any, state: dict[str, Any], path: str) -> Any:
    options: dict[str, Any] = {"metric": state["metric"], "leaf_size": state["leaf_size"]}
    if state["metric"] == "minkowski":
        options["p"] = state.get("p")
    if state.get("sample_weight") is not None:
        options["sample_weight"] = state["sample_weight"]
    try:
        return kind(state["data"], **options)
    except (ValueError, TypeError) as error:
        raise malformed(path, f"its search tree cannot be built ({error})") from None
