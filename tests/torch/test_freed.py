"""Tensors whose memory is gone, as FSDP frees that of weights that it has sharded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import holdfast
from holdfast.errors import StateError
from holdfast.torch.memory import TensorDestination


@pytest.mark.parametrize("left", [0, 40], ids=["freed", "shorter"])
def test_a_restore_into_freed_memory_is_refused_and_changes_nothing(
    tmp_path: Path, left: int
) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with holdfast.CheckpointManager(tmp_path / "run") as ckpts:
        ckpts.save(1, {"model": model, "n": torch.ones(3)}, block=True)
        second = nn.Linear(8, 8)
        live = nn.Sequential(nn.Linear(8, 8), second)
        before = {name: value.clone() for name, value in live.state_dict().items()}
        numbers = torch.zeros(3)
        second.weight.untyped_storage().resize_(left)
        with pytest.raises(StateError, match=r"'model/1.weight'.* its memory was freed") as caught:
            ckpts.restore({"model": live, "n": numbers})
        assert "summon_full_params" in caught.value.hint
        assert second.weight.untyped_storage().nbytes() == left, "nothing was made larger"
        assert not numbers.any()
        for name, value in live.state_dict().items():
            assert name == "1.weight" or torch.equal(value, before[name])


def test_memory_that_is_freed_after_the_restore_was_accepted_is_not_written() -> None:
    tensor = torch.ones(8)
    destination = TensorDestination(tensor)
    tensor.untyped_storage().resize_(0)
    with pytest.raises(StateError, match="its memory was freed"):
        destination.write((0,), (8,), memoryview(bytes(32)))
