"""`run.evaluate` with modules and optimizers: gradients, modes, statistics and states stay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import holdfast
import holdfast.run.run as runs
from holdfast.manager import CheckpointManager
from tests.support.jobs import fresh_address


@pytest.fixture(autouse=True)
def put_away_open_runs() -> Iterator[None]:
    yield
    for reference in list(runs._open_runs.values()):
        if (run := reference()) is not None:
            run.close()


def build() -> tuple[torch.nn.Sequential, torch.optim.Optimizer]:
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8),
        torch.nn.BatchNorm1d(8),
        torch.nn.Dropout(0.3),
        torch.nn.Linear(8, 1),
    )
    return model, torch.optim.Adam(model.parameters(), amsgrad=True)


def train(evaluate: bool) -> tuple[list[torch.Tensor], Any]:
    """Two backward passes for each step; the evaluation is between them."""
    torch.manual_seed(0)
    model, optimizer = build()
    average = torch.optim.swa_utils.AveragedModel(model)
    with holdfast.Run(fresh_address(), every=2, keep=None, quiet=True) as run:
        run.track(model=model, optimizer=optimizer, average=average)
        for step in run.range(9):
            loss = model(torch.randn(8, 4)).square().mean()
            loss.backward()
            grads = [p.grad for p in model.parameters()]
            if evaluate and step > 4:

                def test(checkpoint: Any) -> torch.Tensor:
                    assert model.training
                    model.eval()
                    for name, tensor in model.state_dict().items():
                        assert torch.equal(tensor, checkpoint["model"][name])
                    assert all(p.grad is None for p in model.parameters())
                    model[0].weight.requires_grad_(False)
                    found = model(torch.ones(2, 4)).sum() + torch.rand(1)[0]
                    found.backward()
                    optimizer.step()
                    model.train()
                    model(torch.randn(8, 4))
                    model.eval()
                    return found

                done = run.evaluate(test)
                assert done
                assert model.training
                assert all(p.requires_grad for p in model.parameters())
                # The very tensors: whoever holds one goes on with it.
                assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
            (model(torch.randn(8, 4)) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(model)
        address = run.address
    end = [*model.state_dict().values(), *average.state_dict().values(), torch.rand(3)]
    return [tensor.clone() for tensor in end], address


def test_the_training_does_not_notice() -> None:
    left_alone, one = train(evaluate=False)
    evaluated, other = train(evaluate=True)
    for a, b in zip(left_alone, evaluated, strict=True):
        assert torch.equal(a, b)
    with CheckpointManager(one, keep=None) as a, CheckpointManager(other, keep=None) as b:
        for info in a.checkpoints():
            found = a.compare(info.step, b, info.step).differences
            assert {d.section for d in found} <= {"metrics", "environment"}, found


def test_an_optimizer_without_state_gets_none() -> None:
    """Before the first step it has no moments: what was restored is taken out again."""
    address = fresh_address()
    torch.manual_seed(0)
    model, optimizer = build()
    with holdfast.Run(address, every=1, keep=None, quiet=True) as run:
        run.track(model=model, optimizer=optimizer)
        for _ in run.range(2):
            model(torch.randn(8, 4)).sum().backward()
            optimizer.step()
    model, optimizer = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with CheckpointManager(address, keep=None) as manager:
        done = manager.evaluate(
            lambda c: len(optimizer.state),
            metric="n",
            into={"model": model, "optimizer": optimizer},
        )
    assert [one.metrics["n"] for one in done] == [6.0, 6.0]
    assert not optimizer.state
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
