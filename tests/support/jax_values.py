"""JAX on eight devices, and values of it that can be compared bit for bit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_num_cpu_devices", 8)  # before anything asks JAX for one


enable_x64: Any = getattr(jax, "enable_x64", None)
if enable_x64 is None:
    from jax.experimental import enable_x64  # type: ignore[no-redef]  # before JAX 0.8


def bits(value: Any) -> Any:
    """All that makes a pytree what it is, comparable."""
    leaves, structure = jax.tree.flatten(value)
    return structure, [_of_leaf(leaf) for leaf in leaves]


def _of_leaf(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array):
        return type(leaf), leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(leaf.dtype), _of_leaf(jax.random.key_data(leaf))
    return str(leaf.dtype), leaf.shape, leaf.weak_type, np.asarray(leaf).tobytes()
