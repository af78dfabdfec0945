"""Where state goes when the parameters are on another device than they were."""

from __future__ import annotations

import pytest
import torch

from holdfast.torch.placing import Moving, Placing, moved

CPU = torch.device("cpu")
META = torch.device("meta")  # stands for any device beside the CPU


@pytest.mark.parametrize(
    ("param_was_on", "name", "was_on", "on_device", "goes_to"),
    [
        ("cpu", "exp_avg", "cpu", False, META),
        ("cpu", "step", "cpu", False, CPU),
        ("cpu", "step", "cpu", True, META),  # fused and capturable count on the device
        ("cuda:0", "exp_avg", "cuda:0", False, META),
        ("cuda:0", "exp_avg", "cpu", False, CPU),  # offloaded
        ("cuda:0", "exp_avg", "cpu pinned", False, CPU),
        ("cuda:0", "step", "cpu", False, CPU),
        ("cuda:0", "step", "cuda:0", False, META),
    ],
)
def test_devices(
    param_was_on: str, name: str, was_on: str, on_device: bool, goes_to: torch.device
) -> None:
    placing = Placing(torch.zeros(1, device=META), param_was_on, on_device)
    assert placing.device(name, was_on) == goes_to
    assert Placing(torch.zeros(1), param_was_on, on_device).device(name, was_on) == CPU


def test_nested_tensors_move_and_stay_one_object() -> None:
    shared = torch.zeros(2)
    inner = {"b": shared}
    value = {"list": Moving([shared, None, (inner, 3)], META), "same": Moving(shared, META), "n": 4}
    result = moved(value, {})
    assert result["n"] == 4
    assert result["list"][0].is_meta
    assert result["list"][0] is result["list"][2][0]["b"] is result["same"]
    assert result["list"][1] is None


def test_what_is_in_place_stays_the_same_object() -> None:
    tensor = torch.zeros(2)
    assert moved({"a": Moving(tensor, CPU), "b": tensor}, {}) == {"a": tensor, "b": tensor}
    assert moved({"a": Moving(tensor, CPU)}, {})["a"] is tensor
