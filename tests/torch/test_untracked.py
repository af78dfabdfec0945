"""What lies beside tracked objects and is not saved."""

from __future__ import annotations

import torch
from torch import nn

from holdfast.torch import find_untracked


def test_names_of_what_is_not_tracked() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    scaler = torch.amp.GradScaler("cpu")
    unused = torch.amp.GradScaler("cpu", enabled=False)
    frame = {
        "model": model,
        "optimizer": optimizer,
        "same": optimizer,
        "scheduler": scheduler,
        "scaler": scaler,
        "unused": unused,
        "step": 3,
    }
    assert find_untracked(frame, {"model": model}) == ["optimizer", "scheduler", "scaler"]
    assert find_untracked(frame, {"model": model, "opt": optimizer}) == ["scheduler", "scaler"]
    assert find_untracked(frame, [optimizer, scheduler, scaler]) == []


def test_what_tracked_objects_hold_is_tracked() -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    parts = [torch.optim.lr_scheduler.ConstantLR(optimizer) for _ in range(2)]
    both = torch.optim.lr_scheduler.ChainedScheduler(parts)
    frame = {"optimizer": optimizer, "part": parts[0], "both": both}
    assert find_untracked(frame, {"s": both}) == ["optimizer"]
    assert find_untracked(frame, {"all": {"o": [optimizer], "s": (both,)}}) == []

    class Trainer:
        def __init__(self) -> None:
            self.optimizer = optimizer
            self.schedulers = {"warmup": both}

        def state_dict(self) -> dict[str, object]:
            return {}

    assert find_untracked(frame, {"trainer": Trainer()}) == []
    # Of a composed scheduler that is untracked, its parts need no line of their own.
    assert find_untracked({"both": both, "part": parts[0]}, {}) == ["both"]
