"""torch's CPU generators behind the interface of `holdfast.run.randomness`.

Devices are left out: samplers and datasets draw on the CPU, and a device's generator
belongs to the training step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


class TorchRandom:
    name = "torch"

    def get(self) -> torch.Tensor:
        return torch.get_rng_state()

    def set(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)

    def seed(self, digest: bytes) -> None:
        # Not torch.manual_seed: it also queues a seed for CUDA, with a stack trace each time.
        torch.default_generator.manual_seed(_seed(digest))

    def fingerprint(self, state: torch.Tensor) -> bytes:
        return state.numpy().tobytes()

    def owns(self, value: object) -> bool:
        return isinstance(value, torch.Generator)

    def is_global(self, generator: torch.Generator) -> bool:
        devices = torch.cuda.default_generators
        return any(generator is one for one in (torch.default_generator, *devices))

    def read(self, generator: torch.Generator) -> dict[str, Any]:
        return {"state": generator.get_state().cpu().numpy().copy()}

    def write(self, generator: torch.Generator, state: dict[str, Any]) -> None:
        generator.set_state(torch.from_numpy(np.array(state["state"], np.uint8)))

    def reseed(self, generator: torch.Generator, digest: bytes) -> None:
        generator.manual_seed(_seed(digest))

    def seeded(self, generator: torch.Generator) -> bool:
        return True  # a new one always has the same seed

    def array(self, value: object) -> np.ndarray[Any, Any] | None:
        if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
            return None
        if value.layout is not torch.strided or value.is_quantized:
            return None
        plain = value.detach().resolve_conj().resolve_neg()
        return (
            plain.contiguous().view(-1).view(torch.uint8).numpy() if plain.numel() else np.empty(0)
        )


def _seed(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "little") >> 1  # 63 bits, as torch draws base seeds


TORCH = TorchRandom()
