"""Sparse tensors: a node whose indices and values are dense tensors.

    {"!": "torch.sparse", "layout": "sparse_coo", "shape": [...], "coalesced": true,
     "parts": [indices, values]}

CSR, CSC, BSR and BSC have the parts compressed indices, plain indices, values.
"""

from __future__ import annotations

import warnings
from math import prod
from typing import Any

import torch

from holdfast.core.adapters import NOTHING, Decoder, Encoder
from holdfast.core.types import Node
from holdfast.errors import UnsupportedValue
from holdfast.torch.dtypes import describe, name_of, words
from holdfast.torch.saved import malformed, naturals, read_node
from holdfast.torch.tensors import attributes, decode_tensor, dressed

_ROWS = (torch.sparse_csr, torch.sparse_bsr)
_COMPRESSED = {name_of(layout): layout for layout in (*_ROWS, torch.sparse_csc, torch.sparse_bsc)}


def encode_sparse(value: torch.Tensor, path: str, encoder: Encoder) -> Node:
    """The node of a tensor that is not dense."""
    tensor = value.detach()
    layout = name_of(tensor.layout)
    node: dict[str, Node] = {"!": "torch.sparse", "layout": layout, "shape": list(tensor.shape)}
    node.update(attributes(value))
    if tensor.layout is torch.sparse_coo:
        node["coalesced"] = tensor.is_coalesced()
        parts = {"indices": tensor._indices(), "values": tensor._values()}
    elif layout in _COMPRESSED:
        parts = dict(zip(("compressed", "plain", "values"), _compressed_parts(tensor), strict=True))
    else:
        raise UnsupportedValue(
            path, f"tensor with layout {layout}", hint="Save it as a dense tensor: .to_dense()."
        )
    node["parts"] = [encoder.encode(part, f"{path}/{name}") for name, part in parts.items()]
    return node


def _compressed_parts(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if tensor.layout in _ROWS:
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    return tensor.ccol_indices(), tensor.row_indices(), tensor.values()


def decode_sparse(
    node: dict[str, Node],
    target: object,
    path: str,
    decoder: Decoder,
    device: torch.device | None = None,
) -> Any:
    """Into the live tensor `target` if it is one, else a new tensor."""
    layout, parts = node.get("layout"), node.get("parts")
    shape = tuple(naturals(node.get("shape"), path))
    coo = layout == "sparse_coo"
    if not coo and layout not in _COMPRESSED:
        raise malformed(path, f"unknown layout {layout!r}")
    if not isinstance(parts, list) or len(parts) != (2 if coo else 3):
        raise malformed(path, "its parts are malformed")
    if prod(shape) >= 1 << 62:
        raise malformed(path, "its shape is too large")
    if any(not isinstance(part, dict) or part.get("!") != "torch.tensor" for part in parts):
        raise malformed(path, "its parts are no dense tensors")
    live = target if isinstance(target, torch.Tensor) else None
    if live is not None:
        saved = read_node(parts[-1], path, decoder)
        if (name_of(live.layout), live.dtype, tuple(live.shape)) != (layout, saved.dtype, shape):
            decoder.changed(path, f"{layout} {words(saved.dtype, shape)}", describe(live))
            return target
        device = live.device
    dense = [
        decode_tensor(part, NOTHING, f"{path}/{number}", decoder, device)
        for number, part in enumerate(parts)
    ]
    coalesced = node.get("coalesced") is True
    try:
        fresh = _build(layout, dense, shape, coalesced)
    except (RuntimeError, ValueError, IndexError) as error:
        raise malformed(path, f"its parts do not make a {layout} tensor: {error}") from None

    def finish() -> None:
        # Before the bytes came there was nothing to check. Indices outside of the
        # shape would make torch read and write outside of its memory.
        try:
            _check(layout, dense, shape, coalesced)
        except (RuntimeError, ValueError, IndexError) as error:
            raise malformed(path, str(error).partition("\n")[0]) from None
        if live is not None:
            _replace(live, fresh)

    decoder.finish(finish)
    return dressed(fresh, node) if live is None else live


def _build(layout: Any, parts: list[Any], shape: tuple[int, ...], coalesced: bool) -> torch.Tensor:
    """A tensor over the memory of `parts`, unchecked."""
    with warnings.catch_warnings():  # CSR "is in beta state"
        warnings.simplefilter("ignore", UserWarning)
        if layout == "sparse_coo":
            indices, values = parts
            tensor = torch.sparse_coo_tensor(indices, values, shape, check_invariants=False)
            return tensor._coalesced_(coalesced)
        rows, columns, values = parts
        return torch.sparse_compressed_tensor(
            rows, columns, values, shape, layout=_COMPRESSED[layout], check_invariants=False
        )


def _check(layout: Any, parts: list[Any], shape: tuple[int, ...], coalesced: bool) -> None:
    checks: Any = torch  # these two are not in torch's type stubs
    if layout == "sparse_coo":
        checks._validate_sparse_coo_tensor_args(*parts, shape, coalesced)
    else:
        checks._validate_sparse_compressed_tensor_args(*parts, shape, _COMPRESSED[layout])


def _replace(live: torch.Tensor, fresh: torch.Tensor) -> None:
    """The number of stored items changes with the values: a sparse tensor has to be
    resized to be restored."""
    with torch.no_grad():
        if live.layout is not torch.sparse_coo:
            live.resize_as_sparse_(fresh)
        live.copy_(fresh)  # with the coalesced flag
