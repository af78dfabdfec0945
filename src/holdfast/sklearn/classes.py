"""Which classes are restored how, and how a class is found by its name.

A checkpoint names classes. Found are: the class of the live object, classes of modules that are
loaded, and those of scikit-learn's own public packages, which are imported for it. Instances
are made without `__init__`, and only of classes that are plain Python or listed here.
"""

from __future__ import annotations

import enum
import functools
import importlib
import sys
from typing import Any

import sklearn
from sklearn.base import BaseEstimator

from holdfast.core.classes import find_class, is_dataclass, is_namedtuple, type_name

_PACKAGES = frozenset(sklearn.__all__) | {"_loss", "utils"}
_REBUILT_MODULES = ("sklearn._loss._loss", "sklearn.linear_model._sgd_fast")
"""Extension modules of loss functions: objects that a few numbers describe."""
_HEAP_TYPE = 1 << 9  # CPython's flag of classes that are made by a class statement


@functools.lru_cache(maxsize=1024)
def is_plain_object(kind: type) -> bool:
    """Whether an instance of a class of scikit-learn, other than an estimator, is its
    attributes and nothing else."""
    return (
        kind.__module__.startswith("sklearn.")
        and not issubclass(kind, type | enum.Enum | BaseException)
        and not is_dataclass(kind)
        and not is_namedtuple(kind)
        and _is_plain(kind)
    )


@functools.lru_cache(maxsize=1024)
def _is_plain(kind: type) -> bool:
    own = [base for base in kind.__mro__ if base is not object]
    return (
        all(base.__flags__ & _HEAP_TYPE and not vars(base).get("__slots__") for base in own)
        and kind.__dictoffset__ != 0
        and not hasattr(kind, "__del__")
        # What sets a state in a way of its own cannot be trusted to be plain, but for
        # scikit-learn's own classes: they are looked at one by one.
        and (kind.__module__.startswith("sklearn.") or not has_own_state(kind))
    )


@functools.lru_cache(maxsize=1024)
def has_own_state(kind: type) -> bool:
    """Whether a class says itself what its state is, or how it is put back."""
    return any(
        getattr(kind, name, None) not in (getattr(BaseEstimator, name), getattr(object, name, None))
        for name in ("__getstate__", "__setstate__")
        if hasattr(kind, name)
    )


@functools.lru_cache(maxsize=64)
def is_rebuilt(kind: type) -> bool:
    """Whether an instance is what its class makes of a few numbers."""
    return kind.__module__ in _REBUILT_MODULES and any(
        "__reduce__" in vars(base) for base in kind.__mro__ if base is not object
    )


def class_called(name: object) -> type | None:
    """The class with this name, if it is there. See the module."""
    if not isinstance(name, str):
        return None
    found = find_class(name)
    if found is not None:
        return found
    root, *parts = name.partition(":")[0].split(".")
    if root != "sklearn" or not parts or parts[0] not in _PACKAGES:
        return None
    try:
        importlib.import_module(f"sklearn.{parts[0]}")
        for count in range(2, len(parts) + 1):  # what its package has not imported itself
            module = ".".join(["sklearn", *parts[:count]])
            if module not in sys.modules and _is_private_part(parts[count - 1]):
                importlib.import_module(module)
    except ImportError:
        return None
    return find_class(name)


def _is_private_part(name: str) -> bool:
    return name.isidentifier() and name not in ("tests", "conftest")


def new(kind: type | None) -> Any:
    """A blank instance of an estimator's class or of a plain object's; None if such a class
    must not, or cannot, have one."""
    if kind is None or not (
        (issubclass(kind, BaseEstimator) and _is_plain(kind)) or is_plain_object(kind)
    ):
        return None
    return object.__new__(kind)


def same_class(saved: str, live: type) -> bool:
    """Whether a class may have been called so in another version, or another script."""
    module, _, qualname = saved.partition(":")
    root, live_root = module.partition(".")[0], live.__module__.partition(".")[0]
    return qualname == live.__qualname__ and (root == live_root or "__main__" in (root, live_root))


def words(kind: type) -> str:
    """As errors call it.

    >>> from sklearn.dummy import DummyClassifier
    >>> words(DummyClassifier)
    'sklearn.dummy:DummyClassifier'
    """
    return type_name(kind)
