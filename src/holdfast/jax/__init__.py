"""Holdfast for JAX: arrays, keys, and pytrees of any library.

JAX's values do not change: each step makes new ones. They live in the run's box:

    state = run.box(params=params, opt_state=optimizer.init(params), key=jax.random.key(0))
    for batch in run.batches(data):
        state.params, state.opt_state, loss = step(state.params, state.opt_state, batch)

What is declared there gives the structure, the sharding and all that is no array (the static
fields of an Equinox module, say); a checkpoint gives the values. Modules, optimizers and
metrics of `flax.nnx` change in place, and are tracked: `run.track(model=model)`.

Values of JAX are found by themselves; this module is imported when one turns up.
"""

from __future__ import annotations

from holdfast.errors import HoldfastError

try:
    import jax as _jax
except ModuleNotFoundError as error:
    if error.name != "jax":
        raise
    raise HoldfastError("holdfast.jax needs JAX", hint="pip install 'holdfast[jax]'") from None

from holdfast.jax.adapter import adapter as adapter

__all__ = ["adapter"]

del _jax
