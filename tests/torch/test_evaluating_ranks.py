"""`run.evaluate` of several ranks: each gets its part of a checkpoint, and its own state back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn

import holdfast
from tests.support import ranks
from tests.support.layouts import LAYOUTS, Net

STEPS, SIZE = 6, 2


def batch(number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * number + distributed.get_rank())
    return torch.randint(9, (2, 4), generator=generator)


def loss_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


def local(tensor: Any) -> torch.Tensor:
    return getattr(tensor, "_local_tensor", tensor).detach().clone()


def evaluated(model: Any, seen: list[float]) -> float:
    """The mean of all ranks; it changes everything that it can."""
    model.eval()
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        loss = loss_of(model, batch(99)) + model.seen_by_rank.sum()
    distributed.all_reduce(loss)
    loss_of(model, batch(1)).backward()
    model.seen_by_rank.add_(5)
    torch.rand(2)
    seen.append(float(loss))
    return seen[-1]


def train(address: str, layout: str, evaluate: bool) -> dict[str, Any]:
    rank = distributed.get_rank()
    torch.manual_seed(1)
    net: Any = Net()
    net.register_buffer("seen_by_rank", torch.zeros(1))
    model: Any = LAYOUTS[layout][0](net, SIZE)
    if layout == "ddp":
        model.register_forward_pre_hook(lambda module, args: None)
        model.seen_by_rank = net.seen_by_rank
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(rank)
    found: dict[str, Any] = {"losses": [], "infos": []}
    run = holdfast.Run(address, every=2, keep=None, quiet=True)
    run.track(model=model, optimizer=optimizer)
    with run:
        for step in run.range(STEPS):
            loss_of(model, batch(step)).backward()
            net.seen_by_rank += rank + 1
            if evaluate and step in (1, 4):  # gradients are there, and nothing is saved at 1
                done = run.evaluate(
                    lambda checkpoint: evaluated(model, found["losses"]), metric="test"
                )
                found["infos"].append([(one.info.step, one.outcome, one.metrics) for one in done])
            optimizer.step()
            optimizer.zero_grad()
            found["noise"] = torch.rand(2)
    values = [*model.parameters(), *model.buffers()]
    for state in optimizer.state.values():
        values += state.values()
    return {**found, "values": [local(value) for value in values]}


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_all_ranks_evaluate_and_go_on_as_if_they_had_not(layout: str, tmp_path: Path) -> None:
    alone = ranks.call(train, SIZE, str(tmp_path / "alone"), layout, False)
    found = ranks.call(train, SIZE, str(tmp_path / "run"), layout, True)
    for rank in range(SIZE):
        assert torch.equal(found[rank]["noise"], alone[rank]["noise"])
        pairs = zip(found[rank]["values"], alone[rank]["values"], strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
        assert found[rank]["infos"] == found[0]["infos"]
        assert found[rank]["losses"] == found[0]["losses"]
    first, second = found[0]["infos"]
    assert first == []
    assert [(step, outcome) for step, outcome, _ in second] == [(2, "evaluated"), (4, "evaluated")]
    assert [metrics["test"] for *_, metrics in second] == found[0]["losses"]
    # What ranks have of their own is that of the rank: 2 * 1 + 2 * 2 after two steps.
    with holdfast.CheckpointManager(tmp_path / "run") as ckpts:
        assert ckpts.info(2).metrics["test"] == found[0]["losses"][0]
        assert "test" not in ckpts.info(6).metrics
