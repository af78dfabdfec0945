"""What is saved and restored: real modules and optimizers, and many small tensors."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
import xxhash
from torch import nn

_LAYERS = 16  # with 12 parameters and Adam's two moments each: 576 tensors
_HEAD = 32
_TOKENS = 64  # per micro-batch: enough work per weight to keep the cores busy

Linear = Callable[[int, int], nn.Module]


class Block(nn.Module):
    """A transformer block, normalised first: 12 parameters."""

    def __init__(self, width: int, linear: Linear) -> None:
        super().__init__()
        self.heads = width // _HEAD
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = linear(width, 3 * width), linear(width, width)
        self.up, self.down = linear(width, 4 * width), linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        split = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, _HEAD)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Lora(nn.Module):
    """A frozen linear layer with a trained correction of low rank."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.low = nn.Parameter(torch.randn(rank, inputs) / math.sqrt(inputs))
        self.high = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + (x @ self.low.T) @ self.high.T


class State:
    """Live objects, and a flat view of the tensors in them.

    `objects` is what Holdfast saves; `tensors` is what the others save: the same memory
    under flat names, so that none of them pays for walking objects.
    """

    def __init__(self, objects: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        self.objects = objects
        self.tensors = tensors

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def describe(self) -> str:
        gib = self.nbytes / 2**30
        size = f"{gib:.2f} GiB" if gib >= 1 else f"{self.nbytes / 2**20:.1f} MiB"
        return f"{size} in {len(self.tensors):,} tensors"

    def touch(self) -> None:
        """Change every tensor, as a dense optimizer step does: nothing can be reused."""
        for tensor in self.tensors.values():
            tensor.add_(1)

    def clear(self) -> None:
        """Zero every tensor, so that a restore that does nothing is noticed."""
        for tensor in self.tensors.values():
            tensor.zero_()

    def digest(self) -> str:
        """Equal digests mean equal bytes in every tensor."""
        total = xxhash.xxh3_128()
        for name in sorted(self.tensors):
            total.update(self.tensors[name].numpy().data)
        return total.hexdigest()


class Training(State):
    """A model with its optimizer, and the step that trains it."""

    def __init__(self, model: nn.Module, width: int) -> None:
        self.model = model
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=1e-4)
        super().__init__({"model": model, "optimizer": self.optimizer}, {})
        self._width = width
        self.micro_batches = 1
        self.busy_s: float | None = None
        """Instead of training, compute for so long: for states whose gradients do not fit."""

    def forward_backward(self) -> None:
        """The first part of a step: gradients of `micro_batches`, or `busy_s` of work."""
        if self.busy_s is not None:
            matrix = torch.rand(512, 512)
            end = time.perf_counter() + self.busy_s
            while time.perf_counter() < end:
                matrix = (matrix @ matrix).softmax(1)
            return
        for _ in range(self.micro_batches):
            self.model(torch.randn(1, _TOKENS, self._width)).square().mean().backward()

    def update(self) -> None:
        """The second part: the optimizer's. Gradients are dropped, as is torch's default."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def calibrate(self, step_s: float) -> None:
        """Choose `micro_batches` so that a step takes at least `step_s` seconds."""
        self.micro_batches = 1
        self.forward_backward()
        self.update()
        start = time.perf_counter()
        self.forward_backward()
        middle = time.perf_counter()
        self.update()
        update_s = time.perf_counter() - middle
        left_s = step_s - update_s
        self.micro_batches = max(1, math.ceil(left_s / (middle - start)))

    def look(self) -> None:
        """Make the flat view anew: the optimizer has its moments now."""
        names: dict[torch.Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        flat = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for parameter, slots in self.optimizer.state.items():
            for slot, value in slots.items():
                flat[f"optimizer.{slot}.{names[parameter]}"] = value
        self.tensors = flat


def transformer(mib: int, *, trains: bool = True) -> Training:
    """A transformer with Adam, about `mib` MiB together, a third of it parameters.

    Without `trains` it has moments but no gradients, which would not fit beside a state
    that is nearly as large as the memory.
    """
    # 12 width^2 weights per block, 4 bytes, three times (the moments).
    width = _width(mib * 2**20 / (12 * 12 * _LAYERS))
    torch.manual_seed(0)
    state = Training(nn.Sequential(*(Block(width, nn.Linear) for _ in range(_LAYERS))), width)
    if trains:
        state.forward_backward()
        state.update()
    else:
        for parameter in state.model.parameters():
            first, second = torch.rand(parameter.shape), torch.rand(parameter.shape)
            slots = {"step": torch.tensor(1.0), "exp_avg": first, "exp_avg_sq": second}
            state.optimizer.state[parameter] = slots
    state.look()
    return state


def lora(mib: int) -> Training:
    """The same of about `mib` MiB, nine tenths of it frozen weights."""
    width = _width(0.9 * mib * 2**20 / (12 * 4 * _LAYERS))
    # 16 rank width trained values per block at 12 bytes: a tenth of the whole.
    rank = max(1, round(width / 36))
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(width, lambda i, o: Lora(i, o, rank)) for _ in range(_LAYERS)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith((".low", ".high")))
    state = Training(model, width)
    state.forward_backward()
    state.update()
    state.look()
    return state


def small_tensors(count: int) -> State:
    """`count` tensors of 1 KiB."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"table.{i}": torch.randn(256, generator=generator) for i in range(count)}
    return State({"state": tensors}, tensors)


def _width(square: float) -> int:
    return max(_HEAD, round(math.sqrt(square) / _HEAD) * _HEAD)
