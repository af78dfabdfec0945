"""A Trainer that goes on on another number of ranks: each sample is seen once in each epoch."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback

from tests.support.exhaustive import EXHAUSTIVE
from tests.support.jobs import Killed
from tests.support.tiny_transformers import BY_LENGTH, Fixed, train
from tests.support.trainer_ranks import call, values

_ROWS = 24


class Seeing(Trainer):
    """Knows which samples each of its steps had, and in which epoch."""

    seen: list[tuple[int, int]]

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        epoch = int(self.state.epoch or 0)
        samples = samples_by_words()
        type(self).seen += [(epoch, samples[tuple(row)]) for row in inputs["input_ids"].tolist()]
        return super().training_step(model, inputs, *args, **kwargs)


@functools.cache
def samples_by_words() -> dict[tuple[int, ...], int]:
    data = Fixed(_ROWS)
    return {tuple(data[n]["input_ids"].tolist()): n for n in range(_ROWS)}


class Dying(TrainerCallback):
    def __init__(self, step: int | None) -> None:
        self.step = step
        self.began = 0

    def on_step_begin(self, args: Any, state: Any, *others: Any, **kwargs: Any) -> None:
        self.began += 1
        if state.global_step == self.step:
            raise Killed


def trained(address: str, die_at: int | None, settings: dict[str, Any]) -> dict[str, Any]:
    """What one rank saw, up to step `die_at`."""
    Seeing.seen = []
    dying = Dying(die_at)
    settings = {"per_device_train_batch_size": 2, "num_train_epochs": 3, **settings}
    found: dict[str, Any] = {}
    try:
        found = train(
            address,
            dying,
            data=lambda: Fixed(_ROWS),
            trainer=Seeing,
            **settings,
        )
    except Killed:
        assert die_at is not None
    return {"seen": Seeing.seen, "began": dying.began, **found}


Start = tuple[int, int | None, dict[str, Any]]
"""Ranks, the step to die at, settings."""


def check_seen_once(address: str, starts: list[Start]) -> list[dict[str, Any]]:
    """What rank 0 found in each start."""
    seen = Counter[tuple[int, int]]()
    found: list[dict[str, Any]] = []
    for ranks, die_at, settings in starts:
        outcomes = values(call(trained, ranks, address, die_at, settings))
        for outcome in outcomes:
            seen.update(outcome["seen"])
        found.append(outcomes[0])
    assert seen == Counter((epoch, sample) for epoch in range(3) for sample in range(_ROWS))
    return found


def test_in_mid_epoch(tmp_path: Path) -> None:
    """An epoch has 6 steps on two ranks, and 12 on one."""
    starts: list[Start] = [(1, 17, {}), (2, 20, {}), (1, None, {})]
    *_, last = check_seen_once(str(tmp_path / "run"), starts)
    assert last["state"][:2] == (12 + 5 + 3 + 1 + 12, 3.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "starts",
    [
        # At the end of an epoch, and one step to each side of it.
        *([(2, step, {}), (1, None, {})] for step in ((5, 6, 7) if EXHAUSTIVE else (6,))),
        *([(1, step, {}), (2, None, {})] for step in ((2, 12, 14) if EXHAUSTIVE else (12,))),
        # As many samples in a step as before.
        [(2, 7, {}), (1, 9, {"per_device_train_batch_size": 4}), (2, None, {})],
        [(2, 7, {}), (1, 9, {"gradient_accumulation_steps": 2}), (2, None, {})],
        [(1, 14, BY_LENGTH), (2, 18, BY_LENGTH), (1, None, BY_LENGTH)],
    ],
    ids=str,
)
def test_anywhere(starts: list[Start], tmp_path: Path) -> None:
    *_, last = check_seen_once(str(tmp_path / "run"), starts)
    assert last["state"][1] == 3.0


@pytest.mark.slow
def test_incomplete_batches_are_filled_up(tmp_path: Path) -> None:
    """As Accelerate does: 11 are left for 2 ranks, which take 6 each."""
    address = str(tmp_path / "run")
    starts: list[Start] = [(1, 13, {}), (2, None, {})]
    seen = Counter[tuple[int, int]]()
    for one in starts:
        for outcome in values(call(trained, *one[:1], address, *one[1:])):
            seen.update(outcome["seen"])
    assert len(seen) == 3 * _ROWS
    assert seen.total() == 3 * _ROWS + 2


@pytest.mark.slow
def test_a_number_of_steps(tmp_path: Path) -> None:
    """`max_steps` is what it says, in as many epochs as it takes."""
    settings: dict[str, Any] = {"max_steps": 20, "num_train_epochs": 1}
    starts: list[Start] = [(1, 14, settings), (2, None, settings)]
    address = str(tmp_path / "run")
    first, last = (values(call(trained, *one[:1], address, *one[1:])) for one in starts)
    assert last[0]["state"][0] == 20
    seen = Counter(sample for one in [*first, *last] for sample in one["seen"])
    assert max(seen.values()) == 1
    assert [Counter(epoch for epoch, _ in seen)[n] for n in range(4)] == [24, 24, 4, 0]


@pytest.mark.slow
def test_what_the_trainer_cannot_divide(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"gradient_accumulation_steps": 2}
    address = str(tmp_path / "run")
    values(call(trained, 1, address, 3, {}))
    for ended in call(trained, 2, address, None, settings):
        assert "LoopError" in ended.error
        assert "has 5 items left of it" in ended.error
    check = values(call(trained, 1, address, None, {}))
    assert check[0]["state"][1] == 3.0
