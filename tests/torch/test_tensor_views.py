"""Views of one storage, whatever they are, come back as they were."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import example, given

from holdfast.torch.dtypes import STORED
from tests.torch.roundtrip import Checkpoint, bits, random_bits

SLICE = st.tuples(st.integers(0, 4), st.integers(1, 6), st.integers(1, 3))


@st.composite
def views(draw: st.DrawFn) -> list[torch.Tensor]:
    """Views of one storage, overlapping or not."""
    dtype = draw(st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.complex128]))
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    base = random_bits(dtype, *shape)
    found = []
    for _ in range(draw(st.integers(1, 4))):
        view = base
        for dim in range(view.dim()):
            start, length, step = draw(SLICE)
            start = min(start, view.shape[dim] - 1)
            view = view[(slice(None),) * dim + (slice(start, start + length, step),)]
        view = view.permute(draw(st.permutations(range(view.dim()))))
        if draw(st.booleans()) and dtype in STORED and dtype is not torch.uint8:
            view = view.view({2: torch.int16, 4: torch.int32}[dtype.itemsize])
        if draw(st.booleans()):
            view = view.unsqueeze(0).expand(draw(st.integers(1, 3)), *view.shape)
        found.append(view)
    return found


@given(views(), st.integers(1, 64))
@example([torch.zeros(3)[1:]], 1)
def test_any_views_of_one_storage(tensors: list[torch.Tensor], chunk_bytes: int) -> None:
    checkpoint = Checkpoint({"x": tensors}, chunk_bytes=chunk_bytes)
    loaded = checkpoint.restore()["x"]
    for one, other in zip(loaded, tensors, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert bits(one) == bits(other)
    live = [torch.zeros_like(tensor).contiguous() for tensor in tensors]
    checkpoint.restore({"x": live})
    for one, other in zip(live, tensors, strict=True):
        assert bits(one) == bits(other)
