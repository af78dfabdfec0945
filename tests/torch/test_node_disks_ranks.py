"""Trainings whose ranks have disks of their own, and a mirror that all of them reach."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import holdfast
from tests.support.ranks import call

_STEPS = 9


class Stopped(Exception):
    """In place of a crash."""


def train(folder: str, stop: int) -> list[float]:
    """The weights at the end, or those that a crash has left at step `stop`."""
    rank = torch.distributed.get_rank()
    before = os.getcwd()
    node = Path(folder, f"node{rank}")
    node.mkdir(exist_ok=True)
    os.chdir(node)  # so that one address is another folder on each
    torch.manual_seed(3)
    model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Dropout()))
    torch.manual_seed(rank)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    run = holdfast.Run("run", every=2, keep="last=1", mirror=Path(folder, "shared"), quiet=True)
    run.track(model=model, optimizer=optimizer)
    try:
        with run:
            for step in run.range(_STEPS):
                if step == stop:
                    run.manager.wait()
                    raise Stopped
                model(torch.randn(2, 4)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
    except Stopped:
        pass
    finally:
        os.chdir(before)
    return [value.item() for value in model.state_dict()["module.0.weight"].flatten()]


@pytest.mark.parametrize("lost", [None, 0, 1])
def test_a_training_goes_on_from_disks_and_mirror(tmp_path: Path, lost: int | None) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    expected = call(train, 2, str(whole), -1)
    assert call(train, 2, str(killed), 5) != expected
    for rank in (0, 1):
        assert list((killed / f"node{rank}" / "run" / "node" / "packs").iterdir())
    if lost is not None:
        shutil.rmtree(killed / f"node{lost}")
    assert call(train, 2, str(killed), -1) == expected
    with holdfast.CheckpointManager(killed / "shared") as ckpts:
        assert [each.step for each in ckpts.checkpoints()] == [_STEPS]
        assert all(each.ok for each in ckpts.verify())
