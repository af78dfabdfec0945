"""Finds the adapters of frameworks, and imports one only when it is needed."""

from __future__ import annotations

import importlib
import sys
from itertools import islice
from typing import Any, cast

from holdfast.core.adapters import Adapter
from holdfast.core.group import Group
from holdfast.core.types import Node
from holdfast.errors import StateError

ADAPTERS = {"torch": "holdfast.torch", "jax": "holdfast.jax", "sklearn": "holdfast.sklearn"}
"""Root package of a framework -> the module that has its `adapter`."""

_OWN_LOOPS = ("keras", "lightgbm", "xgboost")
"""Root packages whose models a callback of the module of that name saves."""

_MEMBERS = {
    "accelerate": "torch",
    "equinox": "jax",
    "flax": "jax",
    "jaxlib": "jax",
    "optax": "jax",
}
"""Root packages whose classes belong to a framework of another name."""

_CLAIMING = ("jax",)
"""Frameworks with which programs register classes of their own: their adapters are asked."""

_OWN_TYPES = frozenset({"builtins", "collections", "numpy"})
"""Modules whose classes nobody claims."""

_NUMBERS = frozenset({type(None), bool, int, float, complex, str, bytes})
_STRUCTURE_DEPTH = 12
_STRUCTURE_ITEMS = 64  # of one container: long ones are data

_roots_of_type: dict[type, tuple[str, ...]] = {}


def adapter_for_value(value: object) -> Adapter | None:
    """The adapter of the framework that the type of `value`, or a base of it, comes
    from, or to which the program has made it known; None if there is none. Imports no
    framework."""
    kind = type(value)
    roots = _roots_of_type.get(kind)
    if roots is None:
        found = dict.fromkeys(base.__module__.partition(".")[0] for base in kind.__mro__)
        named = dict.fromkeys(_MEMBERS.get(root, root) for root in found)
        roots = tuple(root for root in named if root in ADAPTERS)
        _roots_of_type[kind] = roots
    for root in roots:
        if root in sys.modules:
            return _load(root)
    # Not remembered by type: a class may be registered after it was first met.
    if kind.__module__ not in _OWN_TYPES:
        for root in _CLAIMING:
            if root in sys.modules and _is_imported(root):
                adapter: Any = _load(root)
                if adapter.claims(value):
                    return adapter
    return None


def callback_hint(kind: str) -> str:
    """What to do with a value of the class `kind` that a callback saves; "" for any other.

    >>> callback_hint("xgboost.core.Booster")
    'Leave it out, and give its training a callback: holdfast.xgboost.Callback(run).'
    """
    name = kind.partition(".")[0]
    if name not in _OWN_LOOPS:
        return ""
    return f"Leave it out, and give its training a callback: holdfast.{name}.Callback(run)."


def state_node(node: dict[str, Node], target: object) -> dict[str, Node] | None:
    """The node of a live object of `target`'s kind whose state a saved dict can be; None if it
    cannot be one."""
    verb = getattr(adapter_for_value(target), "state_node", None)
    return None if verb is None else verb(node, target)


def is_structural(value: object) -> bool:
    """Whether `value` is, or holds as an item of plain containers, something whose container
    is a structure of the program's: what a restore fills, and adds nothing to."""
    found = [getattr(one, "is_structural", None) for one in loaded_adapters()]
    verbs = [verb for verb in found if verb is not None]
    return bool(verbs) and _holds(value, verbs, _STRUCTURE_DEPTH)


def is_replaced(value: object) -> bool:
    """Whether a step makes a new value instead of changing this one (see `Adapter`)."""
    found = [getattr(one, "is_replaced", None) for one in loaded_adapters()]
    return any(verb(value) for verb in found if verb is not None)


def _holds(value: object, verbs: list[Any], depth: int) -> bool:
    kind = type(value)
    if kind in _NUMBERS or depth == 0:
        return False
    if isinstance(value, dict):
        items: Any = cast("dict[Any, Any]", value).values()
    elif isinstance(value, list | tuple) and not any(verb(value) for verb in verbs):
        items = cast("list[Any]", value)
    else:
        return any(verb(value) for verb in verbs)
    return any(_holds(item, verbs, depth - 1) for item in islice(items, _STRUCTURE_ITEMS))


def adapter_for_tag(tag: str) -> Adapter | None:
    """The adapter that reads nodes tagged `tag` ("torch.tensor"); None for a tag of
    no framework. Imports the framework; raises StateError if it is not installed."""
    root, dot, _ = tag.partition(".")
    return _load(root) if dot and root in ADAPTERS else None


def adapter_named(root: str, purpose: str) -> Any:
    """The adapter of a framework that is needed for `purpose`. Imports the framework; raises
    StateError if it is not installed."""
    return _load(root, purpose)


def loaded_adapters() -> list[Adapter]:
    """The adapters of the frameworks that this process has imported."""
    return [_load(root) for root in ADAPTERS if _is_imported(root)]


def process_group() -> Group | None:
    """The processes that a framework has connected with this one, to train together; None
    where there are no others. To be called by all of them. Raises GroupError."""
    for adapter in loaded_adapters():
        verb = getattr(adapter, "process_group", None)
        if verb is not None and (group := verb()) is not None:
            return group
    return None


def _is_imported(root: str) -> bool:
    """Not while it is being imported: a garbage collection can end a loop in the middle of
    that, and what is imported into half a torch crashes."""
    module = sys.modules.get(root)
    if module is None or ADAPTERS[root] in sys.modules:
        return module is not None
    return not getattr(getattr(module, "__spec__", None), "_initializing", False)


def _load(root: str, purpose: str = "") -> Adapter:
    # Asked for with each tensor, where import_module() costs more than all else here.
    adapter = getattr(sys.modules.get(ADAPTERS[root]), "adapter", None)
    if adapter is not None:
        return adapter
    try:
        return sys.modules[ADAPTERS[root]].adapter  # a third of the time of an import
    except (KeyError, AttributeError):  # or another thread is just importing it
        pass
    try:
        return importlib.import_module(ADAPTERS[root]).adapter
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != root:
            raise
        raise StateError(
            f"{purpose} needs {root}, which is not installed"
            if purpose
            else f"the state holds values of {root}, which is not installed",
            hint=f"pip install 'holdfast[{root}]'",
        ) from None
