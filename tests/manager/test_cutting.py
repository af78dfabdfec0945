"""Tables of which few rows change: cut small, so that little is written."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import holdfast
from holdfast.core.plan import CHUNK_BYTES, SPARSE_CHUNK_BYTES
from holdfast.errors import UsageError
from holdfast.manager.cutting import Cutting
from holdfast.manager.history import SaveEvent

ROWS = 80_000
WIDTH = 64


def table() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype("f4")


def save(ckpts: holdfast.CheckpointManager, step: int, state: dict[str, Any]) -> SaveEvent:
    pending = ckpts.save(step, state)
    pending.result()
    assert pending.stats is not None
    return pending.stats


def chunks_of(ckpts: holdfast.CheckpointManager, path: str) -> list[int]:
    (leaf,) = [leaf for leaf in ckpts.manifest().leaves if leaf.path == path]
    return [chunk.nbytes for chunk in leaf.chunks]


def test_a_save_writes_the_chunks_whose_rows_have_changed(tmp_path: Path) -> None:
    rows = table()
    dense = rows.copy()
    with holdfast.CheckpointManager(tmp_path / "run", keep=None, sparse_rows=["table"]) as ckpts:
        save(ckpts, 0, {"table": rows, "dense": dense})
        assert max(chunks_of(ckpts, "table")) == SPARSE_CHUNK_BYTES
        assert max(chunks_of(ckpts, "dense")) == CHUNK_BYTES
        rows[17] += 1
        rows[50_000] += 1
        written = save(ckpts, 1, {"table": rows, "dense": dense}).written_nbytes
        assert 2 * SPARSE_CHUNK_BYTES < written < 3 * SPARSE_CHUNK_BYTES  # and the header
        dense[17] += 1
        written = save(ckpts, 2, {"table": rows, "dense": dense}).written_nbytes
        assert CHUNK_BYTES < written < CHUNK_BYTES + SPARSE_CHUNK_BYTES
        assert np.array_equal(ckpts.load()["table"], rows)
        assert all(found.ok for found in ckpts.verify())


def test_a_run_may_be_cut_otherwise_than_before(tmp_path: Path) -> None:
    rows = table()
    for step, names in enumerate([[], ["table"], ["table"], []]):
        with holdfast.CheckpointManager(tmp_path / "run", keep=None, sparse_rows=names) as ckpts:
            if step:
                assert np.array_equal(ckpts.load()["table"], rows)
            rows[step] += 1
            written = save(ckpts, step, {"table": rows}).written_nbytes
            in_other_chunks = step in (0, 1, 3)
            assert (written > rows.nbytes / 2) == in_other_chunks
    with holdfast.CheckpointManager(tmp_path / "run") as ckpts:
        assert np.array_equal(ckpts.load()["table"], rows)


@given(
    shape=st.lists(st.integers(0, 40), max_size=3).map(tuple),
    cut=st.integers(1, 3000),
)
def test_chunks_tile_every_shape(shape: tuple[int, ...], cut: int) -> None:
    data = np.arange(int(np.prod(shape)), dtype="f4").reshape(shape)

    class Source:
        dtype, nbytes = "F32", data.nbytes

    source: Any = Source()
    source.shape = shape
    found = list(Cutting(["a"]).boxes("a/b", source, cut))
    assert sum(nbytes for *_, nbytes in found) == data.nbytes
    assert all(nbytes <= max(cut, 4) for *_, nbytes in found)
    offset = 0
    for start, extent, first, nbytes in found:
        assert first == offset
        box = data[tuple(slice(s, s + n) for s, n in zip(start, extent, strict=True))]
        assert box.tobytes() == data.tobytes()[offset : offset + nbytes]
        offset += nbytes


@pytest.mark.parametrize(
    ("name", "path", "small"),
    [
        ("model/table.weight", "model/table.weight", True),
        ("model/table", "model/table.weight", True),
        ("optimizer/state/0", "optimizer/state/0/exp_avg", True),
        ("optimizer/state/0", "optimizer/state/01/exp_avg", False),
        ("model/tab", "model/table.weight", False),
        ("table", "model/table", False),
    ],
)
def test_names_are_those_of_leaves_or_above_them(name: str, path: str, small: bool) -> None:
    class Source:
        dtype, nbytes, shape = "F32", ROWS * WIDTH * 4, (ROWS, WIDTH)

    source: Any = Source()
    first = next(Cutting([name]).boxes(path, source, CHUNK_BYTES))
    assert first[-1] == (SPARSE_CHUNK_BYTES if small else CHUNK_BYTES)


def test_a_name_that_nothing_has_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = {"model": {"table.weight": np.zeros(8)}}
    names = ["model/tabel.weight", "model/table.weight", "q"]
    with (
        caplog.at_level(logging.WARNING, "holdfast"),
        holdfast.CheckpointManager(tmp_path / "run", sparse_rows=names) as ckpts,
    ):
        save(ckpts, 0, state)
        save(ckpts, 1, state)
    assert [record.getMessage() for record in caplog.records] == [
        "sparse_rows names 'model/tabel.weight', but nothing that was saved is called so. "
        "Closest: 'model/table.weight'.",
        "sparse_rows names 'q', but nothing that was saved is called so. "
        "`holdfast show` lists the names.",
    ]


@pytest.mark.parametrize("make", [holdfast.CheckpointManager, holdfast.Run])
def test_text_is_no_list_of_names(tmp_path: Path, make: Any) -> None:
    with pytest.raises(UsageError, match="sparse_rows='table' is text") as caught:
        make(tmp_path / "run", sparse_rows="table")
    assert caught.value.hint == "sparse_rows=['table']"
    assert not (tmp_path / "run").exists()
