"""A Trainer that is killed anywhere and started again ends as if it had been left alone."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.jobs import fresh_address
from tests.support.tiny_transformers import BY_LENGTH, Leaving, Stream, train


@pytest.mark.parametrize(
    "settings",
    [
        {"eval_strategy": "epoch", "logging_steps": 3},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"max_steps": 7, "eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True},
        {"data": Stream, "max_steps": 8, "logging_steps": 3},
        {"num_train_epochs": 1.5, "lr_scheduler_type": "cosine", "optim": "adafactor"},
        {"include_num_input_tokens_seen": True, **BY_LENGTH},
        {"bf16": True, "neftune_noise_alpha": 1.0},
    ],
    ids=lambda settings: "-".join(map(str, settings)),
)
def test_killed_anywhere(settings: dict[str, Any]) -> None:
    address = fresh_address()
    leaving = Leaving(address)
    whole = train(address, leaving, **settings)
    assert whole["state"][0] >= 7
    assert len({str(entry) for entry in whole["history"]}) >= 3
    for place, left in enumerate(leaving.left):
        if place % 3 == 1 or place in (0, len(leaving.left) - 1):
            again = train(left, run={"every": None}, **settings)
            assert again == whole, f"killed at place {place}"


def test_nothing_is_changed() -> None:
    """Not a bit: neither the order of the data nor what is drawn."""
    settings: dict[str, Any] = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}
    assert train(fresh_address(), **settings) == train(None, **settings)
