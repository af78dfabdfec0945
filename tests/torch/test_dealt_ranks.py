"""One run that real ranks share, over gloo, started again on another number of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

import holdfast
from tests.support.ranks import call

SAMPLES = 23


def train(address: str, stop: int, sharded: bool, data: Any = "refuse") -> Any:
    """The samples of each step; or what was raised. `stop`: in this step all end."""
    numbers: Any = torch.arange(SAMPLES)
    sampler = DistributedSampler(numbers, seed=3) if sharded else None
    loader = DataLoader(numbers, 2, sampler=sampler, shuffle=not sharded)
    rows: list[Any] = []
    weights = torch.zeros(2)
    try:
        with holdfast.Run(address, every=1, quiet=True, data=data) as run:
            run.track(weights=weights)
            for epoch in run.epochs(2):
                if sampler is not None:
                    sampler.set_epoch(epoch)
                for batch in run.batches(loader):
                    if run.step == stop:
                        raise KeyboardInterrupt
                    rows.append((epoch, batch.tolist()))
    except KeyboardInterrupt:
        pass
    except holdfast.errors.LoopError as error:
        return f"{error}"
    distributed.barrier()
    return rows


def test_an_epoch_is_dealt_to_2_then_3_then_1_rank(tmp_path: Path) -> None:
    address = str(tmp_path / "run")
    found = [
        call(train, 2, address, 2, True),
        call(train, 3, address, 3, True),
        call(train, 1, address, -1, True),
    ]
    for epoch in range(2):
        got: list[int] = []
        for ranks in found:
            own = [[one for row in rows if row[0] == epoch for one in row[1]] for rows in ranks]
            got += [sample for turn in zip(*own, strict=True) for sample in turn]
        order: Any = DistributedSampler(range(SAMPLES), 1, 0, seed=3)  # type: ignore[arg-type]
        order.set_epoch(epoch)
        assert got[:SAMPLES] == list(order)


@pytest.mark.parametrize(("before", "after"), [(2, 3), (1, 2), (2, 1)])
def test_where_each_rank_shuffles_by_itself_it_is_refused(
    before: int, after: int, tmp_path: Path
) -> None:
    """The run says how many ranks there are: nothing in the loader does."""
    address = str(tmp_path / "run")
    call(train, before, address, 2, False)
    for text in call(train, after, address, -1, False):
        assert f"the number of ranks was {before}, is {after}" in text
        assert "each rank has data or an order of its own" in text
    for rows in call(train, after, address, -1, False, "restart-epoch"):
        for epoch in range(2):
            got = sorted(sample for when, batch in rows if when == epoch for sample in batch)
            assert got == list(range(SAMPLES))
