"""Ranks that have ended are not waited for by those of the same machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast
from holdfast.errors import CommitUnknown, SaveFailed
from holdfast.torch import process_group
from tests.support.forked_ranks import die, run_ranks

# A tenth of what is else waited for, and long enough for a busy machine.
_SOON_S = 60.0


def save_alone(rank: int, size: int, folder: str, dies: int) -> tuple[float, str, str]:
    """What the rank that lives on is told of a save that the other one did not come to."""
    model = torch.nn.Linear(4, 4)
    ckpts: Any = holdfast.CheckpointManager(folder, group=process_group())
    ckpts.save(1, {"model": model}).result()
    if rank == dies:
        die()
    began_s = time.monotonic()
    pending = ckpts.save(2, {"model": model})
    try:
        pending.result()
    except (SaveFailed, CommitUnknown) as error:
        return time.monotonic() - began_s, type(error).__name__, error.message
    return time.monotonic() - began_s, "", ""


@pytest.mark.parametrize(
    ("dies", "wanted"),
    [
        (0, ("CommitUnknown", "rank 0 has ended and did not say what became of the save")),
        (1, ("SaveFailed", "1 of 2 ranks have ended without their share of step 2: 1")),
    ],
)
def test_who_waits_for_an_ended_rank_is_told_soon(
    dies: int, wanted: tuple[str, str], tmp_path: Path
) -> None:
    ended = run_ranks(save_alone, str(tmp_path / "run"), dies)
    assert ended[dies].status == -9
    seconds, kind, message = ended[1 - dies].value
    assert kind == wanted[0]
    assert message.startswith(wanted[1])
    assert seconds < _SOON_S
    with holdfast.CheckpointManager(tmp_path / "run") as ckpts:
        assert [info.step for info in ckpts.checkpoints()] == [1]
        assert all(each.ok for each in ckpts.verify())
