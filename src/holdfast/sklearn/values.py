"""What attributes of estimators hold beside arrays and plain values: functions and classes by
their names, NumPy's global RandomState, bunches, loss functions, sparse matrices.

`docs/format.md` has the tags.
"""

from __future__ import annotations

import builtins
import functools
import sys
import types
from typing import Any

import numpy as np
from sklearn.utils import Bunch

from holdfast.core import arrays
from holdfast.core.adapters import NOTHING, Decoder, Encoder
from holdfast.core.classes import Record
from holdfast.core.frameworks import callback_hint
from holdfast.core.leaves import Later, settle
from holdfast.core.types import Node
from holdfast.core.values import kind_name, malformed
from holdfast.errors import StateError, UnsupportedValue
from holdfast.sklearn import birch, restoring
from holdfast.sklearn.classes import class_called, is_rebuilt, type_name

GLOBAL: np.random.RandomState = np.random.mtrand._rand  # type: ignore[attr-defined]
"""What `random_state=None` draws from. The run saves and restores its state."""

_BUILTINS = (bool, int, float, complex, str, bytes, object)
_FUNCTIONS = frozenset(
    f"sklearn.{package}"
    for package in (
        *("cluster", "covariance", "decomposition", "ensemble", "feature_extraction"),
        *("feature_selection", "gaussian_process", "linear_model", "manifold", "metrics"),
        *("mixture", "neighbors", "neural_network", "preprocessing", "svm", "tree"),
    )
)
"""Packages whose functions are found by name: they compute, and read no files."""
_ALSO = ("sklearn.utils.validation:check_array",)
_SPARSE = {
    "csr": ("data", "indices", "indptr"),
    "csc": ("data", "indices", "indptr"),
    "bsr": ("data", "indices", "indptr"),
    "coo": ("data", "row", "col"),
    "dia": ("data", "offsets"),
}


class UnsupportedAttribute(UnsupportedValue):
    """An attribute of an estimator has a type that cannot be stored without pickle."""


def encode_attribute(value: Any, path: str, encoder: Encoder, owner: str) -> Node:
    """The node of an attribute of an `owner`. Raises UnsupportedValue."""
    if value is GLOBAL:
        return {"!": "sklearn.global"}
    if type(value) is functools.partial:
        return _encode_partial(value, path, encoder, owner)
    if name := _name_of(value):
        return {"!": "sklearn.name", "v": name}
    if isinstance(value, np.dtype):
        return {"!": "sklearn.name", "dtype": arrays.dtype_node(value, path)}
    if _is_sparse(value):
        return _encode_sparse(value, path, encoder)
    if type(value) in (list, tuple) and any(map(_is_named, value)):
        items = [
            encode_attribute(item, f"{path}/{number}", encoder, owner)
            for number, item in enumerate(value)
        ]
        return items if type(value) is list else {"!": "tuple", "v": items}
    if birch.is_node(type(value)) and path.endswith("/dummy_leaf_"):
        return birch.encode_leaves(value, path, encoder)
    try:
        return encoder.encode(value, path)
    except UnsupportedValue as error:
        if isinstance(error, UnsupportedAttribute):
            raise
        raise UnsupportedAttribute(
            error.path,
            f"{error.kind}, a part of {owner}",
            hint=callback_hint(error.kind.removeprefix("value of type "))
            or "Fit that estimator anew instead of tracking it, or pass allow_pickle=True.",
        ) from None


def _is_named(value: Any) -> bool:
    return isinstance(value, np.dtype | functools.partial) or bool(_name_of(value))


# -- names ----------------------------------------------------------------------


def _name_of(value: Any) -> str:
    """Of a function or a class; "" for anything else."""
    if isinstance(value, np.ufunc):
        module = "scipy.special" if getattr(np, value.__name__, None) is not value else "numpy"
        return f"{module}:{value.__name__}"
    if isinstance(value, types.MethodType) or not callable(value):
        return ""
    module, name = (getattr(value, key, None) for key in ("__module__", "__qualname__"))
    return f"{module}:{name}" if isinstance(module, str) and isinstance(name, str) else ""


def decode_name(node: dict[str, Node], target: object, path: str, decoder: Decoder) -> Any:
    """The live function or class if it is called so, else one that is known to do no harm."""
    if "dtype" in node:
        return arrays.parse_dtype(node["dtype"], path)
    name = node.get("v")
    if not isinstance(name, str):
        raise malformed(path, "its name is malformed")
    if target is not NOTHING and _name_of(target) == name:
        return target
    found = _known(name)
    if found is None and target is NOTHING and not restoring.is_live(decoder):
        return Record(name)
    if found is None:
        decoder.changed(path, name, _name_of(target) or kind_name(target))
        return target
    return found


def _known(name: str) -> Any:
    module, _, attribute = name.partition(":")
    if module == "numpy":
        found = vars(np).get(attribute)
        is_scalar = isinstance(found, type) and issubclass(found, np.generic)
        return found if is_scalar or isinstance(found, np.ufunc) else None
    if module == "builtins":
        found = vars(builtins).get(attribute)
        return found if found in _BUILTINS else None
    if module == "scipy.special":
        found = getattr(sys.modules.get(module), attribute, None)
        return found if isinstance(found, np.ufunc) else None
    package = ".".join(module.split(".")[:2])
    if package in _FUNCTIONS or name in _ALSO:
        class_called(f"{module}:")  # imports the package
        found = vars(sys.modules[module]).get(attribute) if module in sys.modules else None
        is_function = isinstance(found, types.FunctionType | types.BuiltinFunctionType)
        return found if is_function and _name_of(found) == name else None
    return None


def _encode_partial(value: Any, path: str, encoder: Encoder, owner: str) -> Node:
    keywords: list[Node] = [
        [
            encoder.encode(key, path),
            encode_attribute(item, f"{path}/keywords/{key}", encoder, owner),
        ]
        for key, item in value.keywords.items()
    ]
    return {
        "!": "sklearn.partial",
        "func": encode_attribute(value.func, f"{path}/func", encoder, owner),
        "args": encoder.encode(list(value.args), f"{path}/args"),
        "keywords": {"!": "dict", "v": keywords},
    }


def decode_partial(node: dict[str, Node], target: object, path: str, decoder: Decoder) -> Any:
    live = target.func if type(target) is functools.partial else NOTHING
    func = decoder.decode(node.get("func"), live, f"{path}/func")
    args = decoder.decode(node.get("args"), NOTHING, f"{path}/args")
    keywords = decoder.decode(node.get("keywords"), NOTHING, f"{path}/keywords")
    if not callable(func) or type(args) is not list or type(keywords) is not dict:
        if isinstance(func, Record):
            return func
        raise malformed(path, "its function is malformed")
    return Later(
        lambda: functools.partial(
            func,
            *(settle(one) for one in args),
            **{key: settle(one) for key, one in keywords.items()},
        )
    )


def decode_global(node: dict[str, Node], target: object, path: str, decoder: Decoder) -> Any:
    if isinstance(target, np.random.RandomState) and target is not GLOBAL:
        decoder.changed(path, "NumPy's global RandomState", kind_name(target))
        return target
    return GLOBAL


# -- bunches, losses ----------------------------------------------------------------


def encode_bunch(value: Any, path: str, encoder: Encoder) -> Node:
    return {"!": "sklearn.bunch", "v": encoder.encode(dict(value), path)}


def decode_bunch(node: dict[str, Node], target: object, path: str, decoder: Decoder) -> Any:
    found = decoder.decode(node.get("v"), NOTHING, path)
    if type(found) is not dict or not all(isinstance(key, str) for key in found):
        raise malformed(path, "its items are malformed")
    bunch = target if type(target) is Bunch else Bunch()

    def finish() -> None:
        bunch.clear()
        bunch.update((key, settle(value)) for key, value in found.items())

    decoder.finish(finish)
    return bunch


def encode_rebuilt(value: Any, path: str, encoder: Encoder) -> Node:
    kind = type(value)
    maker, arguments, *state = value.__reduce__()
    if len(arguments) == 3 and arguments[0] is kind and not state:
        maker, arguments = kind, arguments[2] or ()  # as Cython has it: these are all attributes
    if maker is not kind or not all(type(one) in (int, float) for one in arguments):
        raise UnsupportedValue(
            path, f"value of type {type_name(kind)}", hint="Pass allow_pickle=True."
        )
    nodes = [encoder.encode(one, path) for one in arguments]
    return {"!": "sklearn.rebuilt", "type": type_name(kind), "v": nodes}


def decode_rebuilt(node: dict[str, Node], target: object, path: str, decoder: Decoder) -> Any:
    nodes, kind = node.get("v"), class_called(node.get("type"))
    if not isinstance(nodes, list):
        raise malformed(path, "its arguments are malformed")
    arguments = [decoder.decode(one, NOTHING, path) for one in nodes]
    if any(type(one) not in (int, float) for one in arguments):
        raise malformed(path, "its arguments are malformed")
    if kind is None or not is_rebuilt(kind):
        raise StateError(
            f"{path!r} is a {str(node.get('type'))[:200]}, which this scikit-learn does not have",
            hint="Install the version that wrote it.",
        )
    try:
        return kind(*arguments)
    except (TypeError, ValueError):
        raise malformed(path, "its arguments are malformed") from None


# -- sparse matrices ---------------------------------------------------------------


def _is_sparse(value: Any) -> bool:
    sparse = sys.modules.get("scipy.sparse")
    return (
        sparse is not None
        and sparse.issparse(value)
        and value.format in _SPARSE
        and value.ndim == 2
        and type(value).__name__ in (f"{value.format}_matrix", f"{value.format}_array")
    )


def _encode_sparse(value: Any, path: str, encoder: Encoder) -> Node:
    parts = {name: getattr(value, name) for name in _SPARSE[value.format]}
    return {
        "!": "sklearn.sparse",
        "type": type(value).__name__,
        "shape": [int(size) for size in value.shape],
        "v": encoder.encode(parts, path),
    }


def decode_sparse(node: dict[str, Node], target: object, path: str, decoder: Decoder) -> Any:
    """A new matrix, once its arrays are there; checked, for SciPy's code trusts it."""
    from scipy import sparse

    name, shape = node.get("type"), node.get("shape")
    parts = decoder.decode(node.get("v"), NOTHING, path)
    wanted = _SPARSE.get(str(name).partition("_")[0], ())
    if (
        not wanted
        or name not in (f"{str(name)[:3]}_matrix", f"{str(name)[:3]}_array")
        or not isinstance(shape, list)
        or len(shape) != 2
        or any(type(size) is not int or not 0 <= size < 1 << 62 for size in shape)
        or type(parts) is not dict
        or not all(isinstance(parts.get(part), np.ndarray) for part in wanted)
    ):
        raise malformed(path, "its sparse matrix is malformed")

    def build() -> Any:
        data, *places = (parts[part] for part in wanted)
        given = (data, tuple(places)) if name.startswith("coo") else (data, *places)
        try:
            made = getattr(sparse, name)(given, shape=tuple(shape))
            if hasattr(made, "check_format"):
                made.check_format(full_check=True)
        except (ValueError, TypeError, IndexError) as error:
            raise malformed(path, f"its sparse matrix is none ({error})") from None
        return made

    return Later(build)
