"""`run.evaluate` of several ranks: what one of them finds counts for all, and nobody waits for one
that has left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.errors import DamagedObject, GroupError, UsageError
from holdfast.manager import LoadedCheckpoint
from holdfast.repo.keys import manifest_key
from tests.support.jobs import fresh_address
from tests.support.thread_ranks import ThreadGroup, all_ranks, run_ranks

SIZE = 2
Fn = Callable[[LoadedCheckpoint, int, np.ndarray], Any]


@pytest.fixture(autouse=True)
def _ranks_are_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new Run closes one of the same address in its process: here that is another rank's."""
    monkeypatch.setattr("holdfast.run.run._close_older", lambda key, address, console: None)


def trained(group: ThreadGroup, address: str) -> None:
    weights = np.zeros(3)
    with holdfast.Run(address, every=1, keep=None, quiet=True, group=group) as run:
        run.track(weights=weights)
        for _ in run.range(3):
            weights += 1 + group.ranks.rank


def evaluated(group: ThreadGroup, address: str, fn: Fn, **options: Any) -> list[Any]:
    """Before the loop; the weights of this rank are as they were."""
    weights, rank = np.full(3, -1.0), group.ranks.rank
    run = holdfast.Run(address, every=1, keep=None, quiet=True, group=group)
    run.track(weights=weights)
    try:
        done = run.evaluate(lambda checkpoint: fn(checkpoint, rank, weights), **options)
    finally:
        assert list(weights) == [-1.0] * 3
        run.close()
    return [(each.info.step, each.outcome, dict(each.metrics)) for each in done]


def start(fn: Fn, **options: Any) -> tuple[str, list[Any]]:
    address = fresh_address()
    all_ranks(SIZE, lambda group: trained(group, address))
    return address, run_ranks(SIZE, lambda group: evaluated(group, address, fn, **options))


def test_each_rank_has_its_own_and_that_of_the_first_counts() -> None:
    def fn(checkpoint: LoadedCheckpoint, rank: int, weights: np.ndarray) -> Any:
        assert list(weights) == [checkpoint.info.step * (1.0 + rank)] * 3
        return {"w": weights[0], "best": -weights[0]} if rank == 0 else None

    address, results = start(fn, metric=["w", "best"])
    expected = [(step, "evaluated", {"w": float(step), "best": -float(step)}) for step in (1, 2, 3)]
    assert results == [expected] * SIZE
    with holdfast.CheckpointManager(address) as ckpts:
        assert [info.metrics["w"] for info in ckpts.checkpoints()] == [1.0, 2.0, 3.0]

    def never(checkpoint: LoadedCheckpoint, rank: int, weights: np.ndarray) -> Any:
        raise AssertionError

    again = all_ranks(SIZE, lambda group: evaluated(group, address, never, metric="w"))
    assert [[outcome for _, outcome, _ in one] for one in again] == [["known"] * 3] * SIZE


def test_what_is_damaged_for_one_is_so_for_all() -> None:
    def fn(checkpoint: LoadedCheckpoint, rank: int, weights: np.ndarray) -> float:
        if checkpoint.info.step == 2 and rank == 1:
            raise DamagedObject(manifest_key(checkpoint.info.id), "a byte is another")
        return weights[0]

    _, results = start(fn, metric="w")
    for found in results:
        assert [outcome for _, outcome, _ in found] == ["evaluated", "damaged", "evaluated"]


@pytest.mark.parametrize("fails", range(SIZE))
def test_what_one_rank_raises_ends_it_on_all(fails: int) -> None:
    def fn(checkpoint: LoadedCheckpoint, rank: int, weights: np.ndarray) -> float:
        if rank == fails:
            raise ValueError("no such class")
        return 1.0

    _, results = start(fn, metric="w")
    assert isinstance(results[fails], ValueError)
    other = results[1 - fails]
    assert isinstance(other, GroupError)
    assert f"rank {fails}: ValueError: no such class" in str(other)


def test_damage_of_another_run_ends_it_on_all() -> None:
    def fn(checkpoint: LoadedCheckpoint, rank: int, weights: np.ndarray) -> float:
        if rank == 1:
            raise DamagedObject("packs/000001-0123456789abcdef-0-0.safetensors", "not ours")
        return 1.0

    _, results = start(fn, metric="w")
    assert isinstance(results[0], GroupError)
    assert isinstance(results[1], DamagedObject)


def test_what_is_no_metric_of_the_first_is_refused_on_all() -> None:
    _, results = start(lambda checkpoint, rank, weights: "high", metric="w")
    assert isinstance(results[0], UsageError)
    assert isinstance(results[1], GroupError)
    assert "metric 'w' is not a number" in str(results[1])
