"""Two processes with a real process group: their data go on where they stopped."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data.distributed import DistributedSampler

from tests.frameworks.rank_program import SAMPLES

pytestmark = pytest.mark.slow


def started(folder: Path, kind: str, size: int, stop: int = -1) -> list[Any]:
    """What each rank printed; nothing if all stopped."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.frameworks.rank_program", str(folder), kind, str(stop)],
            env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    found: list[Any] = []
    for rank in ranks:
        output, errors = rank.communicate(timeout=200)
        assert rank.returncode == (0 if stop < 0 else 9), errors
        found.append(json.loads(output.splitlines()[-1]) if stop < 0 else errors)
    return found


@pytest.mark.parametrize("kind", ["torch", "prepared"])
def test_stopped_in_mid_epoch_and_started_again(kind: str, tmp_path: Path) -> None:
    whole = started(tmp_path / "whole", kind, 2)
    started(tmp_path / "left", kind, 2, stop=8)
    shutil.copytree(tmp_path / "left", tmp_path / "one")
    again = started(tmp_path / "left", kind, 2)
    for before, after in zip(whole, again, strict=True):
        assert after["rows"] == before["rows"][8:]
        assert after["weights"] == before["weights"]
    if kind != "torch":
        return
    (one,) = started(tmp_path / "one", kind, 1)
    taken = [row[2] for row in one["rows"] if row[0] == 1]
    alone: Any = DistributedSampler(range(SAMPLES), 1, 0, seed=4)  # type: ignore[arg-type]
    alone.set_epoch(1)
    assert [sample for batch in taken for sample in batch] == list(alone)[8:]
