"""Finds the adapters of frameworks, and imports one only when it is needed."""

from __future__ import annotations

import importlib
import sys

from holdfast.core.adapters import Adapter
from holdfast.errors import StateError

ADAPTERS = {"torch": "holdfast.torch", "sklearn": "holdfast.sklearn"}
"""Root package of a framework -> the module that has its `adapter`."""

_roots_of_type: dict[type, tuple[str, ...]] = {}


def adapter_for_value(value: object) -> Adapter | None:
    """The adapter of the framework that the type of `value`, or a base of it, comes
    from; None if there is none. Imports no framework."""
    kind = type(value)
    roots = _roots_of_type.get(kind)
    if roots is None:
        found = dict.fromkeys(base.__module__.partition(".")[0] for base in kind.__mro__)
        roots = tuple(root for root in found if root in ADAPTERS)
        _roots_of_type[kind] = roots
    for root in roots:
        if root in sys.modules:
            return _load(root)
    return None


def adapter_for_tag(tag: str) -> Adapter | None:
    """The adapter that reads nodes tagged `tag` ("torch.tensor"); None for a tag of
    no framework. Imports the framework; raises StateError if it is not installed."""
    root, dot, _ = tag.partition(".")
    return _load(root) if dot and root in ADAPTERS else None


def loaded_adapters() -> list[Adapter]:
    """The adapters of the frameworks that this process has imported."""
    return [_load(root) for root in ADAPTERS if _is_imported(root)]


def _is_imported(root: str) -> bool:
    """Not while it is being imported: a garbage collection can end a loop in the middle of
    that, and what is imported into half a torch crashes."""
    module = sys.modules.get(root)
    if module is None or ADAPTERS[root] in sys.modules:
        return module is not None
    return not getattr(getattr(module, "__spec__", None), "_initializing", False)


def _load(root: str) -> Adapter:
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
            f"the state holds values of {root}, which is not installed",
            hint=f"pip install 'holdfast[{root}]'",
        ) from None
