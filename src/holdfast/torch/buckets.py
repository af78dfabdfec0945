"""In which order DistributedDataParallel sums gradients: its buckets.

Behind the first step of a process it orders them anew, by when gradients were ready. Where more
than two ranks are summed, the place of a gradient in a bucket decides in which order its terms are
added, and so the last bits. A process that goes on needs the order of the one before in its first
step already: its Reducer is made once more, as unpickling one does, over the parameters in that
order, and is told that their gradients came so, as `join()` does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from holdfast.core.group import Group
from holdfast.torch.modules import all_parts, bare

_MANY = 3
"""Ranks: the sum of two has one order."""
_MAX_DEPTH = 6

_known: WeakKeyDictionary[DistributedDataParallel, dict[str, str]] = WeakKeyDictionary()
"""What `read` says of those that will not change their order any more."""


def read(tracked: Mapping[str, Any]) -> dict[str, Any]:
    """The order of each model in DistributedDataParallel among `tracked` that has one of its own,
    by name: the numbers of its parameters, and a digest of their names.

    Between two steps, on all ranks of a model: behind the first step (with static_graph=True: the
    second) they come to the order here that they would come to in the next one.
    """
    found: dict[str, Any] = {}
    for path, ddp in _wrapped(tracked):
        if _orders_anew(ddp) and (order := _order(ddp)) is not None:
            found[path] = dict(order)
    return found


def write(tracked: Mapping[str, Any], saved: Mapping[str, Any], group: Group) -> dict[str, str]:
    """Give models the order that `read` has found. All of `group` call it, before the first step.

    Returns, by name, why a model does not have it. It is then like one that had never trained.
    """
    if not dist.is_available() or not dist.is_initialized():
        return {}  # another framework's group; all of it are alike in that
    refused: dict[str, str] = {}
    wishes: dict[str, str] = {}
    models = {path: ddp for path, ddp in _wrapped(tracked) if _orders_anew(ddp)}
    for path, ddp in models.items():
        if path not in saved:
            continue
        if why := _obstacle(ddp, saved[path]):
            refused[path] = why
        elif _known.get(ddp) != saved[path]:
            wishes[path] = _digest([saved[path]["order"]])
    everyone = dict(group.gather([dist.get_rank(), wishes]))
    for path, wish in wishes.items():
        ranks = dist.get_process_group_ranks(models[path].process_group)
        if all(everyone.get(rank, {}).get(path) == wish for rank in ranks):
            _give(models[path], saved[path])
        else:
            refused[path] = "not all ranks have it"
    return refused


def _wrapped(value: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Models in DistributedDataParallel, with their names in reports."""
    if isinstance(value, DistributedDataParallel):
        yield path, value
    elif isinstance(value, torch.nn.Module):
        if not any(isinstance(part, DistributedDataParallel) for part in all_parts(value)):
            return  # the names of thousands of modules take a while
        for name, module in value.named_modules():
            if isinstance(module, DistributedDataParallel):
                name = bare(name)
                yield f"{path}/{name}" if name else path, module
    elif isinstance(value, Mapping | list | tuple) and depth < _MAX_DEPTH:
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from _wrapped(item, f"{path}/{key}" if path else str(key), depth + 1)


def _orders_anew(ddp: Any) -> bool:
    return (
        hasattr(ddp, "reducer")  # else all gradients are left to the program
        and (ddp.static_graph or not ddp.find_unused_parameters)
        and dist.get_world_size(ddp.process_group) >= _MANY
    )


def _order(ddp: Any) -> dict[str, str] | None:
    """None: no gradients have come yet, or torch does not tell."""
    if ddp not in _known:
        try:
            if ddp.reducer._rebuild_buckets():  # False also where it has been done
                ddp._has_rebuilt_buckets = True
        except RuntimeError:
            return None  # some have none, of which torch tells the program in the next step
        # It writes down what it is asked for in some steps only, the second one among them.
        if not (text := _told(ddp)):
            ddp.logger.set_runtime_stats_and_log()
            text = _told(ddp)
        order, names = text.replace(",", " ").split(), _names(ddp)
        if not _is_whole(order, names):
            return None
        _known[ddp] = {"names": _digest(names), "order": " ".join(order)}
    return _known[ddp]


def _told(ddp: Any) -> str:
    return ddp._get_ddp_logging_data().get("rebuilt_per_bucket_param_indices", "")


def _obstacle(ddp: Any, saved: Mapping[str, Any]) -> str:
    if saved["names"] != _digest(names := _names(ddp)):
        return "its parameters are others"
    if not _is_whole(saved["order"].split(), names):
        return "the checkpoint does not name each parameter once"
    if ddp.mixed_precision is not None:
        return "it was made with mixed_precision"
    if getattr(ddp, "_use_python_reducer", False):
        return "the compiler sums its gradients"
    parameters = ddp.module.parameters()
    if ddp._lazy_init_ran and any(hasattr(one, "_in_backward_optimizers") for one in parameters):
        return "an optimizer steps in its backward"
    if ddp._get_ddp_logging_data().get("comm_hook") and not ddp._comm_hooks:
        return "a built-in communication hook cannot be given to it again"
    return ""


def _give(ddp: Any, saved: Mapping[str, str]) -> None:
    order = [int(number) for number in saved["order"].split()]
    parameters, sparse = ddp._build_params_for_reducer()
    parameters = [parameters[number] for number in order]
    sparse = [sparse[number] for number in order]
    names = ddp._build_debug_param_to_name_mapping(parameters)
    del ddp.reducer, ddp.logger  # first: each Reducer has memory for all gradients
    ddp._ddp_init_helper(parameters, sparse, names, ddp.static_graph)
    if ddp.static_graph:
        ddp.reducer._set_static_graph()
        ddp.logger._set_static_graph()
    hooks, ddp._comm_hooks = ddp._comm_hooks, []
    for hook, state in hooks:
        ddp.register_comm_hook(state, hook)
    ddp.reducer._push_all_rebuilt_params()
    ddp.reducer._rebuild_buckets()
    ddp._has_rebuilt_buckets = True
    _known[ddp] = dict(saved)


def _names(ddp: Any) -> list[str]:
    """Of what it sums, as its Reducer numbers them before there is another order."""
    names = {id(value): bare(name) for name, value in ddp.module.named_parameters()}
    return [names[id(value)] for value in ddp._build_params_for_reducer()[0]]


def _is_whole(order: Sequence[str], names: Sequence[str]) -> bool:
    return sorted(order) == sorted(map(str, range(len(names))))


def _digest(words: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]
