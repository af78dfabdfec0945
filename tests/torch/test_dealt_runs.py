"""Runs of several ranks, started again on another number of them: each rank is a run at an
address of its own here, which goes on from its own checkpoint or from that of rank 0."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

import holdfast
from tests.support.jobs import Countdown, copied, fresh_address, process
from tests.torch.test_data_by_sample import Numbers

EPOCHS = 3
SAMPLES = 23
BATCH = 2

World = tuple[int, int | None]
"""The number of ranks, and the step (of this start) in which all are killed."""
Row = tuple[int, int, int, int, list[int]]
"""Epoch, step, number of the batch, length of the loop, samples."""


def program(
    address: str, rank: int, size: int, die: Countdown, rows: list[Row], tail_sets: bool = False
) -> None:
    run = holdfast.Run(address, every=1, quiet=True)
    weights = torch.zeros(3)
    run.track(weights=weights)
    sampler: Any = DistributedSampler(Numbers(SAMPLES), size, rank, seed=3)
    loader = DataLoader(Numbers(SAMPLES), BATCH, sampler=sampler)
    for epoch in run.epochs(EPOCHS):
        if not tail_sets:
            sampler.set_epoch(epoch)
        loop = run.batches(loader)
        for batch in loop:
            weights += torch.rand(3) * batch.sum()
            rows.append((epoch, run.step, run.batch, len(loop), batch.tolist()))
            die()
        if tail_sets:
            sampler.set_epoch(epoch + 1)
    run.close()


def start(
    worlds: list[World], left: list[str] | None = None, **options: Any
) -> tuple[list[list[list[Row]]], list[str]]:
    """What each rank of each world has completed, and the addresses that the last ones left."""
    completed: list[list[list[Row]]] = []
    addresses = left or []
    for size, die_at in worlds:
        before, addresses = addresses, []
        completed.append([])
        for rank in range(size):
            new = not before
            given = fresh_address() if new else copied(before[rank if rank < len(before) else 0])
            rows: list[Row] = []
            with process():
                torch.manual_seed(rank)
                program(given, rank, size, Countdown(die_at), rows, **options)
            completed[-1].append(rows if die_at is None else rows[:-1])
            addresses.append(given)
    return completed, addresses


def epoch_of(completed: list[list[list[Row]]], epoch: int) -> list[int]:
    """The samples of an epoch in the order that all ranks have in common."""
    found: list[int] = []
    for ranks in completed:
        own = [[one for row in rows if row[0] == epoch for one in row[4]] for rows in ranks]
        found += [sample for turn in zip(*own, strict=True) for sample in turn]
    return found


def order_of(epoch: int) -> list[int]:
    sampler: Any = DistributedSampler(Numbers(SAMPLES), 1, 0, seed=3)
    sampler.set_epoch(epoch)
    return list(sampler)


def check(worlds: list[World], **options: Any) -> list[list[list[Row]]]:
    completed, _ = start(worlds, **options)
    for epoch in range(EPOCHS):
        got, order = epoch_of(completed, epoch), order_of(epoch)
        assert got[:SAMPLES] == order
        assert got[SAMPLES:] == order[: len(got) - SAMPLES]
        assert len(got) - SAMPLES < max(size for size, _ in worlds)
    # The steps and batches of rank 0 are counted on, through all worlds.
    rows = [row for ranks in completed for row in ranks[0]]
    assert [row[1] for row in rows] == list(range(len(rows)))
    lengths = Counter(row[0] for row in rows)
    numbers = Counter[int]()
    for row in rows:
        assert row[2] == numbers[row[0]]
        numbers[row[0]] += 1
    last = {row[0]: row for row in rows}
    assert all(last[epoch][3] == lengths[epoch] for epoch in range(EPOCHS))
    return completed


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4), (3, 2), (1, 2), (2, 1)])
def test_killed_in_any_step(before: int, after: int) -> None:
    steps = EPOCHS * -(-SAMPLES // (before * BATCH))
    for die_at in [1, steps // 3 - 1, steps // 3, steps - 1]:
        check([(before, die_at), (after, None)])


def test_killed_twice_within_one_epoch() -> None:
    check([(4, 1), (2, 2), (3, None)])
    check([(4, 1), (2, 2), (2, 2), (4, None)])


@pytest.mark.parametrize("die_at", [1, 4, 6, 7])
def test_the_epoch_of_a_sampler_that_is_set_in_the_tail_is_restored(die_at: int) -> None:
    """Also where no prologue sets it again."""
    check([(2, die_at), (2, 1), (3, None)], tail_sets=True)


@pytest.mark.parametrize("die_at", [2, 6, 9])
def test_the_same_number_of_ranks_goes_on_bit_for_bit(die_at: int) -> None:
    whole, addresses = start([(2, None)])
    parts, again = start([(2, die_at), (2, None)])
    assert [a + b for a, b in zip(*parts, strict=True)] == whole[0]
    assert [weights_of(one) for one in again] == [weights_of(one) for one in addresses]


def weights_of(address: str) -> Any:
    weights = torch.zeros(3)
    with holdfast.CheckpointManager(address) as manager:
        manager.restore(into={"weights": weights})
    return weights.tolist()


def test_what_is_said(caplog: pytest.LogCaptureFixture) -> None:
    _, left = start([(2, 3)])
    assert not caplog.text
    caplog.clear()
    start([(3, None)], left)
    # One line, by rank 0: 3 batches of 2 on 2 ranks were completed, so 11 of 23 are left.
    (line,) = caplog.messages
    assert line == (
        "DataLoader: the number of ranks was 2, is 3, inside an epoch. It goes on behind the 12 "
        "samples that all ranks have had; left: 2 items on each."
    )


def test_at_the_end_of_an_epoch_the_new_length_is_one_line(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr("holdfast.run.console.Console.say", lambda self, line: lines.append(line))
    _, left = start([(2, 6)])
    lines.clear()
    start([(3, None)], left)
    (line,) = {line for line in lines if "in an epoch" in line}
    assert line == "batches: 4 items in an epoch, 6 before"
    assert not caplog.text


def test_a_batch_size_that_is_changed_as_well_needs_its_policy() -> None:
    """The number of ranks alone needs none."""

    def begin(address: str, rank: int, size: int, batch: int, **policy: Any) -> list[list[int]]:
        sampler: Any = DistributedSampler(Numbers(SAMPLES), size, rank, shuffle=False)
        loader = DataLoader(Numbers(SAMPLES), batch, sampler=sampler)
        items: list[list[int]] = []
        with holdfast.Run(address, every=1, quiet=True, **policy) as run:
            for batch_of in run.batches(loader):
                items.append(batch_of.tolist())
                if size == 2 and len(items) == 3:
                    raise KeyboardInterrupt
        return items

    left = [fresh_address(), fresh_address()]
    for rank, address in enumerate(left):
        with pytest.raises(KeyboardInterrupt):
            begin(address, rank, 2, 2)
    with pytest.raises(
        holdfast.errors.LoopError, match="ranks was 2, is 1; batch_size was 2"
    ) as no:
        begin(copied(left[0]), 0, 1, 5)
    assert "by-sample" in str(no.value)
    items = begin(copied(left[0]), 0, 1, 5, data="by-sample")
    assert items == [[*range(8, 13)], [*range(13, 18)], [*range(18, 23)]]
    items = begin(copied(left[0]), 0, 1, 5, data="restart-epoch")
    assert items[0] == [0, 1, 2, 3, 4]
    items = begin(copied(left[0]), 0, 1, 2, data="restart-epoch")
    assert items[0] == [8, 9], "what can go on is not begun anew"
