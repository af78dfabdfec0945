"""What belongs to tracked objects and nobody saves."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from holdfast.run.variables import Variables
from holdfast.torch.accelerated import unwrapped
from holdfast.torch.dtypes import describe, words
from holdfast.torch.memory import storage_of
from holdfast.torch.modules import live_state, saves_more
from holdfast.torch.optimizers import is_divided, plain_loading
from holdfast.torch.sharded import is_sharded, local_of
from holdfast.torch.tensors import has_storage

_MAX_OBJECTS = 100_000  # that are searched in tracked containers: some tenths of a second
_PLAIN = (str, bytes, bytearray, int, float, complex, type(None))
# Loaders lead to datasets, which may be large, and reading them slow.
_CLOSED = (
    *(type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType),
    *(torch.Tensor, DataLoader),
)


# -- objects in a frame -------------------------------------------------------------


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
        value = unwrapped(value)
        kind = type(value)  # not isinstance: a local may be anything, and `__class__` run code
        stateful = issubclass(kind, Optimizer | LRScheduler) or (
            issubclass(kind, torch.amp.GradScaler) and value.is_enabled()
        )
        if stateful and id(value) not in known:
            known.update(_reachable([value]))
            found.append(name)
    return found


def _reachable(values: Iterable[Any]) -> dict[int, Any]:
    """Tracked objects and what they hold, by id; the objects are kept so that no id
    is used twice. What optimizers and modules hold is left out, but for the optimizers,
    and the tensors that the modules save."""
    known: dict[int, Any] = {}
    waiting = deque(values)
    while waiting and len(known) < _MAX_OBJECTS:
        value = unwrapped(waiting.popleft())
        if isinstance(value, _PLAIN) or id(value) in known:
            continue
        known[id(value)] = value
        waiting += _held(value)
    return known


def _held(value: Any) -> Iterable[Any]:
    if isinstance(value, _CLOSED):
        return ()
    if isinstance(value, torch.nn.Module):
        tensors, _ = live_state(value)
        own = [vars(part) for part in value.modules() if saves_more(part)]
        return [*tensors.values(), *own]
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, list | tuple | set | frozenset | deque):
        return value
    if isinstance(value, LRScheduler):
        # Not its optimizer: that one is not in the scheduler's state.
        return getattr(value, "_schedulers", ())
    if isinstance(value, Optimizer):
        return [item for item in vars(value).values() if isinstance(item, Optimizer)]
    if isinstance(value, Variables):
        return value.state_dict().values()
    # A trainer of the user's own, a dataclass: it saves what it holds.
    return getattr(value, "__dict__", {}).values()


# -- parameters of optimizers -------------------------------------------------------


def untracked_parameters(tracked: Mapping[str, Any]) -> list[str]:
    """Parameters that tracked optimizers train and nothing in `tracked` saves, in words.

    The state of an optimizer has their moments, not the parameters. Those are saved with
    a tracked module, or a tracked tensor that shares their memory. Frozen parameters,
    and optimizers that add to torch's state_dict, are left out; what an object of the
    user's own refers to counts as saved.

    >>> weight = torch.zeros(2, 3, requires_grad=True)
    >>> optimizer = torch.optim.SGD([weight], lr=0.1)
    >>> untracked_parameters({"optimizer": optimizer})
    ['optimizer: parameter 0 of group 0, float32[2, 3]']
    >>> untracked_parameters({"optimizer": optimizer, "extra": weight})
    []
    """
    optimizers = dict(_optimizers(dict(tracked), "", set()))
    if not optimizers:
        return []
    known = _reachable(tracked.values())
    if len(known) >= _MAX_OBJECTS:
        return []  # not all was searched: what is missing may be there
    saved = {place for value in known.values() for place in _places(value)}
    found: list[str] = []
    for path, optimizer in optimizers.items():
        if _saves_itself(optimizer):
            continue
        for number, group in enumerate(optimizer.param_groups):
            names = group.get("param_names") or ()
            for position, param in enumerate(group["params"]):
                if _is_trained(param, optimizer) and saved.isdisjoint(_places(param)):
                    name = f" ({names[position]})" if position < len(names) else ""
                    what = words(param.dtype, ()) if is_lazy(param) else describe(param)
                    found.append(f"{path}: parameter {position} of group {number}{name}, {what}")
    return found


def tracked_optimizers(tracked: Mapping[str, Any]) -> Iterator[tuple[str, Optimizer]]:
    """(path, optimizer) of those among `tracked` and in its plain containers."""
    return _optimizers(dict(tracked), "", set())


def _optimizers(value: Any, path: str, above: set[int]) -> Iterator[tuple[str, Optimizer]]:
    """Optimizers that are captured as such: in plain containers, not in objects that save
    them in a way of their own."""
    value = unwrapped(value)
    if isinstance(value, Optimizer):
        yield path, value
        return
    if id(value) in above:
        return  # it contains itself, which a save refuses
    if isinstance(value, dict):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return
    for key, item in items:
        yield from _optimizers(item, f"{path}/{key}" if path else str(key), {*above, id(value)})


def _places(value: Any) -> Iterator[Hashable]:
    """By what a tensor is recognised: itself, and its memory."""
    if not isinstance(value, torch.Tensor):
        return
    yield id(value)
    if is_sharded(value):
        value = local_of(value)
    if has_storage(value):
        address = storage_of(value)
        if address:  # neither empty nor on the meta device
            yield str(value.device), address


def _is_trained(param: torch.Tensor, optimizer: Optimizer) -> bool:
    return param.requires_grad or param.grad is not None or param in optimizer.state


def _saves_itself(optimizer: Optimizer) -> bool:
    """Whether its state_dict holds more than torch's: float32 copies of the parameters,
    for instance."""
    if plain_loading(optimizer) or is_divided(optimizer):
        return False  # the latter is refused when it is saved
    return not optimizer.state_dict().keys() <= {"state", "param_groups"}
