"""torch's own random states, and what draws from them."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from holdfast.core.rng import apply_rng, capture_rng
from holdfast.errors import StateError
from holdfast.torch import adapter
from tests.torch.roundtrip import Checkpoint, assert_same


def test_the_cpu_generator_goes_on() -> None:
    torch.rand(3)
    states = adapter.capture_rng()
    expected = torch.randn(5).tolist()
    torch.manual_seed(99)
    adapter.apply_rng(states)
    assert torch.randn(5).tolist() == expected


def test_states_travel_through_a_checkpoint() -> None:
    checkpoint = Checkpoint({"rng": capture_rng()})
    expected = torch.randn(5).tolist()
    loaded = checkpoint.restore()["rng"]
    apply_rng(loaded)
    assert torch.randn(5).tolist() == expected


def test_read_only_arrays_will_do() -> None:
    state = np.array(adapter.capture_rng()["cpu"])
    state.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.apply_rng({"cpu": state})


def test_devices_that_are_gone_are_named_in_a_warning() -> None:
    states = {**adapter.capture_rng(), "cuda": [np.zeros(16, np.uint8)] * 2, "mps": None}
    gone = torch.cuda.device_count()
    assert gone == 0
    with pytest.warns(RuntimeWarning, match="cuda:0, cuda:1, mps"):
        adapter.apply_rng(states)


@pytest.mark.parametrize("bad", [np.zeros(3, np.uint8), "text", np.full(5056, 255, np.uint8)])
def test_a_malformed_state_is_refused(bad: Any) -> None:
    with pytest.raises(StateError, match="random state of the CPU"):
        adapter.apply_rng({"cpu": bad})


def test_a_new_rank_gets_states_of_its_own() -> None:
    states: Any = {**adapter.capture_rng(), "cuda": [np.arange(16, dtype=np.uint8)] * 2}
    first, second, again = (adapter.derived_rng(states, rank) for rank in (1, 2, 1))
    drawn = []
    for one in (states, first, second, again):
        adapter.apply_rng({"cpu": one["cpu"]})
        drawn.append(torch.rand(3).tolist())
    assert drawn[1] == drawn[3]
    assert len({str(row) for row in drawn}) == 3
    # A seed of its own for each device, from its beginning.
    cuda = [bytes(state) for one in (states, first, second) for state in one["cuda"]]
    assert len(set(cuda)) == 5
    assert all(state[8:] == bytes(8) for state in cuda[2:])
    with pytest.raises(StateError, match="malformed"):
        adapter.derived_rng({"cpu": "text"}, 1)


def test_cuda_is_not_initialised_by_looking() -> None:
    program = (
        "import torch, holdfast.torch\n"
        "holdfast.torch.adapter.apply_rng(holdfast.torch.adapter.capture_rng())\n"
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_dropout_and_batch_norm_go_on_exactly() -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(3)
        module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
        return module, torch.optim.AdamW(module.parameters())

    def go(module: nn.Module, optimizer: Any, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = module(torch.randn(6, 4)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    module, optimizer = build()
    go(module, optimizer, 3)
    checkpoint = Checkpoint({"m": module, "o": optimizer, "rng": capture_rng()})
    expected = go(module, optimizer, 3)

    fresh, restored = build()
    torch.manual_seed(77)
    values = checkpoint.restore({"m": fresh, "o": restored, "rng": {}})
    apply_rng(values["rng"])
    assert go(fresh, restored, 3) == expected
    assert_same(dict(fresh.state_dict()), dict(module.state_dict()))
