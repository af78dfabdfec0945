"""A model and its optimizer, divided among processes in one way, come back in another."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import distributed, nn

from tests.support import ranks
from tests.support.joined import Captured, Joined, captured, restore
from tests.support.layouts import LAYOUTS, Net, full_state, named

Full = dict[str, torch.Tensor]

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "loop": lambda p: torch.optim.Adam(p, lr=0.01, foreach=False, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


def built(layout: str, seed: int, kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    make, _ = LAYOUTS[layout]
    model = make(Net(), distributed.get_world_size())
    return model, OPTIMIZERS[kind](model.parameters())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """The same batches in each rank."""
    torch.manual_seed(5)
    for _ in range(steps):
        tokens = torch.randint(9, (2, 4))
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(layout: str, kind: str) -> tuple[Captured, Full]:
    model, optimizer = built(layout, 1, kind)
    train(model, optimizer, 2)
    with torch.no_grad():
        model(torch.zeros(2, 4, dtype=torch.long))  # FSDP leaves the root as it was used
    piece = captured({"model": model, "optimizer": optimizer})
    return piece, full_state(model, optimizer)


@cache
def checkpoint_of(layout: str, size: int, kind: str = "adamw") -> tuple[Joined, Full]:
    results = ranks.call(trained, size, layout, kind)
    for _, full in results:
        assert full.keys() == results[0][1].keys()
    return Joined.of([piece for piece, _ in results]), results[0][1]


def resumed(checkpoint: Joined, expected: Full, layout: str, kind: str, warm: bool) -> list[str]:
    """What differs from the whole tensors that were saved, in this layout."""
    model, optimizer = built(layout, 2, kind)
    if warm:
        train(model, optimizer, 1)
        with torch.no_grad():
            model(torch.zeros(2, 4, dtype=torch.long))
    restore(checkpoint, {"model": model, "optimizer": optimizer})
    found = full_state(model, optimizer)
    wrong = [
        name
        for name in {*found, *expected}
        if name not in found or name not in expected or not torch.equal(found[name], expected[name])
    ]
    placements = {
        name: str(getattr(value, "placements", None))
        for name, parameter in named(model)
        for value in (parameter, *optimizer.state[parameter].values())
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.numel() > 1
    }
    for name, parameter in named(model):
        if parameter.numel() > 1:
            assert placements[name] == str(getattr(parameter, "placements", None)), name
    train(model, optimizer, 1)
    return wrong


PLACES = [(name, size) for name, (_, sizes) in LAYOUTS.items() for size in sizes]
PAIRS = [
    (PLACES[i], PLACES[(i + step) % len(PLACES)])
    for step in (1, 5)
    for i in range(len(PLACES))
    if step == 1 or i % 2
]


@pytest.mark.parametrize(("saved", "live"), PAIRS, ids=str)
def test_a_layout_restores_into_another(saved: tuple[str, int], live: tuple[str, int]) -> None:
    checkpoint, expected = checkpoint_of(*saved)
    warm = PAIRS.index((saved, live)) % 2 == 0
    results = ranks.call(resumed, live[1], checkpoint, expected, live[0], "adamw", warm)
    assert results == [[]] * live[1]


@pytest.mark.parametrize(
    ("kind", "saved", "live"),
    [
        ("loop", "ddp", "tp"),
        ("loop", "tp", "fsdp"),
        ("momentum", "fsdp", "tp"),
        ("momentum", "tp", "ddp"),
        # torch itself has no fused step for DTensors beside plain tensors, and no step of
        # Adafactor for DTensors at all.
        ("fused", "ddp", "fsdp"),
        ("fused", "fsdp", "ddp"),
        ("adafactor", "ddp", "ddp"),
    ],
)
def test_each_optimizer_comes_along(kind: str, saved: str, live: str) -> None:
    checkpoint, expected = checkpoint_of(saved, 2, kind)
    results = ranks.call(resumed, 2, checkpoint, expected, live, kind, False)
    assert results == [[], []]
