"""Estimators, and scikit-learn's other plain objects, as their attributes.

    {"!": "sklearn.estimator", "type": "sklearn.linear_model._stochastic_gradient:SGDClassifier",
     "version": "1.9.1", "v": dict node of its attributes}

`sklearn.object` is the same for what is no estimator (a loss, an optimizer, a tree of
HistGradientBoosting).

Into a live estimator: what its class is constructed with is restored in place (the steps of a
pipeline, a RandomState that several share), and what fitting has made is made anew. Attributes
that the checkpoint lacks are removed, as they were not there when it was saved.
"""

from __future__ import annotations

import inspect
import types
import warnings
from collections.abc import Mapping
from typing import Any

import sklearn
from sklearn.base import BaseEstimator

from holdfast.core.adapters import NOTHING, Decoder, Encoder
from holdfast.core.classes import Record, type_name
from holdfast.core.leaves import settle
from holdfast.core.types import Node
from holdfast.core.values import malformed
from holdfast.errors import StateError, UnsupportedValue
from holdfast.sklearn import birch, restoring
from holdfast.sklearn.classes import class_called, has_own_state, is_plain_object, new, same_class
from holdfast.sklearn.trees import check_predictor, check_predictors
from holdfast.sklearn.values import encode_attribute

MACHINE = frozenset({"n_jobs", "verbose", "memory", "pre_dispatch", "cache_size"})
"""Parameters that say how something is computed, not what: the live ones stay."""

_NOT_SAVED = frozenset({"memory"})
"""A folder of pickles of this machine, or joblib's object for it."""
_NAMED_PARTS = ("steps", "transformers", "estimators", "transformer_list")
"""Parameters that are lists of (name, estimator)."""
_NEEDS_LIVE = frozenset({"object", "torch.module", "torch.optimizer", "torch.object"})


# -- capture ------------------------------------------------------------------


def encode_object(value: Any, path: str, encoder: Encoder, *, tag: str) -> Node:
    kind = type(value)
    parameters = _parameters(kind)
    state = dict(vars(value))
    if has_own_state(kind):
        state = value.__getstate__()
        if not isinstance(state, dict):
            raise UnsupportedValue(
                path,
                f"{kind.__qualname__} whose __getstate__() returned no dict",
                hint="Give it state_dict() and load_state_dict().",
            )
        state = {name: item for name, item in state.items() if name != "_sklearn_version"}
    if birch.is_node(kind):
        state = {name: None if name in birch.LINKS else item for name, item in state.items()}
    derived = [name for name in state if _is_derived(value, name) and state[name] is not None]
    pairs: list[Node] = [
        [
            encoder.encode(name, path),
            encode_attribute(item, f"{path}/{name}", encoder, kind.__qualname__),
        ]
        for name, item in state.items()
        if name not in derived
        and not (name in _NOT_SAVED and name in parameters)
        and not _is_own_method(value, name, item)
    ]
    node: dict[str, Node] = {"!": tag, "type": type_name(kind)}
    if tag == "sklearn.estimator":
        node["version"] = sklearn.__version__
    if derived:
        node["derived"] = list(derived)
    node["v"] = {"!": "dict", "v": pairs}
    return node


def _is_own_method(value: Any, name: str, item: Any) -> bool:
    """Whether an attribute hides a method of the class with that method: what is left of a
    patch that was taken back."""
    return (
        isinstance(item, types.MethodType)
        and item.__self__ is value
        and item.__func__ is getattr(type(value), name, None)
    )


def _is_derived(value: Any, name: str) -> bool:
    """Whether it is made of the parameters: a scorer holds the estimator itself."""
    return name == "_scorer" and hasattr(value, "scoring") and hasattr(value, "_predictors")


def _parameters(kind: type) -> frozenset[str]:
    if not issubclass(kind, BaseEstimator):
        return frozenset()
    return frozenset(kind._get_param_names())


# -- restore ------------------------------------------------------------------


def decode_object(node: dict[str, Node], target: object, path: str, decoder: Decoder) -> Any:
    """Into the live estimator or object `target`; else a new one, if its class may be made;
    else a Record of its attributes."""
    name, pairs = node.get("type"), _pairs(node.get("v"), path)
    if not isinstance(name, str):
        raise malformed(path, "its type is malformed")
    kind: type | None = type(target)
    live = isinstance(target, BaseEstimator) or is_plain_object(type(target))
    if live and not same_class(name, type(target)):
        decoder.changed(path, name, type_name(type(target)))
        return target
    _say_version(node, path, decoder)
    value: Any = target
    if not live:
        kind = class_called(name)
        value = new(kind)
        if value is None and restoring.is_live(decoder):
            raise StateError(
                f"{path!r} is a {name[:200]}, which cannot be made here",
                hint="Import its module before the restore. If it defines __getstate__, "
                "__setstate__ or __slots__, give it state_dict() and load_state_dict().",
            )
    with restoring.into_live(decoder, live):
        found = _decode_attributes(pairs, value if live else None, kind, path, decoder)
    if value is None or kind is None:
        record = Record(name, found)
        decoder.finish(lambda: record.fields.update({k: settle(v) for k, v in found.items()}))
        return record
    kept = _kept(value, found, path, decoder) if live else {}
    derived = node.get("derived", [])

    def finish() -> None:
        state = {key: settle(item) for key, item in found.items()}
        _check(kind, state, path)
        space = vars(value)
        space.clear()
        space.update({**state, **kept})
        for key, default in _defaults(kind).items():
            space.setdefault(key, default)
        if has_own_state(kind):
            value.__setstate__({**space, "_sklearn_version": sklearn.__version__})
            space.pop("_sklearn_version", None)
        if derived == ["_scorer"] and _is_derived(value, "_scorer"):
            from sklearn.metrics import check_scoring

            space["_scorer"] = check_scoring(value, value.scoring)

    decoder.finish(finish)
    return value


def _decode_attributes(
    pairs: list[tuple[str, Node]],
    live: Any,
    kind: type | None,
    path: str,
    decoder: Decoder,
) -> dict[str, Any]:
    parameters = frozenset[str]() if kind is None else _parameters(kind)
    current: dict[str, Any] = {} if live is None else vars(live)
    foreign = live is not None and not type(live).__module__.startswith("sklearn.")
    found: dict[str, Any] = {}
    # Parameters first: what fitting has made may refer to the RandomState that is one.
    for name, inner in sorted(pairs, key=lambda pair: pair[0] not in parameters):
        where = f"{path}/{name}"
        if live is not None and name in parameters and name in current:
            if name in MACHINE or not _same_parts(name, inner, current[name], where, decoder):
                found[name] = current[name]
                continue
            found[name] = decoder.decode(inner, current[name], where)
        elif foreign and name not in parameters:
            # Objects of the program's own class may hold others that are live: a network.
            here = current.get(name, NOTHING)
            if here is NOTHING and _needs_live(inner):
                decoder.unexpected(where, f"the live {type(live).__qualname__} has nothing there")
                continue
            found[name] = decoder.decode(inner, here, where)
        else:
            found[name] = decoder.decode(inner, NOTHING, where)
    return {name: found[name] for name, _ in pairs if name in found}


def _same_parts(name: str, node: Node, live: Any, path: str, decoder: Decoder) -> bool:
    """Whether the named parts of a pipeline, or of another composition, are the same ones."""
    if name not in _NAMED_PARTS or not isinstance(node, list) or not isinstance(live, list):
        return True
    saved = [_first(item) for item in node if _first(item) is not None]
    here = [item[0] for item in live if isinstance(item, tuple) and item]
    if saved != here:
        decoder.changed(path, ", ".join(map(str, saved)), ", ".join(map(str, here)))
    return saved == here


def _first(node: Node) -> Node:
    if isinstance(node, dict) and node.get("!") == "tuple":
        items = node.get("v")
        if isinstance(items, list) and items:
            return items[0]
    return None


def _kept(live: Any, found: Mapping[str, Any], path: str, decoder: Decoder) -> dict[str, Any]:
    """Attributes of the live one that the checkpoint lacks, and that stay."""
    parameters = _parameters(type(live))
    own = not type(live).__module__.startswith("sklearn.")
    return {
        name: value
        for name, value in vars(live).items()
        if name not in found
        and (
            name in parameters  # this version has one more
            or not decoder.selection.wanted(f"{path}/{name}")
            or (own and not name.endswith("_"))  # the program's __init__ sets one more
        )
    }


def _defaults(kind: type) -> dict[str, Any]:
    """Of parameters: for those that the checkpoint lacks."""
    if not issubclass(kind, BaseEstimator):
        return {}
    parameters = inspect.signature(kind.__init__).parameters
    return {
        name: parameters[name].default
        for name in _parameters(kind)
        if name in parameters and parameters[name].default is not inspect.Parameter.empty
    }


def _check(kind: type, state: dict[str, Any], path: str) -> None:
    """What compiled code would follow without looking."""
    if kind.__qualname__ == "TreePredictor":
        check_predictor(state, path)
    elif "_predictors" in state and kind.__module__.startswith("sklearn."):
        check_predictors(state, path)


def _pairs(node: Node, path: str) -> list[tuple[str, Node]]:
    """Names and nodes of the attributes."""
    pairs = node.get("v") if isinstance(node, dict) and node.get("!") == "dict" else None
    if not isinstance(pairs, list):
        raise malformed(path, "its attributes are malformed")
    found: dict[str, Node] = {}
    for pair in pairs:
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not isinstance(pair[0], str)
            or pair[0].startswith("__")
            or pair[0] in found
        ):
            raise malformed(path, "its attributes are malformed")
        found[pair[0]] = pair[1]
    return list(found.items())


def _needs_live(node: Node) -> bool:
    """Whether there is something in it that only a live object can take."""
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            if one.get("!") in _NEEDS_LIVE:
                return True
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
    return False


def _say_version(node: dict[str, Node], path: str, decoder: Decoder) -> None:
    """Once in a restore, if another scikit-learn has written it."""
    saved, memo = node.get("version", sklearn.__version__), decoder.alias("sklearn")
    if saved != sklearn.__version__ and not memo.get("told"):
        memo["told"] = True
        warnings.warn(
            f"{path!r} was saved by scikit-learn {str(saved)[:40]}, and this is "
            f"{sklearn.__version__}: it may go on otherwise, or not at all",
            RuntimeWarning,
            stacklevel=2,
        )
