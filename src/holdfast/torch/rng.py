"""The states of torch's own random number generators, on every device."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

from holdfast.core.rng import seed_for
from holdfast.errors import StateError


def capture_rng() -> dict[str, object]:
    """CPU, every CUDA device, MPS. A device that was not used yet is left alone: its
    generators will start from the seed that the script sets again."""
    states: dict[str, object] = {"cpu": torch.get_rng_state().numpy()}
    if torch.cuda.is_initialized():
        states["cuda"] = [state.numpy() for state in torch.cuda.get_rng_state_all()]
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state().numpy()
    return states


def apply_rng(states: dict[str, Any]) -> None:
    """Set what `capture_rng` gave. Warns about devices that are not here. Does not
    initialise CUDA: torch sets the states when it is first used."""
    if "cpu" in states:
        _apply(torch.set_rng_state, states["cpu"], "the CPU")
    saved = states.get("cuda", [])
    count = torch.cuda.device_count() if saved else 0
    for index, state in enumerate(saved[:count]):
        _apply(lambda value, index=index: torch.cuda.set_rng_state(value, index), state, "CUDA")
    gone = [f"cuda:{index}" for index in range(count, len(saved))]
    if "mps" in states:
        if torch.backends.mps.is_available():
            _apply(torch.mps.set_rng_state, states["mps"], "MPS")
        else:
            gone.append("mps")
    if gone:
        warnings.warn(
            f"the random states of {', '.join(gone)} were not restored: not on this machine. "
            "What is drawn there will differ from the saved run.",
            RuntimeWarning,
            stacklevel=2,
        )


def derived_rng(states: dict[str, Any], rank: int) -> dict[str, Any]:
    """States for a process of that rank, made of another one's. Those of MPS, which is one
    device of one process, stay."""
    derived = dict(states)
    if "cpu" in states:
        seed = seed_for("torch cpu", _bytes(states["cpu"]), rank)
        derived["cpu"] = torch.Generator().manual_seed(seed).get_state().numpy()
    if "cuda" in states:
        derived["cuda"] = [
            _cuda_state(seed_for(f"torch cuda {index}", _bytes(state), rank))
            for index, state in enumerate(states["cuda"])
        ]
    return derived


def _bytes(state: object) -> bytes:
    try:
        return np.asarray(state, np.uint8).tobytes()
    except (TypeError, ValueError) as error:
        raise StateError("the saved random state of torch is malformed") from error


def _cuda_state(seed: int) -> np.ndarray[Any, Any]:
    """That of a Philox generator which was seeded just now: its seed, and the offset 0."""
    return np.frombuffer(seed.to_bytes(8, "little") + bytes(8), np.uint8)


def _apply(apply: Any, state: object, device: str) -> None:
    try:
        apply(torch.from_numpy(np.array(state, np.uint8)))  # a copy: it may be read-only
    except (RuntimeError, TypeError, ValueError) as error:
        raise StateError(f"the saved random state of {device} is refused: {error}") from None
