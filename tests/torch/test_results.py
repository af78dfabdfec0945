"""Results of calls that hold tensors, or were called with them."""

from __future__ import annotations

import pytest
import torch

import holdfast
from holdfast.errors import UnsupportedValue
from holdfast.stores.memory import MemoryStore
from tests.torch.roundtrip import assert_same


def test_tensors_come_back_as_they_were_and_share_what_they_shared() -> None:
    store = MemoryStore("results")
    base = torch.arange(20.0)
    calls: list[int] = []

    def prepare(x: torch.Tensor) -> dict[str, object]:
        calls.append(len(x))
        tied = x * 2
        half = x.to(torch.bfloat16)
        return {"tied": [tied, tied], "half": half, "views": (base[:10], base[5:]), "n": len(x)}

    wanted = prepare(torch.ones(3))
    for _ in range(2):
        run = holdfast.Run("memory://torch-results", store=store, quiet=True)
        got = run.once(version=1)(prepare)(torch.ones(3))
        assert_same(got, wanted)
        assert got["tied"][0] is got["tied"][1]
        one, other = got["views"]
        assert one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        run.close()
    assert calls == [3, 3], "the one before, and one that was stored"
    run = holdfast.Run("memory://torch-results", store=store, quiet=True)
    run.once(version=1)(prepare)(torch.ones(3, dtype=torch.float64))
    assert calls == [3, 3, 3], "another type is another argument"
    run.close()


def test_random_numbers_of_torch_are_put_back() -> None:
    run = holdfast.Run("memory://torch-results-random", quiet=True)
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    run.once(version=1)(lambda: torch.rand(5))()
    assert torch.equal(torch.rand(3), wanted)
    run.close()


def test_a_module_counts_by_its_weights_and_is_no_result() -> None:
    run = holdfast.Run("memory://torch-results-module", quiet=True)
    seen: list[float] = []

    def mean(model: torch.nn.Linear) -> float:
        seen.append(model.weight.mean().item())
        return seen[-1]

    model = torch.nn.Linear(2, 2)
    once = run.once(version=1)(mean)
    assert once(model) == once(model)
    with torch.no_grad():
        model.weight.add_(1)
    assert once(model) == seen[-1]
    assert len(seen) == 2
    with pytest.raises(UnsupportedValue, match="Linear") as error:
        run.once(version=1)(lambda: {"net": model})()
    assert "state_dict()" in error.value.hint
    run.close()
