"""Runs of several ranks: what all of them decide together, and what each goes on with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.core.group import Group
from holdfast.errors import GroupError, SaveFailed, UsageError
from holdfast.stores.memory import MemoryStore
from tests.support.jobs import fresh_address
from tests.support.thread_ranks import ThreadGroup, all_ranks, run_ranks, waiting

SIZE = 2


@pytest.fixture(autouse=True)
def _ranks_are_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new Run closes one of the same address in its process: here that is another rank's."""
    monkeypatch.setattr("holdfast.run.run._close_older", lambda key, address, console: None)


class Counter:
    """State of a rank."""

    def __init__(self, rank: int) -> None:
        self.values = [rank]

    def state_dict(self) -> dict[str, Any]:
        return {"values": list(self.values), "array": np.full(100, self.values[-1])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = state["values"]


class Killed(BaseException):
    """As SIGKILL: nothing of the process runs any more."""


Body = Callable[[holdfast.Run, int], None]


def train(
    group: Group | bool | None,
    address: str,
    *,
    epochs: int = 2,
    steps: int = 4,
    body: Body = lambda run, rank: None,
    tail: Body = lambda run, rank: None,
    **options: Any,
) -> list[int]:
    rank = group.ranks.rank if group else 0  # pyright: ignore[reportAttributeAccessIssue]
    state = Counter(rank)
    run = holdfast.Run(address, group=group, quiet=True, **options)
    run.track(state=state)
    with run:
        for _ in run.epochs(epochs):
            for _ in run.range(steps):
                state.values.append(10 * run.step + rank)
                body(run, rank)
            tail(run, rank)
    return state.values


def saved(address: str) -> list[tuple[int, str]]:
    with holdfast.CheckpointManager(address) as ckpts:
        return [(each.step, each.note) for each in ckpts.checkpoints()]


def whole(rank: int, steps: int = 8) -> list[int]:
    return [rank, *(10 * step + rank for step in range(steps))]


@pytest.mark.parametrize("dies", [0, 1])
@pytest.mark.parametrize("at", range(8))
def test_ranks_go_on_where_they_were(at: int, dies: int) -> None:
    address = fresh_address()

    def body(run: holdfast.Run, rank: int) -> None:
        if run.step == at and rank == dies:
            raise Killed

    options: dict[str, Any] = {"every": 1, "keep": None}
    with waiting(0.2):
        results = run_ranks(SIZE, lambda group: train(group, address, body=body, **options))
    assert isinstance(results[dies], Killed)
    values = all_ranks(SIZE, lambda group: train(group, address, **options))
    assert values == [whole(rank) for rank in range(SIZE)]


def test_what_one_rank_asks_for_all_do_at_the_same_step() -> None:
    address = fresh_address()

    def body(run: holdfast.Run, rank: int) -> None:
        if run.step == 1 and rank == 1:
            run.save()

    all_ranks(SIZE, lambda group: train(group, address, body=body, every=None, keep=None))
    # It is told at the boundary behind step 2, and done at the next one.
    assert saved(address) == [(3, "another rank"), (8, "final")]


def test_the_clock_of_the_first_rank_counts() -> None:
    address = fresh_address()
    options: dict[str, Any] = {"every": "10s", "keep": None}

    def ranks(group: ThreadGroup) -> None:
        now = [0.0]

        def body(run: holdfast.Run, rank: int) -> None:
            now[0] += 6.0 if rank == 0 else 100.0

        train(group, address, body=body, clock=lambda: now[0], **options)

    all_ranks(SIZE, ranks)
    assert saved(address) == [(3, "every=10s"), (6, "every=10s"), (8, "final")]


def test_a_best_metric_is_that_of_the_first_rank_and_saved_at_once_behind_an_epoch() -> None:
    address = fresh_address()

    def tail(run: holdfast.Run, rank: int) -> None:
        run.log(loss=float(run.epoch if rank == 0 else -run.epoch))

    keep = "last=1 best=1:loss"
    all_ranks(SIZE, lambda group: train(group, address, epochs=3, tail=tail, every=None, keep=keep))
    assert saved(address) == [(4, "best"), (12, "final")]
    with holdfast.CheckpointManager(address) as ckpts:
        assert ckpts.info("best:loss").metrics == {"loss": 0.0}


def test_loops_of_different_lengths_are_an_error_on_all() -> None:
    address = fresh_address()

    def ranks(group: ThreadGroup) -> None:
        train(group, address, steps=4 + group.ranks.rank, every=None)

    results = run_ranks(SIZE, ranks)
    assert [type(result) for result in results] == [GroupError] * SIZE
    assert "different places" in str(results[0])


def test_a_rank_that_leaves_its_loop_alone_is_an_error_on_all() -> None:
    address = fresh_address()

    def ranks(group: ThreadGroup) -> None:
        with holdfast.Run(address, group=group, quiet=True, every=None) as run:
            for step in run.range(9):
                if step == 3 and group.ranks.rank == 1:
                    break

    results = run_ranks(SIZE, ranks)
    assert [type(result) for result in results] == [GroupError] * SIZE
    assert "one has left it" in str(results[0])


def test_ranks_with_other_rules_are_refused() -> None:
    address = fresh_address()
    results = run_ranks(SIZE, lambda group: train(group, address, every=group.ranks.rank + 2))
    assert [type(result) for result in results] == [GroupError] * SIZE
    assert "'2', '3'" in str(results[0])


def test_what_concerns_the_whole_run_the_first_rank_does(tmp_path: Path) -> None:
    address = fresh_address()

    def ranks(group: ThreadGroup) -> None:
        def tail(run: holdfast.Run, rank: int) -> None:
            run.log(loss=1.0 + rank)

        export = f"latest:{tmp_path / str(group.ranks.rank)}"
        train(group, address, tail=tail, every=2, on_finish="final", publish=export)

    all_ranks(SIZE, ranks)
    assert saved(address) == [(8, "final")]
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["0"]
    with holdfast.CheckpointManager(address) as ckpts:
        assert ckpts.info().metrics == {"loss": 1.0}


def test_each_rank_may_have_a_run_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    addresses = [fresh_address() for _ in range(SIZE)]
    values = all_ranks(SIZE, lambda group: train(group, addresses[group.ranks.rank], every=2))
    assert values == [whole(rank) for rank in range(SIZE)]
    assert capsys.readouterr().err.count(f"each of {SIZE} ranks has another address") == 1
    for address in addresses:
        with holdfast.CheckpointManager(address) as ckpts:
            assert ckpts.manifest().world_size == 1


def test_some_with_one_address_and_some_without_are_refused() -> None:
    addresses = [fresh_address()] * 2 + [fresh_address()]
    results = run_ranks(3, lambda group: train(group, addresses[group.ranks.rank]))
    assert [type(result) for result in results] == [GroupError] * 3


def test_a_copy_in_memory_is_for_one_process() -> None:
    results = run_ranks(SIZE, lambda group: train(group, "memory://held", hold=True))
    assert [type(result) for result in results] == [UsageError] * SIZE


def test_a_group_that_is_asked_for_must_be_there() -> None:
    with pytest.raises(UsageError, match="init_process_group"):
        holdfast.Run(fresh_address(), group=True).range(3)


def test_a_run_goes_on_with_more_and_with_fewer_ranks() -> None:
    address = fresh_address()
    all_ranks(2, lambda group: train(group, address, epochs=1, every=1))
    three = all_ranks(3, lambda group: train(group, address, epochs=2, every=1))
    # A rank that was not there begins with what rank 0 had.
    begun = [whole(0, 4), whole(1, 4), whole(0, 4)]
    ends = [[10 * step + rank for step in range(4, 8)] for rank in range(3)]
    assert three == [start + end for start, end in zip(begun, ends, strict=True)]
    one = train(False, address, epochs=3, every=1)
    assert one == [*three[0], *(10 * step for step in range(8, 12))]


def test_saves_that_fail_stop_all_ranks_at_the_same_step() -> None:
    store = MemoryStore("here")

    class Full(MemoryStore):
        """Takes no packs."""

        def put_new(self, key: str, parts: Any) -> bool:
            if key.startswith("packs/"):
                raise holdfast.errors.StoreFull("the disk is full")
            return store.put_new(key, parts)

        def create(self, key: str, *, at_most_bytes: int) -> Any:
            raise holdfast.errors.StoreFull("the disk is full")

    full = Full("here")
    for name in ("get", "list", "read_into", "size", "delete", "append", "settle"):
        setattr(full, name, getattr(store, name))
    steps: list[int] = []

    def ranks(group: ThreadGroup) -> None:
        own = full if group.ranks.rank == 1 else store

        def body(run: holdfast.Run, rank: int) -> None:
            run.manager.wait()
            steps.append(run.step)

        train(group, "", store=own, body=body, every=1, max_save_failures=2)

    results = run_ranks(SIZE, ranks)
    assert all(isinstance(result, SaveFailed) for result in results), results
    assert sorted(steps) == [0, 0, 1, 1, 2, 2]
