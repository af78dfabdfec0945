"""What a program changes in modules beside their state: training mode, frozen parameters,
dropout rates.

None of this is in a `state_dict`. The names are those of reports, with the attribute
behind a dot: `model/encoder.training`, `model/encoder.weight.requires_grad`, `model/drop.p`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch.nn.modules.lazy import LazyModuleMixin

from holdfast.torch.modules import class_of, parts, saves_more

_SCALARS = (bool, int, float, str, type(None))
_MAX_DEPTH = 6


_Place = tuple[str, Any, str]
"""(name, owner, attribute)."""


def read(tracked: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes that can be put back, by name: training modes, `requires_grad` of
    parameters, and the settings of torch's own modules, as these declare them.

    Attributes of other classes are not among them: `max_seq_len_cached` is wrong without
    the cache that belongs to it. See `unsaved`.

    >>> drop = torch.nn.Dropout(0.5)
    >>> read({"drop": drop.eval()})
    {'drop.training': False, 'drop.p': 0.5, 'drop.inplace': False}
    """
    return {name: getattr(owner, attribute) for name, owner, attribute in _places(tracked)}


def write(tracked: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Set the attributes with these names, where they are something else."""
    for name, owner, attribute in list(_places(tracked)):
        if name in values and getattr(owner, attribute) != values[name]:
            setattr(owner, attribute, values[name])


def unsaved(tracked: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers in attributes of modules that save nothing but their tensors, and whose
    class is not one of torch's: counters, temperatures. By name, as `read`."""
    found: dict[str, Any] = {}
    for name, module in modules_in(tracked):
        if class_of(module).__module__.startswith("torch.") or saves_more(module):
            continue
        for attribute, value in vars(module).items():
            is_public = attribute != "training" and not attribute.startswith("_")
            if is_public and isinstance(value, bool | int | float):
                found[f"{name}.{attribute}"] = value
    return found


def _places(tracked: Mapping[str, Any]) -> Iterator[_Place]:
    for name, module in modules_in(tracked):
        yield f"{name}.training", module, "training"
        separator = "." if "/" in name else "/"
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{name}{separator}{key}.requires_grad", parameter, "requires_grad"
        for key in _settings_of(class_of(module)):
            if isinstance(getattr(module, key, ...), _SCALARS):
                yield f"{name}.{key}", module, key


@lru_cache(maxsize=1024)
def _settings_of(kind: type[torch.nn.Module]) -> tuple[str, ...]:
    # A lazy module's sizes change at the first input, together with its parameters.
    if not kind.__module__.startswith("torch.nn.") or issubclass(kind, LazyModuleMixin):
        return ()
    return tuple(getattr(kind, "__constants__", ()))


def modules_in(value: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, torch.nn.Module]]:
    """Every module among tracked objects, once, with its name in reports."""
    if isinstance(value, torch.nn.Module):
        for name, module in parts(value):
            yield f"{path}/{name}" if name else path, module
    elif isinstance(value, Mapping | list | tuple) and depth < _MAX_DEPTH:
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from modules_in(item, f"{path}/{key}" if path else str(key), depth + 1)
