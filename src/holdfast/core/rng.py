"""The states of every global random number generator of this process."""

from __future__ import annotations

import random
import struct
from typing import Any, cast

import numpy as np

from holdfast.core.frameworks import adapter_for_tag, loaded_adapters
from holdfast.errors import StateError

_WORDS = 625  # Python's Mersenne twister: 624 words and the position
MT_WORDS = 624


def capture_rng() -> dict[str, object]:
    """Python's `random`, NumPy's global generator, and those of each framework that
    is loaded: a tree of plain values and arrays."""
    frameworks = {adapter.name: adapter.capture_rng() for adapter in loaded_adapters()}
    return {
        "python": python_state(random.getstate()),
        "numpy": numpy_state(np.random.get_state(legacy=False)),
        "frameworks": frameworks,
    }


def apply_rng(states: dict[str, Any]) -> None:
    """Set what `capture_rng` returned. The frameworks in it are imported if need be."""
    random.setstate(python_state_from(states["python"]))
    np.random.set_state(numpy_state_from(states["numpy"]))
    frameworks: dict[str, Any] = states.get("frameworks", {})
    for name, state in frameworks.items():
        adapter = adapter_for_tag(f"{name}.")
        if adapter is None:
            raise StateError(
                f"the checkpoint has random states of {name!r}, which this Holdfast does not know",
                hint="Upgrade: pip install -U holdfast",
            )
        adapter.apply_rng(state)


def python_state(state: tuple[Any, ...]) -> dict[str, object]:
    """`random.Random.getstate()` as a small plain tree."""
    version, words, gauss = state
    return {"version": version, "words": struct.pack(f"<{_WORDS}I", *words), "gauss": gauss}


def python_state_from(saved: dict[str, Any]) -> tuple[Any, ...]:
    """The inverse of `python_state`. Raises StateError if `saved` is not one."""
    version, words, gauss = saved.get("version"), saved.get("words"), saved.get("gauss")
    if (
        version != 3
        or not isinstance(words, bytes)
        or len(words) != 4 * _WORDS
        or not (gauss is None or isinstance(gauss, float))
    ):
        raise StateError("the saved state of a Python random generator is malformed")
    numbers = struct.unpack(f"<{_WORDS}I", words)
    if numbers[-1] > MT_WORDS:
        raise StateError("the saved state of a Python random generator is out of range")
    return version, numbers, gauss


def numpy_state(state: Any) -> dict[str, object]:
    """A NumPy bit generator's or RandomState's state dict; the Mersenne twister's
    key, which is in every checkpoint, as bytes instead of an array of its own."""
    saved = cast(dict[str, object], dict(state))
    if saved["bit_generator"] == "MT19937":
        inner = dict(cast(dict[str, Any], saved["state"]))
        inner["key"] = np.asarray(inner["key"], "<u4").tobytes()
        inner["pos"] = int(inner["pos"])
        saved["state"] = inner
    return saved


def numpy_state_from(saved: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `numpy_state`.

    NumPy trusts positions in a state and would read outside its buffers: they are
    checked here. Raises StateError if `saved` is not a state.
    """
    try:
        return _numpy_state_from(dict(saved))
    except (KeyError, TypeError, ValueError) as error:
        raise StateError("the saved state of a NumPy random generator is malformed") from error


def _numpy_state_from(state: dict[str, Any]) -> dict[str, Any]:
    kind = state["bit_generator"]
    inner = dict(state["state"])
    if kind == "MT19937":
        inner["key"] = np.frombuffer(inner["key"], "<u4").astype(np.uint32)
        _check(inner["key"].shape == (MT_WORDS,) and 0 <= inner["pos"] <= MT_WORDS)
    elif kind == "Philox":
        _check(np.shape(inner["counter"]) == (4,) and np.shape(inner["key"]) == (2,))
        _check(np.shape(state["buffer"]) == (4,) and 0 <= state["buffer_pos"] <= 4)
    elif kind == "SFC64":
        _check(np.shape(inner["state"]) == (4,))
    elif kind in ("PCG64", "PCG64DXSM"):
        _check(0 <= inner["state"] < 1 << 128 and 0 <= inner["inc"] < 1 << 128)
    else:
        raise ValueError(kind)
    if "has_uint32" in state:
        _check(state["has_uint32"] in (0, 1) and 0 <= state["uinteger"] < 1 << 32)
    state["state"] = inner
    return state


def _check(valid: bool) -> None:
    if not valid:
        raise ValueError("out of range")
