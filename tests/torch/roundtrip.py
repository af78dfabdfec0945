"""Save and restore through the tree codec alone, and compare down to bits."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, MutableMapping
from math import prod
from typing import Any

import msgspec
import torch

from holdfast.core.digest import digest
from holdfast.core.plan import boxes, itemsize
from holdfast.core.records import Chunk, Leaf
from holdfast.core.tree import TreeDecoder, TreeEncoder


class Checkpoint:
    """What a save would write: a tree as JSON and leaves as bytes in chunks."""

    def __init__(self, state: Mapping[str, Any], *, chunk_bytes: int = 96) -> None:
        encoder = TreeEncoder()
        tree = encoder.encode(dict(state), "")
        self.json = msgspec.json.encode(tree)
        self.leaves: list[Leaf] = []
        self.chunks: list[list[tuple[Chunk, bytes]]] = []
        for leaf in encoder.leaves:
            source = leaf.source
            size = itemsize(source.dtype)
            assert source.nbytes == prod(source.shape) * size
            found: list[tuple[Chunk, bytes]] = []
            for start, shape, offset, nbytes in boxes(source.shape, size, chunk_bytes):
                data = bytearray(nbytes)
                source.copy_range(offset, memoryview(data))
                found.append((Chunk(start, shape, 0, offset, nbytes, digest(data)), bytes(data)))
            source.close()
            self.chunks.append(found)
            self.leaves.append(
                Leaf(leaf.path, source.dtype, source.shape, tuple(chunk for chunk, _ in found))
            )

    @property
    def tree(self) -> Any:
        return msgspec.json.decode(self.json)

    @property
    def stored_bytes(self) -> int:
        return sum(chunk.nbytes for leaf in self.leaves for chunk in leaf.chunks)

    def leaf(self, path: str) -> Leaf:
        (found,) = [leaf for leaf in self.leaves if leaf.path == path]
        return found

    def decoder(self) -> TreeDecoder:
        return TreeDecoder(self.leaves)

    def restore(
        self, into: MutableMapping[str, Any] | None = None, *, strict: bool = True, **selection: Any
    ) -> dict[str, Any]:
        decoder = self.decoder()
        values = decoder.apply(self.tree, into, **selection)
        decoder.report(strict=strict)
        self.deliver(decoder)
        return values

    def deliver(self, decoder: TreeDecoder) -> None:
        """All bytes, last chunk first: their order must not matter."""
        for leaf, destination in reversed(decoder.requests):
            for chunk, data in reversed(self.chunks[leaf]):
                destination.write(chunk.start, chunk.shape, memoryview(data))
        decoder.run()

    def differences(self, into: MutableMapping[str, Any]) -> Any:
        decoder = self.decoder()
        decoder.apply(self.tree, into)
        return decoder.report(strict=False)


def roundtrip(value: Any, **settings: Any) -> Any:
    """`value` saved and loaded again without a live target."""
    return Checkpoint({"x": value}, **settings).restore()["x"]


def bits(tensor: torch.Tensor) -> bytes:
    """The elements of a dense tensor in C order, every bit of them."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.numel() == 0:
        return b""
    width = tensor.dtype.itemsize
    strides = (*(step * width for step in tensor.stride()), 1)
    view = torch.empty(0, dtype=torch.uint8).set_(
        tensor.cpu().untyped_storage() if tensor.device.type != "cpu" else tensor.untyped_storage(),
        tensor.storage_offset() * width,
        (*tensor.shape, width),
        strides,
    )
    return view.contiguous().numpy().tobytes()


def assert_same(one: Any, other: Any, where: str = "value") -> None:
    """Equal down to types, dtypes, bits, key order and which tensors share memory."""
    shared: tuple[dict[int, int], dict[int, int]] = ({}, {})
    _same(one, other, where, shared)


def _same(one: Any, other: Any, where: str, shared: Any) -> None:
    assert type(one) is type(other), f"{where}: {type(one)} is not {type(other)}"
    if isinstance(one, torch.Tensor):
        _same_tensor(one, other, where, shared)
    elif isinstance(one, Mapping):
        assert list(one) == list(other), f"{where}: {list(one)} is not {list(other)}"
        assert [type(key) for key in one] == [type(key) for key in other], where
        for key in one:
            _same(one[key], other[key], f"{where}[{key!r}]", shared)
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            _same(left, right, f"{where}[{index}]", shared)
    elif isinstance(one, float):
        assert one.hex() == other.hex(), f"{where}: {one!r} is not {other!r}"
    else:
        assert one == other, f"{where}: {one!r} is not {other!r}"


def _same_tensor(one: torch.Tensor, other: torch.Tensor, where: str, shared: Any) -> None:
    assert one.dtype == other.dtype, f"{where}: {one.dtype} is not {other.dtype}"
    assert one.shape == other.shape, f"{where}: {one.shape} is not {other.shape}"
    assert one.layout == other.layout, f"{where}: {one.layout} is not {other.layout}"
    assert one.requires_grad == other.requires_grad, f"{where}: requires_grad differs"
    if one.layout is torch.sparse_coo:
        assert one.is_coalesced() == other.is_coalesced(), where
        _same(one._indices(), other._indices(), f"{where} indices", ({}, {}))
        _same(one._values(), other._values(), f"{where} values", ({}, {}))
        return
    if one.layout is not torch.strided:
        rows = one.layout in (torch.sparse_csr, torch.sparse_bsr)
        names = ("crow_indices", "col_indices") if rows else ("ccol_indices", "row_indices")
        for name in (*names, "values"):
            _same(getattr(one, name)(), getattr(other, name)(), f"{where} {name}", ({}, {}))
        return
    assert bits(one) == bits(other), f"{where}: {one} is not {other}"
    if one.numel():
        # Tensors of one storage on one side must be of one storage on the other, if
        # they overlap there; those that do not overlap may have been parted.
        left, right = one.untyped_storage().data_ptr(), other.untyped_storage().data_ptr()
        assert shared[1].setdefault(right, left) == left, f"{where}: shares other memory"


def random_bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Every bit pattern is allowed, NaNs with payloads too (bools are 0 or 1)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # complex32 is experimental
        tensor = torch.empty(shape, dtype=dtype)
    data = torch.randint(0, 2 if dtype is torch.bool else 256, (tensor.nbytes,), dtype=torch.uint8)
    view = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    view.copy_(data)
    return tensor
