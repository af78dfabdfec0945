"""FullyShardedDataParallel (FSDP1) saves where its shards live, and restores in any layout.

What should come is what torch's own state-dict API gathers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from tests.support import ranks
from tests.support.exhaustive import EXHAUSTIVE
from tests.support.flat_layouts import CPU, FLAT, gathered, wrapped
from tests.support.joined import Captured, Joined, captured, restore
from tests.support.layouts import Net

Full = dict[str, torch.Tensor]

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
}


def built(layout: str, seed: int, kind: str = "adamw", *, tied: bool = False) -> Any:
    torch.manual_seed(seed)
    model = wrapped(layout, Net(tied=tied), distributed.get_world_size())
    return model, OPTIMIZERS[kind](model.parameters())


def backward(model: Any, number: int) -> None:
    """The same batch in each rank."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(9, (2, 4), generator=generator)
    nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()


def train(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for number in steps:
        backward(model, number)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        model(torch.zeros(2, 4, dtype=torch.long))  # the root is left as it was used


def differences(found: Full, expected: Full) -> list[str]:
    return [
        name
        for name in {*found, *expected}
        if name not in found or name not in expected or not torch.equal(found[name], expected[name])
    ]


def trained(layout: str, kind: str, tied: bool) -> tuple[Captured, Full, Full]:
    """What is saved; all of it, then and two steps later."""
    model, optimizer = built(layout, 1, kind, tied=tied)
    train(model, optimizer, range(2))
    piece = captured({"model": model, "optimizer": optimizer})
    there = gathered(model, optimizer)
    train(model, optimizer, range(2, 4))
    return piece, there, gathered(model, optimizer)


@cache
def checkpoint_of(
    layout: str, size: int, kind: str = "adamw", tied: bool = False
) -> tuple[Joined, Full, Full]:
    results = ranks.call(trained, size, layout, kind, tied)
    return Joined.of([piece for piece, *_ in results]), *results[0][1:]


def resumed(
    layout: str, kind: str, tied: bool, warm: bool, checkpoint: Joined, there: Full, later: Full
) -> tuple[list[str], list[str]]:
    """What differs, then and two steps later."""
    model, optimizer = built(layout, 2, kind, tied=tied)
    if warm:
        train(model, optimizer, range(7, 8))
    # In the chunks of the ranks, or in others.
    restore(checkpoint, {"model": model, "optimizer": optimizer}, seed=5 if warm else None)
    found = differences(gathered(model, optimizer), there)
    train(model, optimizer, range(2, 4))
    return found, differences(gathered(model, optimizer), later)


Place = tuple[str, int]


def check(saved: Place, live: Place, kind: str = "adamw", *, tied: bool = False) -> None:
    known = checkpoint_of(*saved, kind, tied)
    for warm in (False, True) if EXHAUSTIVE else ((saved[1] + live[1]) % 2 == 0,):
        for found, later in ranks.call(resumed, live[1], live[0], kind, tied, warm, *known):
            assert found == []
            assert later == [] or saved != live


PLACES = [(name, size) for name, sizes in FLAT.items() for size in sizes]
OTHERS = [("plain", 1), ("ddp", 2), ("ddp", 3), ("fsdp", 2), ("fsdp", 4), ("hsdp", 4), ("tp", 3)]
PAIRS = [
    (("full", 2), ("full", 2)),
    (("full", 2), ("fsdp", 2)),
    (("ddp", 2), ("full", 3)),
    (("ddp", 2), ("flat", 2)),
    (("flat", 3), ("plain", 1)),
]
MORE = [
    (("fsdp", 2), ("full", 4)),
    (("full", 4), ("flat", 3)),
    (("flat", 2), ("flat", 2)),
    (("hybrid", 4), ("ddp", 2)),
    (("full", 2), ("hybrid", 4)),
    (("zero2", 2), ("zero2", 2)),
    (("mixed", 2), ("mixed", 2)),
    (("copies", 2), ("full", 2)),
    (("full", 2), ("flat copies", 2)),
    (("flat ignored", 3), ("ddp", 3)),
    (("ddp", 2), ("flat ignored", 3)),
]
ALL = [(a, b) for a in (*PLACES, *OTHERS) for b in (*PLACES, *OTHERS) if a in PLACES or b in PLACES]


@pytest.mark.parametrize(("saved", "live"), PAIRS, ids=str)
def test_a_layout_restores_into_another(saved: Place, live: Place) -> None:
    check(saved, live)


@pytest.mark.slow
@pytest.mark.parametrize(("saved", "live"), ALL if EXHAUSTIVE else MORE, ids=str)
def test_more_layouts_do(saved: Place, live: Place) -> None:
    check(saved, live)


@pytest.mark.parametrize(
    ("kind", "saved", "live"),
    [
        ("momentum", ("full", 2), ("flat", 2)),
        ("adagrad", ("full", 3), ("full", 2)),  # has a state for parameters without elements
    ],
)
def test_each_optimizer_comes_along(kind: str, saved: Place, live: Place) -> None:
    check(saved, live, kind)


# Tied across modules, of which none is wrapped by itself: FSDP1 itself cannot have others.
@pytest.mark.parametrize(
    ("saved", "live"), [(("full", 2), ("ddp", 2)), (("ddp", 2), ("flat", 2))], ids=str
)
def test_tied_weights_come_along(saved: Place, live: Place) -> None:
    check(saved, live, tied=True)
    checkpoint, *_ = checkpoint_of(*saved, "adamw", True)
    paths = [leaf.path for leaf in checkpoint.leaves if leaf.path.startswith("model/")]
    assert sum("words" in path or "head" in path for path in paths) == 1


# -- what only some parameters have, and what cannot be ------------------------------------------


class Forked(nn.Module):
    """A part of it is used later, a part is frozen, and there are hyperparameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.later = nn.Linear(7, 3)
        self.frozen = nn.Linear(7, 3)
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor, later: bool) -> torch.Tensor:
        x = self.first(x)
        y = self.frozen(x)
        return y + self.later(x) if later else y


def forked(layout: str) -> tuple[Any, torch.optim.Optimizer]:
    net = Forked()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if layout == "full":
            net.later = FullyShardedDataParallel(net.later, device_id=CPU, use_orig_params=True)  # pyright: ignore
            model: Any = FullyShardedDataParallel(net, device_id=CPU, use_orig_params=True)
        else:
            model = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
    named = list(model.named_parameters())
    groups = [
        {"params": [one for one in named if "bias" not in one[0]], "weight_decay": 0.1},
        {"params": [one for one in named if "bias" in one[0]], "lr": 0.05},
    ]
    return model, torch.optim.AdamW(groups, lr=0.01)


def steps_of(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for number in steps:
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(number))
        model(x, number > 2).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def forked_saved(layout: str, steps: int) -> tuple[Captured, Full]:
    torch.manual_seed(1)
    model, optimizer = forked(layout)
    steps_of(model, optimizer, range(steps))
    piece = captured({"model": model, "optimizer": optimizer})
    steps_of(model, optimizer, range(steps, steps + 3))
    return piece, gathered(model, optimizer)


def forked_resumed(layout: str, steps: int, checkpoint: Joined, later: Full) -> list[str]:
    torch.manual_seed(2)
    model, optimizer = forked(layout)
    restore(checkpoint, {"model": model, "optimizer": optimizer})
    steps_of(model, optimizer, range(steps, steps + 3))
    return differences(gathered(model, optimizer), later)


@pytest.mark.parametrize(
    ("steps", "layouts"), [(2, ("full", "full")), (4, ("full", "ddp")), (2, ("ddp", "full"))]
)
def test_what_is_used_later_or_frozen_is_as_it_was(steps: int, layouts: tuple[str, str]) -> None:
    results = ranks.call(forked_saved, 2, layouts[0], steps)
    checkpoint = Joined.of([piece for piece, _ in results])
    for found in ranks.call(forked_resumed, 2, layouts[1], steps, checkpoint, results[0][1]):
        assert found == []
