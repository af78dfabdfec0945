"""A whole run with all that a training script of today may hold, stopped and resumed."""

from __future__ import annotations

import random
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils
from torch.utils.data import DataLoader, TensorDataset

import holdfast
from holdfast.errors import StructureMismatch
from tests.support.exhaustive import EXHAUSTIVE
from tests.support.jobs import Copying, Countdown, fresh_address, process, steps_of
from tests.torch.roundtrip import assert_same

EPOCHS, BATCHES = 3, 4
STEPS = EPOCHS * BATCHES


class Language(nn.Module):
    """Output tied to the embedding, dropout, a buffer that counts, and a frozen part."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.frozen = nn.Linear(6, 6)
        self.frozen.requires_grad_(False)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.3)
        self.out = nn.Linear(6, 12, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> Any:
        return self.out(self.drop(self.norm(self.frozen(self.embed(tokens)))))


def training(address: str, die: Countdown, losses: dict[int, float]) -> dict[str, Any]:
    """The script, which every process starts from its first line."""
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    model: Any = Language()
    critic = nn.Sequential(nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 1)).to(torch.bfloat16)
    temperature = torch.zeros((), requires_grad=True)  # in no module
    decayed = [model.embed.weight]
    rest = [p for p in model.parameters() if p.requires_grad and p is not model.embed.weight]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": 0.1},
            {"params": [*rest, *model.frozen.parameters()], "weight_decay": 0.0},
        ],
        lr=0.05,
    )
    second = torch.optim.SGD([*critic.parameters(), temperature], lr=0.01, momentum=0.9)
    scheduler = lr_scheduler.SequentialLR(
        optimizer,
        [
            lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3),
            lr_scheduler.CosineAnnealingLR(optimizer, STEPS),
        ],
        milestones=[5],
    )
    plateau = lr_scheduler.ReduceLROnPlateau(second, factor=0.5, patience=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    ema = swa_utils.AveragedModel(
        model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    tokens = torch.randint(0, 12, (BATCHES * 6,))
    loader = DataLoader(TensorDataset(tokens), batch_size=6, shuffle=True)

    tracked: dict[str, Any] = {
        "model": model,
        "critic": critic,
        "temperature": temperature,
        "optimizers": [optimizer, second],
        "schedulers": {"rate": scheduler, "plateau": plateau},
        "scaler": scaler,
        "ema": ema,
    }
    run = holdfast.Run(address, every=2, quiet=True)
    run.track(**tracked)
    for _ in run.epochs(EPOCHS):
        die()
        for (batch,) in run.batches(loader):
            die()
            logits = model(batch)
            loss = nn.functional.cross_entropy(logits * temperature.exp(), batch)
            value = critic(logits.detach().to(torch.bfloat16)).float().square().mean()
            optimizer.zero_grad()
            second.zero_grad()
            scaler.scale(loss + value).backward()
            if run.step % 5 == 4:
                model.embed.weight.grad[0, 0] = float("inf")  # the scaler skips this step
            scaler.step(optimizer)
            scaler.step(second)
            scaler.update()
            scheduler.step()
            ema.update_parameters(model)
            losses[run.step] = loss.item() + random.random() + np.random.rand()
            die()
        plateau.step(run.step)  # worse each time
        die()
    run.close()
    return tracked


def values(tracked: dict[str, Any]) -> dict[str, Any]:
    """All state, by its bits."""
    return {
        "model": dict(tracked["model"].state_dict()),
        "critic": dict(tracked["critic"].state_dict()),
        "temperature": tracked["temperature"],
        "optimizers": [optimizer.state_dict() for optimizer in tracked["optimizers"]],
        "rate": {
            **tracked["schedulers"]["rate"].state_dict(),
            "_schedulers": [
                part.state_dict() for part in tracked["schedulers"]["rate"]._schedulers
            ],
        },
        "plateau": tracked["schedulers"]["plateau"].state_dict(),
        "scaler": tracked["scaler"].state_dict(),
        "ema": dict(tracked["ema"].state_dict()),
        "random": [torch.get_rng_state(), random.random(), float(np.random.rand())],
    }


def test_resumes_bit_for_bit_from_every_place() -> None:
    expected_losses: dict[int, float] = {}
    address = fresh_address()
    places = Copying(address)
    tracked = training(address, places, expected_losses)
    expected = values(tracked)
    # All that is there to be saved has changed.
    assert len(expected_losses) == STEPS
    assert tracked["scaler"].get_scale() != 2.0**10
    assert tracked["ema"].n_averaged == STEPS
    assert tracked["optimizers"][1].param_groups[0]["lr"] < 0.01
    assert tracked["temperature"] != 0

    # An epoch has ten places: of one after the other, others are tried.
    for place in range(0, places.calls, 1 if EXHAUSTIVE else 3):
        left, losses = places.left[place], {}
        saved = max(steps_of(left), default=0)
        tracked = training(left, Countdown(), losses)
        rest = {step: loss for step, loss in expected_losses.items() if step >= saved}
        assert losses == rest, f"killed at place {place}"
        assert_same(values(tracked), expected, f"killed at place {place}")
        assert tracked["model"].out.weight is tracked["model"].embed.weight
        assert not tracked["model"].frozen.weight.requires_grad


def lazy_training(address: str, die: Countdown) -> Any:
    torch.manual_seed(3)
    model = nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.LazyLinear(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    run = holdfast.Run(address, every=1, quiet=True)
    run.track(model=model, optimizer=optimizer)
    for _ in run.range(6):
        die()
        optimizer.zero_grad()
        model(torch.randn(3, 4)).square().mean().backward()
        optimizer.step()
    run.close()
    return {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()}


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
@pytest.mark.parametrize("place", [0, 3])
def test_a_lazy_model_and_its_optimizer_need_no_input_to_be_resumed(place: int) -> None:
    address = fresh_address()
    with process():
        lazy_training(address, Countdown(place))
    resumed = lazy_training(address, Countdown())
    assert_same(resumed, lazy_training(fresh_address(), Countdown()))


def test_the_hint_about_a_layer_that_has_another_name_works() -> None:
    def net(name: str, value: float) -> torch.nn.Module:
        layers = torch.nn.Sequential(
            OrderedDict([(name, torch.nn.Linear(1, 1)), ("tail", torch.nn.Linear(1, 1))])
        )
        for parameter in layers.parameters():
            torch.nn.init.constant_(parameter, value)
        return layers

    def start(module: torch.nn.Module, **options: Any) -> list[float]:
        run = holdfast.Run(address, every=1, quiet=True, **options).track(net=module)
        list(run.range(2 if run.resumed is None else 3))
        return [parameter.item() for parameter in module.parameters()]

    address = fresh_address()
    start(net("head", 1))
    with pytest.raises(StructureMismatch) as caught:
        start(net("top", 0))
    assert "missing in the checkpoint (2):\n  net/top.weight\n" in caught.value.message
    assert "unexpected in the checkpoint (2):\n  net/head.weight\n" in caught.value.message
    assert 'Run(..., rename={"saved": "live"}), e.g. {"model/head": "model/top"}' in (
        caught.value.hint
    )
    assert start(net("top", 0), rename={"net/head": "net/top"}) == [1, 1, 1, 1]
    assert "Run(..., strict=False) leaves all that differs as it is" in caught.value.hint
    assert start(net("head", 0), strict=False) == [0, 0, 1, 1]
