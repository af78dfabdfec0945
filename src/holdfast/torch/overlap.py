"""The optimizer's step as a barrier: what it changes may be read in place until then.

Between two steps nothing changes the parameters and the state of an optimizer: forward and
backward only read them. So a save need not copy them at once. A hook that torch calls in
front of every optimizer's step, tracked or not, first lets the save take the rest.

Versions alone would not do: fused optimizers change their tensors without advancing them
(torch 2.13). And a hook alone would not do either, since a compiled step does not call it:
an optimizer is trusted only after its hook was called in a step that ran.

A CUDA graph that holds a step is the same, and worse: the hook is called when the graph is
captured, and a program may mix replays with steps that call it. So an optimizer is trusted no
more once a step of it was captured. One that is made for that (`capturable=True`) never is,
since its graph may be older than this hook.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from holdfast.core.adapters import LeafSource
from holdfast.torch.cuda import capturing
from holdfast.torch.memory import TensorSource, storage_of
from holdfast.torch.sharded import is_sharded, local_of
from holdfast.torch.tensors import has_storage
from holdfast.torch.untracked import tracked_optimizers

_READ_IN_PLACE = {"cpu", "cuda"}  # of others a copy holds up the host, and the barrier


class Barrier:
    """Calls `drain` in front of each step of an optimizer, in that step's thread.

    Used by the thread that trains.
    """

    def __init__(self, drain: Callable[[], None]) -> None:
        self._drain = drain
        self._optimizers: list[Optimizer] = []
        self._trusted: WeakSet[Optimizer] = WeakSet()
        self._captured: WeakSet[Optimizer] = WeakSet()
        self._hook = register_optimizer_step_pre_hook(self._before_step)

    def watch(self, tracked: Mapping[str, Any]) -> None:
        """These are the objects that are saved."""
        self._optimizers = [optimizer for _, optimizer in tracked_optimizers(tracked)]

    def protected(self) -> Callable[[LeafSource], bool]:
        """Says of a leaf's source whether its bytes stay the same until the next step of an
        optimizer. For a save that begins now."""
        storages = cache(self._storages)  # a state of small leaves is never asked about
        return lambda source: isinstance(source, TensorSource) and source.storage in storages()

    def _storages(self) -> set[int]:
        return {
            storage_of(tensor)
            for optimizer in self._optimizers
            if optimizer in self._trusted and not _capturable(optimizer)
            for tensor in _tensors(optimizer)
        }

    def close(self) -> None:
        """Call it no more."""
        self._hook.remove()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return  # traced now, and not called when the compiled step runs
        if capturing():
            # Its replays pass no barrier. Nor does this one let a save take what lies on a
            # device, since that would become a part of the graph: such a save fails.
            self._captured.add(optimizer)
            self._trusted.discard(optimizer)
        elif optimizer not in self._captured:
            self._trusted.add(optimizer)
        self._drain()


def _capturable(optimizer: Optimizer) -> bool:
    return any(group.get("capturable", False) for group in optimizer.param_groups)


def _tensors(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    """What a step of the optimizer changes, as far as it lies in plain memory."""
    values = [param for group in optimizer.param_groups for param in group["params"]]
    values += [value for state in optimizer.state.values() for value in state.values()]
    # Of a DTensor that is the part which is here. FSDP2 reads it where it gathers the whole
    # tensor, elsewhere; and sums gradients, not parameters.
    local = (local_of(value) if is_sharded(value) else value for value in values)
    return filter(_plain, local)


def _plain(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.device.type in _READ_IN_PLACE
        and has_storage(value)
    )
