"""Foreign trees as values, for comparisons with what was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from holdfast.foreign import open_foreign
from holdfast.foreign.data import ForeignBytes, ForeignTensor
from holdfast.foreign.harmless import TORCH_NAMES


def values_in(path: Path | str) -> Any:
    """Everything in a file, read."""
    with open_foreign(str(path)) as foreign:
        return made(foreign.tree())


def made(tree: Any, piece: int = 7) -> Any:
    """The values of a tree, its tensors read in pieces of an odd size."""
    if isinstance(tree, dict):
        return {key: made(item) for key, item in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(made(item) for item in tree)
    if isinstance(tree, ForeignTensor | ForeignBytes):
        data = bytearray(tree.nbytes)
        for at in range(0, len(data), piece):
            tree.data.read(at, memoryview(data)[at : at + piece])
        if isinstance(tree, ForeignBytes):
            return bytes(data)
        return _array(tree, data)
    return tree


def _array(tensor: ForeignTensor, data: bytearray) -> Any:
    if tensor.numpy:
        names = {"BOOL": "?", "complex128": "c16", "C64": "c8"}
        letters = f"{tensor.dtype[:1].lower()}{tensor.itemsize or tensor.nbytes}"
        if tensor.dtype[:1] in "FIU" and tensor.dtype[1:].isdigit():
            letters = f"{tensor.dtype[0].lower()}{int(tensor.dtype[1:]) // 8}"
        code = names.get(tensor.dtype, letters if tensor.dtype[:1] in "FIU" else tensor.dtype)
        return np.frombuffer(data, np.dtype(code)).reshape(tensor.shape)
    dtype = getattr(torch, TORCH_NAMES[tensor.dtype])
    if not data:
        return torch.empty(tensor.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(tensor.shape)


def same(a: Any, b: Any) -> bool:
    """Bit for bit, in containers too."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and _bits(a) == _bits(b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return type(a) is type(b) and bool(a == b)


def _bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
