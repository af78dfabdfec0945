"""What optimizers and schedulers were built with: learning rates, betas, numbers of steps.

A restore overwrites these with what the checkpoint holds. `read` before it, in two
processes, tells whether the program was edited in between.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from holdfast.torch.accelerated import unwrapped
from holdfast.torch.untracked import _optimizers

_SCALARS = (bool, int, float, str, type(None))
_MAX_SETTINGS = 10_000
_MAX_DEPTH = 6

# How a step is computed, not what it computes; may differ between machines.
_IMPLEMENTATION = {"foreach", "fused", "capturable", "differentiable", "params", "param_names"}
# What a scheduler counts.
_PROGRESS = {
    *("optimizer", "last_epoch", "_step_count", "_last_lr", "_is_initial"),
    *("_get_lr_called_within_step", "best", "num_bad_epochs", "cooldown_counter"),
}
_NAMED_LIKE_PRIVATE = ("._schedulers", "._milestones")  # but arguments of their class

_Place = tuple[str, Any, Any]
"""(name, container, key)."""


def read(tracked: Mapping[str, Any]) -> dict[str, Any] | None:
    """Settings by name (`optimizer.lr`, `scheduler.total_steps`); None if something has
    been in use already, so that its values are not those that it was built with.

    >>> model = torch.nn.Linear(2, 2)
    >>> found = read({"sgd": torch.optim.SGD(model.parameters(), lr=0.1)})
    >>> found["sgd.lr"], found["sgd.momentum"]
    (0.1, 0)
    """
    optimizers, schedulers = _find(tracked)
    if any(one.state or getattr(one, "_opt_called", False) for one in optimizers.values()):
        return None
    # A ChainedScheduler has no count of its own.
    if any(getattr(one, "last_epoch", 0) > 0 for one in _parts(schedulers.values())):
        return None
    return {name: _value(container, key) for name, container, key in _places(tracked)}


def write(tracked: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Set the settings with these names."""
    for name, container, key in list(_places(tracked)):
        if name not in settings:
            continue
        live = container[key]
        if isinstance(live, torch.Tensor):
            live.fill_(settings[name])
        else:
            container[key] = settings[name]


def is_derived(name: str) -> bool:
    """Whether torch computed a setting from others."""
    for known in _NAMED_LIKE_PRIVATE:
        name = name.replace(known, "")
    return "._" in name


def _find(tracked: Mapping[str, Any]) -> tuple[dict[str, Optimizer], dict[str, LRScheduler]]:
    return dict(_optimizers(dict(tracked), "", set())), dict(_schedulers(dict(tracked), "", 0))


def _parts(schedulers: Iterable[LRScheduler]) -> Iterator[LRScheduler]:
    """`schedulers` and those that they are composed of."""
    for one in schedulers:
        yield one
        yield from _parts(getattr(one, "_schedulers", ()))


def _schedulers(value: Any, path: str, depth: int) -> Iterator[tuple[str, LRScheduler]]:
    value = unwrapped(value)
    if isinstance(value, LRScheduler):
        yield path, value
    elif isinstance(value, dict | list | tuple) and depth < _MAX_DEPTH:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _schedulers(item, f"{path}/{key}" if path else str(key), depth + 1)


def _places(tracked: Mapping[str, Any]) -> Iterator[_Place]:
    optimizers, schedulers = _find(tracked)
    for path, optimizer in optimizers.items():
        groups = optimizer.param_groups
        for number, group in enumerate(groups):
            where = path if len(groups) == 1 else f"{path}[{number}]"
            yield from _entries(group, where, _IMPLEMENTATION, 0)
    for path, scheduler in schedulers.items():
        yield from _entries(vars(scheduler), path, _PROGRESS, 0)


def _entries(container: Any, path: str, without: set[str], depth: int) -> Iterator[_Place]:
    if depth > _MAX_DEPTH or len(container) > _MAX_SETTINGS:
        return
    named = isinstance(container, dict)
    for key in list(container) if named else range(len(container)):
        if key in without:
            continue
        where = f"{path}.{key}" if named else f"{path}[{key}]"
        item = container[key]
        if isinstance(item, LRScheduler):
            yield from _entries(vars(item), where, _PROGRESS, depth + 1)
        elif isinstance(item, dict | list):
            yield from _entries(item, where, set(), depth + 1)
        elif _is_setting(item):
            yield where, container, key


def _is_setting(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(isinstance(item, _SCALARS) for item in value)
    if isinstance(value, torch.Tensor):
        return value.ndim == 0 and not value.is_meta
    return isinstance(value, _SCALARS)


def _value(container: Any, key: Any) -> Any:
    value = container[key]
    return value.item() if isinstance(value, torch.Tensor) else value
