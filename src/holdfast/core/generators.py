"""Random generators that are part of a state: `random.Random` and NumPy's."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, cast

import numpy as np

from holdfast.core.rng import numpy_state, numpy_state_from, python_state, python_state_from
from holdfast.errors import StateError

BIT_GENERATORS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        np.random.MT19937,
        np.random.PCG64,
        np.random.PCG64DXSM,
        np.random.Philox,
        np.random.SFC64,
    )
}

_SETS_SEED_SEQUENCES = int(np.__version__.partition(".")[0]) >= 2
"""NumPy 1 has no way to do that: there, spawn() after a restore starts from the live
generator's own seed sequence."""

TYPES: tuple[type, ...] = (
    random.Random,
    np.random.Generator,
    np.random.RandomState,
    np.random.SeedSequence,
    *BIT_GENERATORS.values(),
)


def state_of(value: Any) -> tuple[str, dict[str, object]]:
    """(tag, state as a plain tree) of a generator of one of `TYPES`."""
    if type(value) is random.Random:
        return "random", python_state(value.getstate())
    if type(value) is np.random.Generator:
        # The bit generator is a value of its own: two generators may share one.
        return "generator", {"bit_generator": value.bit_generator}
    if type(value) is np.random.RandomState:
        return "randomstate", numpy_state(value.get_state(legacy=False))
    if type(value) is np.random.SeedSequence:
        return "seedsequence", {
            "entropy": value.entropy,
            "spawn_key": value.spawn_key,
            "pool_size": value.pool_size,
            "n_children_spawned": value.n_children_spawned,
        }
    state = numpy_state(value.state)
    sequence = value.seed_seq  # what spawn() goes on from
    if type(sequence) is np.random.SeedSequence:
        state["seed_seq"] = sequence
    return "bitgenerator", state


def seed_sequence(state: dict[str, Any]) -> np.random.SeedSequence:
    """A SeedSequence as `state_of` described it."""
    pool_size, spawned = state.get("pool_size"), state.get("n_children_spawned")
    if type(pool_size) is not int or not 4 <= pool_size <= 1 << 10:
        raise StateError("a saved SeedSequence has an impossible pool size")
    if type(spawned) is not int or not 0 <= spawned < 1 << 32:
        raise StateError("a saved SeedSequence has an impossible count of children")
    try:
        return np.random.SeedSequence(
            state["entropy"],
            spawn_key=state["spawn_key"],
            pool_size=pool_size,
            n_children_spawned=spawned,
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise StateError("a saved SeedSequence is malformed") from error


def _set_random(value: random.Random, state: dict[str, Any]) -> None:
    value.setstate(python_state_from(state))


def _set_random_state(value: np.random.RandomState, state: dict[str, Any]) -> None:
    value.set_state(cast(Any, numpy_state_from(state)))


def _set_bit_generator(value: Any, state: dict[str, Any]) -> None:
    """Also its seed sequence, so that spawn() goes on."""
    state = dict(state)
    sequence = state.pop("seed_seq", None)
    checked = numpy_state_from(state)
    if isinstance(sequence, np.random.SeedSequence) and _SETS_SEED_SEQUENCES:
        value.__setstate__((checked, sequence))
    else:
        value.state = checked


_SETTERS: dict[str, Callable[[Any, dict[str, Any]], None]] = {
    "random": _set_random,
    "randomstate": _set_random_state,
    "bitgenerator": _set_bit_generator,
}


def set_state(tag: str, value: Any, state: dict[str, Any]) -> None:
    """Give a generator the state that `state_of` found. Raises StateError if it is
    not one of a generator of this kind."""
    try:
        _SETTERS[tag](value, state)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise StateError("the saved state of a random generator does not fit it") from error
