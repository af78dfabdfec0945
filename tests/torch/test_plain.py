"""save_checkpoint and load_checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import holdfast.torch
from holdfast.errors import StructureMismatch
from tests.torch.roundtrip import assert_same


def parts() -> tuple[Any, Any, Any]:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2)


def test_there_and_back(tmp_path: Path) -> None:
    address = tmp_path / "run"
    model, optimizer, scheduler = parts()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    scheduler.step()
    saved: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    assert holdfast.torch.load_checkpoint(address, **saved) is None
    info = holdfast.torch.save_checkpoint(
        address, **saved, step=7, metrics={"loss": 0.5}, epoch=2, ema=torch.ones(2)
    )
    assert (info.step, dict(info.metrics)) == (7, {"loss": 0.5})
    expected = torch.rand(3).tolist()

    names = ("model", "optimizer", "scheduler")
    live = dict(zip(names, parts(), strict=True))
    average = torch.zeros(2)
    restored = holdfast.torch.load_checkpoint(address, **live, epoch=0, ema=average)
    assert restored is not None
    assert (restored.info.step, restored.values["epoch"]) == (7, 2)
    assert average.tolist() == [1, 1]
    assert torch.rand(3).tolist() == expected
    for name in names:
        assert_same(dict(live[name].state_dict()), dict(saved[name].state_dict()))


def test_one_checkpoint_by_its_reference(tmp_path: Path) -> None:
    address = f"{tmp_path}/run"
    model = nn.Linear(3, 2)
    for step, loss in ((1, 0.5), (2, 0.25), (3, 0.75)):
        nn.init.constant_(model.weight, step)
        holdfast.torch.save_checkpoint(address, model=model, step=step, metrics={"loss": loss})
    for selector, step in (("", 3), ("@1", 1), ("@latest", 3), ("@best:loss", 2)):
        restored = holdfast.torch.load_checkpoint(f"{address}{selector}", model=model)
        assert restored is not None
        assert restored.info.step == step
        assert model.weight[0, 0] == step


def test_only_what_is_asked_for_and_the_random_state_on_request(tmp_path: Path) -> None:
    model, optimizer, _ = parts()
    holdfast.torch.save_checkpoint(tmp_path / "run", model=model, optimizer=optimizer, step=1)
    live = nn.Linear(3, 2)
    torch.manual_seed(5)
    expected = torch.rand(2).tolist()
    torch.manual_seed(5)
    holdfast.torch.load_checkpoint(tmp_path / "run", model=live, rng=False)
    assert torch.rand(2).tolist() == expected
    assert live.weight.tolist() == model.weight.tolist()


def test_what_is_asked_for_must_be_there(tmp_path: Path) -> None:
    model, optimizer, _ = parts()
    holdfast.torch.save_checkpoint(tmp_path / "run", model=model, step=1)
    with pytest.raises(StructureMismatch, match="optimizer"):
        holdfast.torch.load_checkpoint(tmp_path / "run", model=model, optimizer=optimizer)
    restored = holdfast.torch.load_checkpoint(
        tmp_path / "run", model=model, optimizer=optimizer, strict=False
    )
    assert restored is not None


def test_keep(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    for step in range(1, 4):
        holdfast.torch.save_checkpoint(tmp_path / "run", model=model, step=step, keep="last=2")
    with holdfast.CheckpointManager(tmp_path / "run") as manager:
        assert [info.step for info in manager.checkpoints()] == [2, 3]
