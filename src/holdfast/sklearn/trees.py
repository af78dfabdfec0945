"""Decision trees: the arrays of `sklearn.tree._tree.Tree`, and checks of what they hold.

    {"!": "sklearn.tree", "v": dict of n_features, n_classes, n_outputs, max_depth, nodes, values}

scikit-learn's compiled code follows the numbers in these arrays without looking: a child that
is not there, a circle, or a depth that is not true would read and write outside of memory. So
they are checked before they are used.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from holdfast.core.adapters import NOTHING, Decoder, Encoder
from holdfast.core.leaves import Later, settle
from holdfast.core.types import Node
from holdfast.core.values import malformed
from holdfast.errors import StateError

_LEAF = -1
_FIELDS = ("n_features", "n_classes", "n_outputs", "max_depth", "nodes", "values")


def is_tree(value: object) -> bool:
    """Whether it is a `Tree`. Imports nothing: where there is one, its module is loaded."""
    module = sys.modules.get("sklearn.tree._tree")
    return module is not None and type(value) is module.Tree


def encode_tree(value: Any, path: str, encoder: Encoder) -> Node:
    _, (n_features, n_classes, n_outputs), state = value.__reduce__()
    found = {
        "n_features": int(n_features),
        "n_classes": [int(number) for number in n_classes],
        "n_outputs": int(n_outputs),
        "max_depth": int(state["max_depth"]),
        "nodes": state["nodes"],
        "values": state["values"],
    }
    return {"!": "sklearn.tree", "v": encoder.encode(found, path)}


def decode_tree(node: dict[str, Node], target: object, path: str, decoder: Decoder) -> Any:
    """A new tree, once its bytes are there: a live one is never changed."""
    state = decoder.decode(node.get("v"), NOTHING, path)
    if type(state) is not dict or any(name not in state for name in _FIELDS):
        raise malformed(path, "its tree is malformed")
    return Later(lambda: _tree({name: settle(state[name]) for name in _FIELDS}, path))


def _tree(state: dict[str, Any], path: str) -> Any:
    from sklearn.tree._tree import Tree

    n_features, n_outputs = state["n_features"], state["n_outputs"]
    classes, nodes, values = state["n_classes"], state["nodes"], state["values"]
    if (
        not _natural(n_features)
        or not _natural(n_outputs)
        or not isinstance(classes, list)
        or len(classes) != n_outputs
        or not all(_natural(number) and number for number in classes)
        or not isinstance(nodes, np.ndarray)
        or not isinstance(values, np.ndarray)
        or nodes.ndim != 1
        or values.shape != (len(nodes), n_outputs, max(classes, default=0))
    ):
        raise malformed(path, "its tree is malformed")
    try:
        left, right, feature = (nodes[n] for n in ("left_child", "right_child", "feature"))
    except (IndexError, ValueError):
        raise malformed(path, "the nodes of its tree are malformed") from None
    leaf = left == _LEAF
    if np.any(feature[~leaf] < 0) or np.any(feature[~leaf] >= n_features):
        raise malformed(path, "its tree names features that are not there")
    depth = checked_depth(left, right, leaf, path)
    if state["max_depth"] != depth:
        raise malformed(path, f"its tree has {depth} levels and claims {state['max_depth']}")
    tree = Tree(n_features, np.array(classes, np.intp), n_outputs)
    try:
        tree.__setstate__(
            {"max_depth": depth, "node_count": len(nodes), "nodes": nodes, "values": values}
        )
    except (ValueError, TypeError) as error:
        raise StateError(
            f"{path!r}: this scikit-learn does not read the trees of the one that wrote them "
            f"({error})",
            hint="Install the version that wrote them.",
        ) from None
    return tree


def checked_depth(left: Any, right: Any, leaf: Any, path: str) -> int:
    """How many levels are below the root of a tree whose every node has one parent, which
    comes before it. Raises DamagedObject if it is none."""
    count = len(left)
    inner = np.flatnonzero(~leaf)
    below = np.concatenate([left[inner], right[inner]]).astype(np.int64)
    above = np.concatenate([inner, inner])
    if (
        count == 0
        or np.any(below <= above)
        or np.any(below >= count)
        or len(below) != count - 1
        or len(np.unique(below)) != count - 1
    ):
        raise malformed(path, "its tree is none")
    levels = -1
    level = np.zeros(1, np.int64)
    while len(level):
        levels += 1
        level = level[~leaf[level]]
        level = np.concatenate([left[level], right[level]]).astype(np.int64)
    return levels


def check_predictor(state: dict[str, Any], path: str) -> None:
    """Raises DamagedObject if the arrays of a HistGradientBoosting's tree are none."""
    nodes = state.get("nodes")
    bits = [state.get(f"{kind}_left_cat_bitsets") for kind in ("binned", "raw")]
    if not isinstance(nodes, np.ndarray) or nodes.ndim != 1:
        raise malformed(path, "its tree is malformed")
    counts = [len(one) for one in bits if isinstance(one, np.ndarray) and one.shape[1:] == (8,)]
    if len(counts) != len(bits):
        raise malformed(path, "its categories are malformed")
    try:
        leaf = nodes["is_leaf"].astype(bool)
        checked_depth(nodes["left"], nodes["right"], leaf, path)
        split = ~leaf & nodes["is_categorical"].astype(bool)
        index = nodes["bitset_idx"][split]
        features = nodes["feature_idx"][~leaf]
    except (IndexError, ValueError):
        raise malformed(path, "the nodes of its tree are malformed") from None
    if np.any(features < 0) or np.any(index >= min(counts)):
        raise malformed(path, "its tree names categories or features that are not there")


def check_predictors(state: dict[str, Any], path: str) -> None:
    """As `check_predictor`, for what only the estimator knows: how many features there are."""
    limit = state.get("_n_features", state.get("n_features_in_"))
    if not _natural(limit):
        raise malformed(path, "it does not say how many features it has")
    for trees in state.get("_predictors", ()):
        for tree in trees:
            nodes = tree.nodes
            if np.any(nodes["feature_idx"][nodes["is_leaf"] == 0] >= limit):
                raise malformed(path, "a tree of it names features that are not there")


def _natural(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 31
