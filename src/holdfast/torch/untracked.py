"""Which optimizers, schedulers and scalers of a frame nobody saves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

_MAX_OBJECTS = 10_000  # of tracked containers that are searched


def find_untracked(
    frame_locals: Mapping[str, Any], tracked: Mapping[str, Any] | Iterable[Any]
) -> list[str]:
    """Names of optimizers, schedulers and enabled GradScalers in `frame_locals` that
    are not among `tracked`: neither themselves nor inside of a tracked container,
    object or scheduler. Of several names of one object only the first is given.

    >>> model = torch.nn.Linear(2, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> find_untracked({"model": model, "optimizer": optimizer}, {"model": model})
    ['optimizer']
    """
    known = _reachable(tracked.values() if isinstance(tracked, Mapping) else tracked)
    found: list[str] = []
    for name, value in frame_locals.items():
        stateful = isinstance(value, Optimizer | LRScheduler) or (
            isinstance(value, torch.amp.GradScaler) and value.is_enabled()
        )
        if stateful and id(value) not in known:
            known.update(_reachable([value]))
            found.append(name)
    return found


def _reachable(values: Iterable[Any]) -> dict[int, Any]:
    """Tracked objects and what they hold, by id; the objects are kept so that no id
    is used twice."""
    known: dict[int, Any] = {}
    waiting = list(values)
    while waiting and len(known) < _MAX_OBJECTS:
        value = waiting.pop()
        if id(value) in known:
            continue
        known[id(value)] = value
        if isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            waiting += value
        elif isinstance(value, LRScheduler):
            # Not its optimizer: that one is not in the scheduler's state.
            waiting += getattr(value, "_schedulers", [])
        elif isinstance(value, Optimizer):
            waiting += [item for item in vars(value).values() if isinstance(item, Optimizer)]
        elif not isinstance(value, torch.Tensor | torch.nn.Module) and callable(
            getattr(value, "state_dict", None)
        ):
            # A trainer of the user's own: it saves what it holds.
            waiting += getattr(value, "__dict__", {}).values()
    return known
