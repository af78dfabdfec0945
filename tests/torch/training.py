"""A small model, steps that are equal in every process, and the check that all
optimizers pass: three steps, save, rebuild, restore, three more = six at once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.torch.roundtrip import Checkpoint, assert_same

Make = Callable[[list[Any]], torch.optim.Optimizer]


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 2, bias=False)).to(
        dtype
    )


def train(module: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    dtype = next(module.parameters()).dtype
    for step in range(first, last):
        torch.manual_seed(100 + step)
        x, y = torch.randn(5, 4).to(dtype), torch.randn(5, 2).to(dtype)

        def closure(x: Any = x, y: Any = y) -> Any:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(module(x).float(), y.float())
            loss.backward()
            return loss

        optimizer.step(closure)


def groups(module: nn.Module, **second: Any) -> list[dict[str, Any]]:
    first, last = module.parameters()
    return [{"params": [first]}, {"params": [last], **second}]


class MixedAdam(torch.optim.Optimizer):
    """Keeps float32 moments of bfloat16 parameters, as many do."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "betas": [0.9, 0.99], "schedule": {"kind": "linear"}})

    def step(self, closure: Any = None) -> Any:
        if closure is not None:
            with torch.enable_grad():
                closure()
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    if param.grad is None:
                        continue
                    state = self.state[param]
                    if not state:
                        state["step"] = 0
                        state["moments"] = [torch.zeros_like(param, dtype=torch.float32), None]
                        state["master"] = param.float()
                    state["step"] += 1
                    beta = group["betas"][0]
                    state["moments"][0].mul_(beta).add_(param.grad.float(), alpha=1 - beta)
                    state["master"].sub_(state["moments"][0], alpha=group["lr"])
                    param.copy_(state["master"])


def check_exact(
    make: Make, *, dtype: torch.dtype = torch.float32, before: int = 3, grouped: bool = True
) -> Checkpoint:
    """Train, save, go on; restore into a fresh start and go on: no bit may differ."""

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        module = model(dtype)
        params = groups(module, lr=0.05) if grouped else list(module.parameters())
        return module, make(params)

    module, optimizer = build()
    train(module, optimizer, 0, before)
    checkpoint = Checkpoint({"model": module, "optimizer": optimizer})
    at_save = copy.deepcopy(optimizer.state_dict())
    train(module, optimizer, before, before + 3)

    # Fresh, and with state of its own of another history.
    for steps in (0, 2):
        fresh, restored = build()
        train(fresh, restored, 50, 50 + steps)
        kept = [(group, group["params"]) for group in restored.param_groups]
        checkpoint.restore({"model": fresh, "optimizer": restored})
        assert_same(restored.state_dict(), at_save, "state after the restore")
        for group, (live, params) in zip(restored.param_groups, kept, strict=True):
            assert group is live
            assert group["params"] is params
        train(fresh, restored, before, before + 3)
        assert_same(dict(fresh.state_dict()), dict(module.state_dict()), "model")
        assert_same(restored.state_dict(), optimizer.state_dict(), "optimizer")
    return checkpoint
