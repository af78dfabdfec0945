"""What ranks tell one another over torch's process group, where they do not do the same."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast
from holdfast.errors import GroupError
from holdfast.torch import process_group
from tests.support.forked_ranks import run_ranks, values

# Far below what torch waits for, and long enough for a busy machine.
_SOON_S = 60.0


def own_timeout(rank: int, size: int, hours: int) -> float:
    """For how long our group waits where the program's waits for so long."""
    store: Any = torch.distributed.distributed_c10d._get_default_store()
    store.set_timeout(timedelta(hours=hours))  # as `init_process_group(timeout=…)` does
    group: Any = process_group()
    return group._group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def test_ranks_may_be_as_late_as_the_program_allows() -> None:
    """One that evaluates alone while the others wait at a boundary, say."""
    assert values(run_ranks(own_timeout, 2)) == [7200.0, 7200.0]


def evaluate_on_one(rank: int, size: int, folder: str) -> float:
    began_s = time.monotonic()
    run = holdfast.Run(folder, every=2)
    with pytest.raises(GroupError, match="some are at a boundary") as raised, run:
        run.track(weights=torch.zeros(3))
        for _ in run.epochs(3):
            for _ in run.batches(range(4)):
                pass
            if rank == 0:
                run.evaluate(lambda checkpoint: 0.5, metric="accuracy")
    assert "run.evaluate" in raised.value.hint
    return time.monotonic() - began_s


def test_what_one_rank_does_alone_is_told_to_all(tmp_path: Path) -> None:
    assert max(values(run_ranks(evaluate_on_one, str(tmp_path / "run")))) < _SOON_S
