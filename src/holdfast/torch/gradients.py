"""Gradients that wait for a step of their optimizer: the second half of an accumulation.

`backward()` adds to `.grad` until the optimizer's `step()` uses it. A checkpoint between
the two is complete only with the gradients. torch does not say when a backward ran, but
each tensor has a version that every change in place advances: after a step, each gradient
is marked with the version that was used. One without that mark is fresh.

Gradients that are DTensors are one for all processes; a plain one is each process's own, as it
is where DistributedDataParallel has not averaged it yet. What FSDP has not reduced yet
(`set_requires_gradient_sync(False)`, FSDP1's `no_sync()`) is in no gradient, or in one that is not
divided: such a boundary cannot be saved. FSDP1's are each process's own, so that an accumulation
goes on only where as many processes are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from holdfast.errors import StateError
from holdfast.torch import fsdp1
from holdfast.torch.attributes import modules_in
from holdfast.torch.modules import is_fsdp
from holdfast.torch.sharded import cut_like, is_sharded, summed, version_of
from holdfast.torch.untracked import tracked_optimizers

logger = logging.getLogger("holdfast")

_MARK = "_holdfast_used_version"
"""An attribute of the gradient: an id() may soon be another tensor's."""


class Gradients:
    """The gradients of the tracked optimizers. Used by one thread."""

    def __init__(self) -> None:
        self.stepped = False
        """An optimizer has stepped since the caller set this to False."""
        self._optimizers: dict[str, Optimizer] = {}
        self._hooks: dict[str, Any] = {}
        self._modules: list[torch.nn.Module] = []
        self._units: list[Any] = []
        """Of FSDP1."""

    def watch(self, tracked: Mapping[str, Any]) -> None:
        """Watch the optimizers that `tracked` holds now, and no others."""
        self._modules = [module for _, module in modules_in(tracked)]
        self._units = list(fsdp1.units_in(tracked))
        found = dict(tracked_optimizers(tracked))
        for path, optimizer in list(self._optimizers.items()):
            if found.get(path) is not optimizer:
                self._forget(path)
        for path, optimizer in found.items():
            if path in self._optimizers:
                continue
            try:
                self._hooks[path] = optimizer.register_step_post_hook(self._used)
            except AttributeError:
                continue  # a wrapper that has an optimizer's type and nothing else of it
            self._optimizers[path] = optimizer

    def close(self) -> None:
        """Watch nothing any more."""
        for path in list(self._optimizers):
            self._forget(path)

    def fresh(self) -> bool:
        """Whether a backward ran that no step has used yet. Reads no values."""
        return self._unreduced() or any(
            _is_fresh(grad)
            for optimizer in self._optimizers.values()
            for _, _, grad in _gradients(optimizer)
        )

    def state(self) -> dict[str, Any]:
        """What `restore` needs, by optimizer: fresh gradients, and which others are there.
        Those were used and are to be zeroed, so that their values do not matter.

        Raises StateError if FSDP holds what it has not reduced."""
        if self._unreduced():
            raise StateError(
                "gradients that FSDP has not reduced yet cannot be saved",
                hint="Save after the last backward of an accumulation, before which the program "
                "calls set_requires_gradient_sync(True), or leaves no_sync().",
            )
        state: dict[str, Any] = {}
        for path, optimizer in self._optimizers.items():
            fresh: dict[str, torch.Tensor] = {}
            used: list[int] = []
            for number, _, grad in _gradients(optimizer):
                if _is_fresh(grad) and not _is_zero(grad):
                    fresh[str(number)] = summed(grad).detach()
                else:
                    used.append(number)
            if fresh or used:
                state[path] = {"fresh": fresh, "used": used}
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        """Make the gradients what they were: the saved ones, zeros where used ones were,
        and none elsewhere."""
        for path, optimizer in self._optimizers.items():
            saved = state.get(path) or {"fresh": {}, "used": ()}
            used = frozenset(saved["used"])
            for number, param in enumerate(_parameters(optimizer)):
                grad = saved["fresh"].get(str(number))
                if grad is not None and grad.shape == param.shape:
                    if is_sharded(param) and not is_sharded(grad):
                        grad = cut_like(grad, param, f"{path}/{number}")
                    param.grad = grad.to(param.device)
                elif grad is not None and fsdp1.is_flattened(param):
                    logger.warning(
                        "%s: the gradients of an accumulation that was interrupted cannot go on: "
                        "FSDP1 divides parameter %d in another way now",
                        path,
                        number,
                    )
                    param.grad = None
                elif number in used:
                    param.grad = torch.zeros_like(param)
                    _mark(param.grad)
                elif param.grad is not None:
                    param.grad = None

    def _unreduced(self) -> bool:
        return _unreduced(self._modules) or any(map(fsdp1.unreduced, self._units))

    def _used(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return  # a compiled step cannot mark: its gradients always count as fresh
        self.stepped = True
        for _, _, grad in _gradients(optimizer):
            _mark(grad)

    def _forget(self, path: str) -> None:
        del self._optimizers[path]
        self._hooks.pop(path).remove()


def gradients_aside(tracked: Mapping[str, Any]) -> Callable[[], None]:
    """Take the gradients of all tracked parameters away; call the result to give them back,
    as the same tensors."""
    held: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
    modules = (module for _, module in modules_in(tracked))
    owners: list[Iterator[torch.Tensor]] = [module.parameters(recurse=False) for module in modules]
    owners += [_parameters(optimizer) for _, optimizer in tracked_optimizers(tracked)]
    # FSDP1 would take it that the gradients of parts were set to zero.
    owners.append(unit._handle.flat_param for unit in fsdp1.units_in(tracked))
    for param in (param for owner in owners for param in owner):
        held.setdefault(id(param), (param, param.grad))
        param.grad = None

    def put_back() -> None:
        for param, grad in held.values():
            param.grad = grad

    return put_back


def _parameters(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    return (param for group in optimizer.param_groups for param in group["params"])


def _gradients(optimizer: Optimizer) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(number, parameter, gradient) of the parameters that have one."""
    for number, param in enumerate(_parameters(optimizer)):
        grad = param.grad
        if grad is not None:
            yield number, param, grad


def _unreduced(modules: list[torch.nn.Module]) -> bool:
    """Whether FSDP2 keeps gradients of whole parameters, until they are reduced."""
    for module in modules:
        if not is_fsdp(module):
            continue
        state: Any = module._get_fsdp_state()  # type: ignore[operator]
        if hasattr(state, "_fsdp_param_groups"):
            groups = state._fsdp_param_groups
        else:  # torch < 2.12
            groups = [state._fsdp_param_group] if state._fsdp_param_group else []
        for param in (param for group in groups for param in group.fsdp_params):
            whole = getattr(param, "_unsharded_param", None)
            if param.unsharded_accumulated_grad is not None or (
                whole is not None and whole.grad is not None
            ):
                return True
    return False


def _mark(grad: torch.Tensor) -> None:
    setattr(grad, _MARK, version_of(grad))


def _is_fresh(grad: torch.Tensor) -> bool:
    return getattr(grad, _MARK, None) != version_of(grad)


def _is_zero(grad: torch.Tensor) -> bool:
    """Zeroed in place after it was used. Waits for the device."""
    if is_sharded(grad):
        return False  # that would take all processes, or be another answer in each
    return grad.layout is torch.strided and not bool(grad.any())
