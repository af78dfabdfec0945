"""Sparse tensors of every layout."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from holdfast.errors import DamagedObject, StructureMismatch, UnsupportedValue
from tests.torch.roundtrip import Checkpoint, assert_same, roundtrip

pytestmark = pytest.mark.filterwarnings("ignore:Sparse:UserWarning")

COO: Any = torch.sparse_coo_tensor
DENSE = torch.tensor([[0.0, 1.5, 0.0, 2.5], [3.5, 0.0, 0.0, 0.0]])


def compressed(name: str, dense: torch.Tensor) -> torch.Tensor:
    blocks = ((1, 2),) if name in ("bsr", "bsc") else ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(dense, f"to_sparse_{name}")(*blocks)


def repeated() -> torch.Tensor:
    """Not coalesced: one place twice, in an order of its own."""
    return COO([[1, 0, 0], [0, 2, 2]], [1.0, 2.0, -0.0], (2, 3), check_invariants=True)


EXAMPLES = {
    "coalesced": lambda: DENSE.to_sparse_coo(),
    "repeated": repeated,
    "empty": lambda: COO(torch.empty((2, 0), dtype=torch.long), torch.empty(0), (2, 3)),
    "hybrid": lambda: COO([[0, 2]], torch.randn(2, 3).bfloat16(), (4, 3), check_invariants=True),
    "csr": lambda: compressed("csr", DENSE),
    "csc": lambda: compressed("csc", DENSE),
    "bsr": lambda: compressed("bsr", DENSE),
    "bsc": lambda: compressed("bsc", DENSE),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_layouts_come_back(name: str) -> None:
    tensor = EXAMPLES[name]()
    assert_same(roundtrip(tensor), tensor)


@pytest.mark.parametrize("name", EXAMPLES)
def test_live_tensors_take_another_number_of_items(name: str) -> None:
    saved = EXAMPLES[name]()
    live = COO([[0], [0]], [9.0], saved.shape, check_invariants=True)
    if name == "hybrid":
        live = COO([[1]], torch.ones(1, 3).bfloat16(), (4, 3), check_invariants=True)
    if saved.layout is not torch.sparse_coo:
        live = compressed(name, torch.ones(2, 4))
    Checkpoint({"x": saved}).restore({"x": live})
    assert_same(live, saved)


def test_live_parameters_keep_being_parameters() -> None:
    live = torch.nn.Parameter(compressed("csr", torch.ones(2, 4)))
    saved = torch.nn.Parameter(compressed("csr", DENSE))
    checkpoint = Checkpoint({"x": saved})
    checkpoint.restore({"x": live})
    assert_same(live, saved)
    assert_same(checkpoint.restore()["x"], saved)


def test_parts_are_leaves_that_say_what_they_are() -> None:
    checkpoint = Checkpoint({"x": repeated(), "y": EXAMPLES["csr"]()})
    assert [leaf.path for leaf in checkpoint.leaves] == [
        "x/indices",
        "x/values",
        "y/compressed",
        "y/plain",
        "y/values",
    ]


def test_differences_are_reported() -> None:
    checkpoint = Checkpoint({"x": repeated()})
    for live in (torch.zeros(2, 3), repeated().double(), compressed("csr", DENSE)):
        with pytest.raises(StructureMismatch) as caught:
            checkpoint.restore({"x": live})
        assert caught.value.changed[0].startswith("x: saved as sparse_coo float32[2, 3], live is")
    with pytest.raises(StructureMismatch, match="sparse_coo"):
        Checkpoint({"x": torch.zeros(2, 3)}).restore({"x": repeated()})


def test_other_layouts_are_refused() -> None:
    with pytest.raises(UnsupportedValue, match="mkldnn"):
        Checkpoint({"x": torch.zeros(2).to_mkldnn()})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"shape":[2,3]', '"shape":[2,2]'),  # an index lies outside
        ('"shape":[2,3]', '"shape":[2]'),
        ('"shape":[2,3]', '"shape":[4611686018427387903,4611686018427387903]'),
        ('"sparse_coo"', '"sparse_csr"'),
        ('"sparse_coo"', '"jagged"'),
        ('"parts":[', '"parts":[1,'),
        ('"coalesced":false', '"coalesced":true'),
    ],
)
def test_hostile_nodes_are_refused(old: str, new: str) -> None:
    checkpoint = Checkpoint({"x": repeated()})
    assert old.encode() in checkpoint.json
    checkpoint.json = checkpoint.json.replace(old.encode(), new.encode())
    live: Any
    for live in (None, {"x": repeated()}):
        with pytest.raises((DamagedObject, StructureMismatch)):
            checkpoint.restore(live)
        if live:
            assert_same(live["x"], repeated())
