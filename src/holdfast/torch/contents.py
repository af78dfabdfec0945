"""What torch's objects hold, where their memory is, and samples of it.

For the search for state that nobody saves (`holdfast.run.unsaved`). Nothing here runs code
of the user's: no `state_dict`, no hooks, no operators of tensor subclasses.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from holdfast.torch.dtypes import words
from holdfast.torch.memory import raw
from holdfast.torch.tensors import has_memory

Memory = tuple[str, int, int]
"""(device, first address, the one after the last)."""

_BLOCKS = 16
_MODULE_ATTRIBUTES = frozenset(vars(torch.nn.Module()))


def parts(value: Any) -> list[Any] | None:
    """What is saved together with `value`, or gone with it; None if it is no object of
    torch's that holds others in a way of its own.

    An optimizer's parameters are not in its state, nor is a scheduler's optimizer.
    """
    if isinstance(value, torch.Tensor):
        return [value.grad] if _is_plain(value) and _is_leaf(value) else []
    if isinstance(value, torch.nn.Module):
        own = vars(value)
        held = [_whole(own.get(name)) for name in ("_parameters", "_buffers", "_modules")]
        rest = [item for name, item in own.items() if name not in _MODULE_ATTRIBUTES]
        return [item for items in held for item in items] + rest
    if isinstance(value, Optimizer):
        return _whole(vars(value).get("state"))
    if isinstance(value, LRScheduler):
        return [item for name, item in vars(value).items() if name != "optimizer"]
    return None


def _is_leaf(tensor: torch.Tensor) -> bool:
    try:
        return tensor.is_leaf
    except RuntimeError:  # one of several views, whose base was changed: FSDP1 leaves such
        return False


def _whole(held: Any) -> list[Any]:
    """A dict and what is in it: however large, it is state and no data."""
    return [held, *dict.values(held)] if isinstance(held, dict) else [held]


def state(value: Any) -> dict[str, torch.Tensor] | None:
    """The parameters and persistent buffers of a module, by name. Empty for what is no
    state of the program's own: loaders, and what `find_untracked` names. None for objects
    that are not torch's, and tensors."""
    if isinstance(value, Optimizer | LRScheduler | torch.amp.GradScaler | DataLoader):
        return {}
    if isinstance(value, torch.nn.Module):
        return dict(_tensors(value, "", set()))
    return None


def _tensors(
    module: torch.nn.Module, prefix: str, seen: set[int]
) -> Iterator[tuple[str, torch.Tensor]]:
    if id(module) in seen:
        return
    seen.add(id(module))
    own = vars(module)  # not by attribute: a module may have a __getattr__ of its own
    passing = own.get("_non_persistent_buffers_set", ())
    for name, tensor in [*own.get("_parameters", {}).items(), *own.get("_buffers", {}).items()]:
        if tensor is not None and name not in passing:
            yield f"{prefix}{name}", tensor
    for name, part in own.get("_modules", {}).items():
        if part is not None:
            yield from _tensors(part, f"{prefix}{name}.", seen)


def memory(value: Any) -> Memory | None:
    """Of the storage behind a tensor; None if `value` is no tensor with memory."""
    if not isinstance(value, torch.Tensor) or not _is_plain(value):
        return None
    storage = value.untyped_storage()
    start = storage.data_ptr()
    return (str(value.device), start, start + storage.nbytes()) if start else None


def sample(value: Any, nbytes: int) -> tuple[str, bytes] | None:
    """Dtype and shape in words, and up to `nbytes` of the elements, spread over all of them
    and the first among them. None for numbers (one element), for what `memory` has nothing
    of, and for large tensors with gaps. Waits for the tensor's device."""
    if memory(value) is None or value.numel() <= 1:
        return None
    items = raw(value)
    # In the order in which they lie in memory, which copies nothing of a dense tensor.
    items = items.permute(sorted(range(items.ndim), key=items.stride, reverse=True))
    if not items.is_contiguous() and items.nbytes > nbytes:
        return None
    items = items.reshape(-1).contiguous()
    if items.nbytes > nbytes:
        count = nbytes // _BLOCKS // items.itemsize
        last = items.numel() - count
        starts = [last * index // (_BLOCKS - 1) for index in range(_BLOCKS)]
        items = torch.cat([items[start : start + count] for start in starts])
    return words(value.dtype, value.shape), items.cpu().view(torch.uint8).numpy().tobytes()


def _is_plain(tensor: torch.Tensor) -> bool:
    kind = type(tensor)
    operators = next(base for base in kind.__mro__ if "__torch_function__" in vars(base))
    return (
        operators.__module__.partition(".")[0] == "torch"
        and has_memory(kind)
        and tensor.layout is torch.strided
        and not is_lazy(tensor)
        and tensor.device.type != "meta"
    )
