"""The states of every global random number generator of this process."""

from __future__ import annotations

import copy
import hashlib
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
    captured = {adapter.name: adapter.capture_rng() for adapter in loaded_adapters()}
    # A framework without generators need not be installed where this is restored.
    frameworks = {name: states for name, states in captured.items() if states}
    return {
        "python": python_state(random.getstate()),
        "numpy": numpy_state(np.random.get_state(legacy=False)),
        "frameworks": frameworks,
    }


def apply_rng(states: dict[str, Any]) -> None:
    """Set what `capture_rng` returned; what is not in it stays as it is. The frameworks
    in it are imported if need be. Raises StateError before it changes anything of
    Python or NumPy if their states are malformed."""
    python = python_state_from(states["python"]) if "python" in states else None
    numpy = numpy_state_from(states["numpy"]) if "numpy" in states else None
    if numpy is not None:
        current = np.random.get_state(legacy=False)
        if current["bit_generator"] != numpy["bit_generator"]:
            raise StateError(
                f"NumPy's global generator was a {numpy['bit_generator']} when this was saved",
                hint="Call numpy.random.set_bit_generator as the saved program did.",
            )
        np.random.set_state(numpy)
    if python is not None:
        random.setstate(python)
    frameworks: dict[str, Any] = states.get("frameworks", {})
    for name, state in frameworks.items():
        _adapter_of(name).apply_rng(state)


def _adapter_of(name: str) -> Any:
    adapter = adapter_for_tag(f"{name}.")
    if adapter is None:
        raise StateError(
            f"the checkpoint has random states of {name!r}, which this Holdfast does not know",
            hint="Upgrade: pip install -U holdfast",
        )
    return adapter


def derived_rng(states: dict[str, Any], rank: int) -> dict[str, Any]:
    """Random states for a process that was not there when `states`, those of another one,
    were captured: they depend on `states` and `rank` alone, and differ for each rank.

    Nothing is set, and `states` are not changed. What is none of the global generators (a
    device, an entry that `capture_rng` does not make) is as in `states`. Raises StateError if
    those are malformed, or of a framework that this Holdfast does not know.

    A program that seeds all its processes alike, so that they draw the same, wants what
    rank 0 had and not this: where several ranks were saved with equal states, give those.

    >>> states = capture_rng()
    >>> derived_rng(states, 3)["python"] == derived_rng(states, 3)["python"]
    True
    """
    derived = dict(states)
    if "python" in states:
        words = python_state_from(states["python"])[1]
        seed = _seed("python", repr(words).encode(), rank)
        derived["python"] = python_state(random.Random(seed).getstate())
    if "numpy" in states:
        state = numpy_state_from(states["numpy"])
        seed = _seed("numpy", repr(states["numpy"]).encode(), rank)
        bits = getattr(np.random, state["bit_generator"])(np.random.SeedSequence(seed))
        own = {**copy.deepcopy(bits.state), "has_gauss": 0, "gauss": 0.0}
        derived["numpy"] = numpy_state(own if "has_gauss" in state else bits.state)
    frameworks: dict[str, Any] = states.get("frameworks", {})
    if frameworks:
        derived["frameworks"] = {
            name: _adapter_of(name).derived_rng(state, rank) for name, state in frameworks.items()
        }
    return derived


def _seed(name: str, state: bytes, rank: int) -> int:
    """128 bits. Part of what "exact" means: never change it."""
    text = b"holdfast rank %d %s\n" % (rank, name.encode())
    return int.from_bytes(hashlib.blake2b(text + state, digest_size=16).digest(), "little")


def seed_for(name: str, state: bytes, rank: int) -> int:
    """For adapters' `derived_rng`: a seed of 63 bits, from a generator's name and state."""
    return _seed(name, state, rank) >> 65


def python_state(state: tuple[Any, ...]) -> dict[str, object]:
    """`random.Random.getstate()` as a small plain tree."""
    version, words, gauss = state
    return {"version": version, "words": struct.pack(f"<{_WORDS}I", *words), "gauss": gauss}


def python_state_from(saved: dict[str, Any]) -> tuple[Any, ...]:
    """The inverse of `python_state`. Raises StateError if `saved` is not one."""
    if not isinstance(cast(object, saved), dict):
        raise StateError("the saved state of a Python random generator is malformed")
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
        _check(isinstance(inner["key"], bytes))
        inner["key"] = np.frombuffer(inner["key"], "<u4").astype(np.uint32)
        _check(inner["key"].shape == (MT_WORDS,) and _in(inner["pos"], MT_WORDS + 1))
    elif kind == "Philox":
        _check(_words64(inner["counter"], 4) and _words64(inner["key"], 2))
        _check(_words64(state["buffer"], 4) and _in(state["buffer_pos"], 5))
    elif kind == "SFC64":
        _check(_words64(inner["state"], 4))
    elif kind in ("PCG64", "PCG64DXSM"):
        _check(_in(inner["state"], 1 << 128) and _in(inner["inc"], 1 << 128))
    else:
        raise ValueError(kind)
    if kind != "MT19937":  # half of a 64-bit draw may be left
        _check(_in(state["has_uint32"], 2) and _in(state["uinteger"], 1 << 32))
    if "has_gauss" in state:
        _check(_in(state["has_gauss"], 2) and isinstance(state["gauss"], float))
    state["state"] = inner
    return state


def _in(number: object, limit: int) -> bool:
    return type(number) is int and 0 <= number < limit


def _words64(value: object, count: int) -> bool:
    if not isinstance(value, np.ndarray):
        return False
    array = cast("np.ndarray[Any, np.dtype[Any]]", value)
    return array.dtype == np.uint64 and array.shape == (count,)


def _check(valid: bool) -> None:
    if not valid:
        raise ValueError("out of range")
