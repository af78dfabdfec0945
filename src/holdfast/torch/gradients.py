"""Gradients that wait for a step of their optimizer: the second half of an accumulation.

`backward()` adds to `.grad` until the optimizer's `step()` uses it. A checkpoint between
the two is complete only with the gradients. torch does not say when a backward ran, but
each tensor has a version that every change in place advances: after a step, each gradient
is marked with the version that was used. One without that mark is fresh.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from holdfast.torch.attributes import modules_in
from holdfast.torch.untracked import tracked_optimizers

_MARK = "_holdfast_used_version"
"""An attribute of the gradient: an id() may soon be another tensor's."""


class Gradients:
    """The gradients of the tracked optimizers. Used by one thread."""

    def __init__(self) -> None:
        self.stepped = False
        """An optimizer has stepped since the caller set this to False."""
        self._optimizers: dict[str, Optimizer] = {}
        self._hooks: dict[str, Any] = {}

    def watch(self, tracked: Mapping[str, Any]) -> None:
        """Watch the optimizers that `tracked` holds now, and no others."""
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
        return any(
            _is_fresh(grad)
            for optimizer in self._optimizers.values()
            for _, _, grad in _gradients(optimizer)
        )

    def state(self) -> dict[str, Any]:
        """What `restore` needs, by optimizer: fresh gradients, and which others are there.
        Those were used and are to be zeroed, so that their values do not matter."""
        state: dict[str, Any] = {}
        for path, optimizer in self._optimizers.items():
            fresh: dict[str, torch.Tensor] = {}
            used: list[int] = []
            for number, _, grad in _gradients(optimizer):
                if _is_fresh(grad) and not _is_zero(grad):
                    fresh[str(number)] = grad.detach()
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
                    param.grad = grad.to(param.device)
                elif number in used:
                    param.grad = torch.zeros_like(param)
                    _mark(param.grad)
                elif param.grad is not None:
                    param.grad = None

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


def _mark(grad: torch.Tensor) -> None:
    setattr(grad, _MARK, grad._version)


def _is_fresh(grad: torch.Tensor) -> bool:
    return getattr(grad, _MARK, None) != grad._version


def _is_zero(grad: torch.Tensor) -> bool:
    """Zeroed in place after it was used. Waits for the device."""
    return grad.layout is torch.strided and not bool(grad.any())
