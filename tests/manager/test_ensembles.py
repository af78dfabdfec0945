"""Models of several checkpoints, in the memory of one."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.errors import CheckpointNotFound, DamagedObject, StructureMismatch, UsageError
from holdfast.manager import CheckpointManager
from tests.support.damage import damage_newest
from tests.support.jobs import fresh_address


class Linear:
    """The least that can be restored."""

    def __init__(self) -> None:
        self.w = np.zeros(3)

    def state_dict(self) -> dict[str, Any]:
        return {"w": self.w}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.w = np.array(state["w"])

    def __call__(self, x: float) -> float:
        return float(self.w[0]) * x


def saved(address: Any, factor: int = 1) -> Any:
    model = Linear()
    with CheckpointManager(address, keep=None) as manager:
        for step in range(1, 6):
            model.w = np.full(3, float(factor * step))
            state = {"model": model, "ema": {"w": -model.w}, "other": np.zeros(2)}
            manager.save(step, state, metrics={"loss": abs(step - 3)}).result()
    return address


def test_one_after_another() -> None:
    run, model = saved(fresh_address()), Linear()
    members = holdfast.ensemble(model, f"{run}@last=3")
    assert len(members) == 3
    assert [info.step for info in members.infos] == [3, 4, 5]
    random.seed(1)
    before = random.getstate()
    for _ in range(2):
        answers = []
        for member in members:
            assert member is model
            answers.append(member(2.0))
        assert answers == [6.0, 8.0, 10.0]
    assert random.getstate() == before
    assert model.w[0] == 5.0


def test_of_several_runs_and_in_their_order() -> None:
    one, two, model = saved(fresh_address()), saved(fresh_address(), 10), Linear()
    references = [f"{two}@best=2:loss", f"{one}@1", f"{two}@3", one]
    members = holdfast.ensemble(model, references)
    assert [member(1.0) for member in members] == [20.0, 30.0, 1.0, 5.0]
    assert [info.address for info in members.infos] == [two, two, one, one]


def test_all_at_once() -> None:
    run = saved(fresh_address())
    models = holdfast.ensemble(Linear(), f"{run}@2 4").models(Linear)
    assert [model(1.0) for model in models] == [2.0, 4.0]
    one = Linear()
    with pytest.raises(UsageError, match="the same model twice"):
        holdfast.ensemble(one, f"{run}@last=2").models(lambda: one)


def test_under_another_name() -> None:
    run = saved(fresh_address())
    weights = {"w": np.zeros(3)}
    found = [one["w"][0] for one in holdfast.ensemble(weights, f"{run}@last=2", name="ema")]
    assert found == [-4.0, -5.0]
    other = {"v": np.zeros(3)}
    renamed = holdfast.ensemble(other, run, name="ema", rename={"ema/w": "ema/v"})
    assert [one["v"][0] for one in renamed] == [-5.0]


def test_below_a_name() -> None:
    address = fresh_address()
    with CheckpointManager(address) as manager:
        for step in (1, 2):
            model = {"w": np.full(3, float(step))}
            manager.save(step, {"trainer": {"model": model, "progress": step}}).result()
    weights = {"w": np.zeros(3)}
    members = holdfast.ensemble(weights, f"{address}@last=2", name="trainer/model")
    assert [one["w"][0] for one in members] == [1.0, 2.0]


def test_which_they_are_is_decided_once(tmp_path: Path) -> None:
    run, model = saved(tmp_path / "run"), Linear()
    members = holdfast.ensemble(model, f"{run}@last=2")
    saved(run, 7)
    assert [member(1.0) for member in members] == [4.0, 5.0]
    with CheckpointManager(run, keep=None) as manager:
        manager.remove([members.infos[0].id])
    with pytest.raises(CheckpointNotFound):
        list(members)


def test_what_cannot_be_had(tmp_path: Path) -> None:
    run, model = saved(tmp_path / "run"), Linear()
    with pytest.raises(CheckpointNotFound, match="no checkpoint at step 9"):
        holdfast.ensemble(model, f"{run}@9")
    with pytest.raises(UsageError, match="no checkpoint is named"):
        holdfast.ensemble(model, [])
    with pytest.raises(StructureMismatch) as caught:
        list(holdfast.ensemble(model, run, name="nothing"))
    assert "holds model, ema, other: say which by name=" in caught.value.hint
    immutable: Any = (1, 2)
    with pytest.raises((UsageError, StructureMismatch)):
        list(holdfast.ensemble(immutable, run))


def test_a_damaged_member_is_an_error(tmp_path: Path) -> None:
    run, model = saved(tmp_path / "run"), Linear()
    damage_newest(run)  # in "ema"
    assert [member(1.0) for member in holdfast.ensemble(model, f"{run}@last=2")] == [4.0, 5.0]
    ema = {"w": np.zeros(3)}
    with pytest.raises(DamagedObject):
        list(holdfast.ensemble(ema, f"{run}@last=2", name="ema"))
    assert ema["w"][0] == -4.0, "of the one before it"
