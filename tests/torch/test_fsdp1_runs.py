"""Runs with FullyShardedDataParallel (FSDP1): ended at many places, and gone on with."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

import holdfast
from tests.ranks.jobs import Job
from tests.support import ranks
from tests.support.exhaustive import EXHAUSTIVE
from tests.support.flat_layouts import gathered, wrapped
from tests.support.layouts import Net
from tests.torch.test_fsdp1 import backward


class Ended(BaseException):
    """This process does nothing more for the run."""


def train(address: str, layout: str, ends: int | None, evaluate: bool = False) -> Any:
    """Two epochs of five steps with an accumulation of two; `ends` after so many bodies."""
    size, rank = distributed.get_world_size(), distributed.get_rank()
    torch.manual_seed(1)
    model = wrapped(layout, Net(), size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    torch.manual_seed(rank)
    run = holdfast.Run(address, every=2, keep="last=2 best=1:loss", quiet=True, take_over=True)
    run.track(model=model, optimizer=optimizer, scheduler=scheduler)
    found: dict[str, Any] = {"tests": []}
    bodies = 0
    try:
        for _ in run.epochs(2):
            for step in run.range(5):
                if ends is not None and bodies == ends:
                    raise Ended
                bodies += 1
                backward(model, 10 * int(torch.randint(9, ())) + step)
                if step % 2:
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                run.log(loss=abs(step - 5))
            if evaluate:
                test = lambda checkpoint: backward(model, 3) or float(checkpoint.info.step)  # noqa: E731
                found["tests"] += [e.metrics for e in run.evaluate(test, metric="test")]
    except Ended:
        run.manager.wait()
        run._closed = True  # as a killed process, without its end
        run._session.gradients.close()
        run._session.barriers.close()
        return None
    run.close()
    return {**found, "state": gathered(model, optimizer), "noise": torch.rand(2)}


def check(layout: str, size: int, folder: Path, places: Sequence[int]) -> None:
    expected = ranks.call(train, size, str(folder / "whole"), layout, None)
    for ends in places:
        address = str(folder / f"ended-{ends}")
        ranks.call(train, size, address, layout, ends)
        for rank, found in enumerate(ranks.call(train, size, address, layout, None)):
            assert torch.equal(found["noise"], expected[rank]["noise"])
            assert found["state"].keys() == expected[0]["state"].keys()
            pairs = expected[0]["state"].items()
            assert [n for n, value in pairs if not torch.equal(found["state"][n], value)] == []


def test_a_run_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    check("full", 2, tmp_path, (3,))  # between a backward and its step


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "size"), [("full", 3), ("flat", 2), ("hybrid", 4)])
def test_runs_go_on_from_anywhere(layout: str, size: int, tmp_path: Path) -> None:
    check(layout, size, tmp_path, range(1, 10) if EXHAUSTIVE else (2, 5, 7))


def test_checkpoints_are_evaluated_beside_the_training(tmp_path: Path) -> None:
    alone = ranks.call(train, 2, str(tmp_path / "alone"), "full", None)
    found = ranks.call(train, 2, str(tmp_path / "run"), "full", None, True)
    for rank in range(2):
        assert torch.equal(found[rank]["noise"], alone[rank]["noise"])
        pairs = alone[0]["state"].items()
        assert [n for n, v in pairs if not torch.equal(found[rank]["state"][n], v)] == []
        assert found[rank]["tests"] == found[0]["tests"]
    assert [metrics["test"] for metrics in found[0]["tests"]][:2] == [2.0, 4.0]


@pytest.mark.slow
def test_a_rank_that_is_killed_and_fewer_that_go_on(tmp_path: Path) -> None:
    whole = Job(tmp_path / "whole", "fsdp1")
    assert whole.finish(2) == 0
    job = Job(tmp_path / "killed", "fsdp1")
    rng = random.Random(5)
    statuses = [job.killed(2, rng) for _ in range(3)]
    assert any(statuses)
    assert job.finish(2) == 0
    assert job.results(2) == whole.results(2)
    fewer = Job(tmp_path / "fewer", "fsdp1")
    while not fewer.killed(3, rng):
        shutil.rmtree(fewer.folder)
    assert fewer.finish(1) == 0
    assert len(fewer.results(1)[0]["losses"]) > 0
