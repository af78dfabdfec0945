"""Which of Lightning's two packages: `lightning` or `pytorch_lightning`."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from holdfast.errors import HoldfastError

__all__ = ["CallbackBase", "is_a"]

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _base() -> Any:
    """The class that a trainer's callbacks have: that of the package which the program uses, of
    both if it uses both."""
    used = [name for name in _PACKAGES if name in sys.modules]
    if len(used) > 1:
        kinds = tuple(import_module(name).Callback for name in used)
        return type("Callback", kinds, {})
    for name in used or _PACKAGES:
        try:
            return import_module(name).Callback
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise
    raise HoldfastError(
        "holdfast.lightning needs Lightning", hint="pip install 'holdfast[lightning]'"
    )


if TYPE_CHECKING:
    from lightning.pytorch import Callback as CallbackBase
else:
    CallbackBase = _base()


def is_a(value: Any, kind: str) -> bool:
    """Whether `value` is of a class of this name, in whichever package, or of one below it."""
    return any(one.__name__ == kind for one in type(value).__mro__)
