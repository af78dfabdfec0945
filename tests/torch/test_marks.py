"""What tells a save that a tensor was changed: also by what bypasses versions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from holdfast.torch.memory import source_of


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: torch.zeros(6, 50), id="contiguous"),
        pytest.param(lambda: torch.zeros(50, 6).T, id="transposed"),
        pytest.param(
            lambda: torch.zeros(8, 4, 6, 6).to(memory_format=torch.channels_last), id="channels"
        ),
        pytest.param(lambda: torch.zeros(90, 9)[:, 2:5], id="gaps"),
        pytest.param(lambda: torch.zeros(100, 100, dtype=torch.float16)[::2, 1::2], id="strided"),
        pytest.param(lambda: torch.zeros(3, 1)[:, :1].expand(3, 1), id="small"),
        pytest.param(lambda: torch.zeros(5, 3)[1:4, 1], id="column"),
        pytest.param(lambda: torch.zeros(()), id="scalar"),
        pytest.param(lambda: torch.zeros(4, 0).T, id="empty"),
    ],
)
def test_a_change_of_all_items_shows_in_the_mark(make: Callable[[], torch.Tensor]) -> None:
    """Even one that bypasses the version, and whatever the tensor's geometry."""
    tensor = make()
    source = source_of(tensor)
    before = source.mark()
    version = tensor._version
    assert source.mark() == before
    tensor.data += 1
    assert tensor._version == version
    assert (source.mark() != before) == bool(tensor.numel())


def test_what_lies_between_the_items_does_not_show_in_the_mark() -> None:
    table = torch.zeros(64, 64)
    source = source_of(table[:, ::2])
    before = source.mark()
    table.data[:, 1::2] += 1
    assert source.mark() == before
