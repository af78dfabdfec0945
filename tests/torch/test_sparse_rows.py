"""Embeddings with sparse gradients: their rows and their optimizer's change sparsely."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import holdfast
from holdfast.core.plan import SPARSE_CHUNK_BYTES
from holdfast.manager.history import SaveEvent

ROWS = 20_000
STEPS = 6


def train(folder: Path, *, stop: int | None = None, **options: Any) -> tuple[bytes, list[int]]:
    """The table's bytes at the end, and what each save wrote."""
    torch.manual_seed(0)
    table = nn.Embedding(ROWS, 64, sparse=True)
    optimizer = torch.optim.SparseAdam(table.parameters(), lr=0.1)
    written: list[int] = []
    with holdfast.Run(folder, every=1, keep=None, quiet=True, **options) as run:
        run.track(table=table, optimizer=optimizer)
        for step in run.range(STEPS):
            if stop is not None and step == stop:
                raise KeyboardInterrupt
            rows = torch.randint(ROWS, (4,))
            optimizer.zero_grad()
            table(rows).square().sum().backward()
            optimizer.step()
        run.manager.wait()
        written = [
            event.written_nbytes for event in run.manager.events() if isinstance(event, SaveEvent)
        ]
    return table.weight.detach().numpy().tobytes(), written


def test_only_the_rows_of_a_step_are_written_and_a_resume_is_exact(tmp_path: Path) -> None:
    names = ["table/weight", "optimizer/state/0"]
    whole, dense = train(tmp_path / "dense")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", stop=3, sparse_rows=names)
    found, written = train(tmp_path / "run", sparse_rows=names)
    assert found == whole
    table_nbytes = ROWS * 64 * 4
    # Weight and two moments; four rows lie in four chunks at most, which change in each.
    assert max(written[2:]) < 3 * 4 * SPARSE_CHUNK_BYTES + table_nbytes / 20
    assert min(dense[1:]) > 2 * table_nbytes
