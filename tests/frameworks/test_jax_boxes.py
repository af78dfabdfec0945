"""Values of JAX whose leaves were cut in boxes come back, on one device and on several; exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import holdfast
from tests.support.jax_values import bits
from tests.support.jobs import fresh_address
from tests.support.recut import at_random, by_columns, recut


@pytest.mark.parametrize("cut", [by_columns, at_random(4)], ids=["by columns", "at random"])
def test_leaves_that_are_cut_in_boxes(cut: Any) -> None:
    drawn = np.random.default_rng(1)
    state = {
        "f4": jnp.asarray(drawn.normal(size=(16, 8)), "f4"),
        "bf16": jnp.asarray(drawn.normal(size=(3, 4, 5)), "bfloat16"),
        "int4": jnp.asarray(drawn.integers(0, 7, (6, 5)), "int4"),
        "keys": jax.random.split(jax.random.key(3), 6),
    }
    source, address = fresh_address(), fresh_address()
    with holdfast.CheckpointManager(source) as manager:
        manager.save(1, {"value": state}).result()
    manifest = recut(source, address, cut)
    assert any(len(leaf.chunks) > 1 for leaf in manifest.leaves)
    blank = jax.tree.map(lambda array: array if array.dtype == "f4" else array[::-1], state)
    grid = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"))
    blank["f4"] = jax.device_put(
        np.zeros((16, 8), "f4"), NamedSharding(grid, PartitionSpec("x", "y"))
    )
    into: dict[str, Any] = {"value": blank}
    with holdfast.CheckpointManager(address) as manager:
        manager.restore(into, rng=False)
    for name, array in state.items():
        assert bits(into["value"][name]) == bits(array), name


def test_as_a_file_for_torch(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Arrays of JAX cannot be written to, of which torch warns."""
    with holdfast.CheckpointManager(tmp_path / "run") as manager:
        manager.save(1, {"w": jnp.arange(3, dtype=jnp.bfloat16), "n": jnp.ones(())}).result()
        manager.export_as(None, "pt", tmp_path / "x.pt")
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert found["w"].tolist() == [0, 1, 2]
    assert (found["w"].dtype, found["n"].item()) == (torch.bfloat16, 1)
    assert capfd.readouterr().err == ""
