"""Tensor memory as bytes: where a save reads, where a restore writes.

Bits are moved through a view of the same memory as integers, so autograd, NaN
payloads and dtypes without copy kernels make no difference.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import numpy as np
import torch

from holdfast.core.adapters import LeafSource
from holdfast.core.copying import Region, copy_bytes
from holdfast.core.plan import ITEMSIZES, Part, box_offset, overlap, slices
from holdfast.core.types import KiB, MiB
from holdfast.errors import StateError
from holdfast.torch.cuda import (
    CudaCopies,
    failing_saves,
    recorded,
    side_stream,
    thread_memory,
)
from holdfast.torch.dtypes import STORED, carrier

# A kilobyte of a tensor: an edit of all of it cannot be missed, and one of a few rows can.
_SAMPLE_SPOTS = 16
_SAMPLE_BYTES = 64
# What the copy of a tensor with gaps takes of the device's memory.
_GATHER_BYTES = 8 * MiB
_T: Any = torch.Tensor
_SMALL_BYTES = 64 * KiB  # below, the call costs more than the copy; it takes a few microseconds
# As ctypes.memmove, which releases the GIL: each time another thread might keep it for
# milliseconds.
_memmove = ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0
)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a strided `tensor`, with its geometry, as integers.

    It has a version counter of its own: who writes through it calls `touched`.
    """
    return _view(tensor, carrier(tensor.dtype.itemsize), tensor.shape, tensor.stride())


def stored(tensor: torch.Tensor) -> torch.Tensor:
    """As `raw`, with the dimensions that the leaf has: where safetensors cannot
    name the dtype, the bytes of an item are the last one."""
    if tensor.dtype in STORED:
        return raw(tensor)
    itemsize = tensor.dtype.itemsize
    strides = (*(stride * itemsize for stride in tensor.stride()), 1)
    return _view(tensor, torch.uint8, (*tensor.shape, itemsize), strides)


def stored_dtype(dtype: torch.dtype) -> str:
    return STORED.get(dtype, "U8")


def stored_shape(dtype: torch.dtype, shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape) if dtype in STORED else (*shape, dtype.itemsize)


def overlaps_itself(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether two items may share memory (windows made with `unfold`).

    >>> overlaps_itself((2, 3), (3, 1)), overlaps_itself((4, 3), (1, 1))
    (False, True)
    """
    reach = 1  # what the dimensions so far span
    for step, size in sorted((step, size) for step, size in zip(strides, shape, strict=True)):
        if size > 1:
            if step < reach:
                return True
            reach += (size - 1) * step
    return False


def fills_its_memory(tensor: torch.Tensor) -> bool:
    """Whether a strided tensor has no gaps, in whichever order its items are.

    >>> image = torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)
    >>> fills_its_memory(image), fills_its_memory(image[..., :2])
    (True, False)
    """
    shape, strides = tensor.shape, tensor.stride()
    reach = sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
    return reach + 1 == tensor.numel() and not overlaps_itself(shape, strides)


def storage_of(tensor: torch.Tensor) -> int:
    """The address of the memory that `tensor` and its views share."""
    return tensor.untyped_storage().data_ptr()


def holds_items(tensor: torch.Tensor) -> bool:
    """Whether the storage of a strided tensor holds all of its items. FSDP frees that of
    weights that it has sharded; torch would take a view of it for a wish, and make it larger."""
    if not tensor.numel():
        return True
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = int(tensor.storage_offset()) + sum((size - 1) * step for size, step in steps)
    return (last + 1) * tensor.dtype.itemsize <= tensor.untyped_storage().nbytes()


def touched(tensor: torch.Tensor) -> None:
    """Tell autograd that `tensor` was written in place."""
    if not tensor.is_inference():  # those count no versions
        torch.autograd.graph.increment_version(tensor)


class TensorSource:
    """Reads a tensor's bytes in place; implements core.adapters.LeafSource."""

    streamed = False

    __slots__ = ("_bytes", "_items", "_outer", "_tensor", "dtype", "nbytes", "shape")

    def __init__(
        self, tensor: Any, dtype: str, shape: tuple[int, ...], nbytes: int, outer: Any = None
    ) -> None:
        """With the tensor's stored dtype, stored shape and size; see `source_of`."""
        self._tensor = tensor
        self._outer = outer
        self.dtype = dtype
        self.shape = shape
        self.nbytes = nbytes
        self._items: torch.Tensor | None = None  # made when first read: most are read once
        self._bytes: np.ndarray | None = None

    def become(self, source: LeafSource) -> None:
        """Stand for another tensor; see core.sharing.Movable."""
        if not isinstance(source, TensorSource):
            raise TypeError(source)
        self.__init__(source._tensor, source.dtype, source.shape, source.nbytes, source._outer)

    def copy_range(self, offset: int, into: memoryview) -> None:
        out = np.frombuffer(into, np.uint8)
        items = self._open()
        if self._bytes is not None:
            np.copyto(out, self._bytes[offset : offset + out.size])  # releases the GIL
            return
        itemsize = items.dtype.itemsize
        first = offset // itemsize
        end = -(-(offset + out.size) // itemsize)
        whole = first * itemsize == offset and (end - first) * itemsize == out.size
        if whole and out.ctypes.data % itemsize == 0:
            _gather(items, first, end, torch.from_numpy(out).view(items.dtype))
            return
        gathered = torch.empty(end - first, dtype=items.dtype, device="cpu")
        _gather(items, first, end, gathered)
        skipped = offset - first * itemsize
        np.copyto(out, gathered.view(torch.uint8).numpy()[skipped : skipped + out.size])

    def _open(self) -> torch.Tensor:
        if self._items is None:
            self._check_memory()
            self._items = stored(self._tensor)
            if self._items.is_contiguous():
                self._items = self._items.view(-1)  # so that any range is one copy
            self._bytes = _flat_bytes(self._items)
        return self._items

    @property
    def storage(self) -> int:
        """As `storage_of`."""
        return storage_of(self._tensor)

    def mark(self) -> object:
        """The version, which changes in place advance, and a sample of the bytes, since
        those through `.data` or a NumPy array do not."""
        self._open()
        both = self._tensor, self._outer
        versions = [t._version if t is not None and not t.is_inference() else None for t in both]
        return self._tensor.data_ptr(), versions, self._sample()

    def _sample(self) -> bytes | None:
        """None for what lies on a device."""
        if not self._tensor.is_cpu:
            return None
        memory = self._bytes
        if memory is None and fills_its_memory(self._tensor):
            memory = _bytes_of(self._tensor)  # in another order, which is as good
        if memory is not None:
            return _sample(memory)
        step = max(_SAMPLE_BYTES, self.nbytes // _SAMPLE_SPOTS)
        out = np.zeros((-(-self.nbytes // step), _SAMPLE_BYTES), np.uint8)
        for row, offset in zip(out, range(0, self.nbytes, step), strict=True):
            self.copy_range(offset, row[: self.nbytes - offset].data)
        return out.tobytes()

    def _check_memory(self) -> None:
        """Raises StateError if the tensor has lost its memory, or has another size."""
        if self._tensor.nbytes != self.nbytes or not holds_items(self._tensor):
            raise StateError(
                f"a tensor of {self.nbytes} bytes cannot be saved: its memory was freed or resized",
                hint="Save where its parameters are gathered, e.g. in FSDP's summon_full_params, "
                "and leave tensors as they are while save() runs.",
            )

    @staticmethod
    def copy_many(
        sources: Sequence[TensorSource], region: Region, starts: Sequence[int]
    ) -> list[int]:
        """See core.copying.CopyMany: small tensors without gaps in CPU memory.

        A view of a tensor for NumPy, or a torch function with an output, takes several
        times as long as the copy of a kilobyte.
        """
        left: list[int] = []
        target = region.ctypes.data
        tensors = [source._tensor for source in sources]
        with torch._C.DisableTorchFunction():  # see torch.together
            rows = zip(
                sources,
                starts,
                map(_T.is_cpu.__get__, tensors),
                map(_T.is_contiguous, tensors),
                map(_T.nbytes.__get__, tensors),
                map(_T.data_ptr, tensors),
                map(_T.untyped_storage, tensors),
                strict=True,
            )
            for number, (source, start, is_cpu, dense, nbytes, first, storage) in enumerate(rows):
                # Whatever happened to a tensor since it was captured, only memory that it
                # has now is read; `copy_range` says what is wrong.
                if (
                    nbytes <= _SMALL_BYTES
                    and nbytes == source.nbytes
                    and is_cpu
                    and dense
                    and first + nbytes <= storage.data_ptr() + storage.nbytes()
                ):
                    _memmove(target + start, first, nbytes)
                else:
                    left.append(number)
        return left

    def close(self) -> None:
        return


class CudaSource(TensorSource):
    """Reads a tensor on a CUDA device in place; implements core.adapters.LeafSource.

    Its marks have no sample, for which the host would have to wait.
    """

    __slots__ = ()

    transport = CudaCopies()

    @property
    def device(self) -> torch.device:
        return self._tensor.device

    def copy_range(self, offset: int, into: memoryview) -> None:
        """See core.transfers: of what the device holds now."""
        stream = side_stream("reads", self.device)
        staging = thread_memory(into.nbytes)
        with failing_saves():
            with torch.cuda.stream(stream):
                self.enqueue(offset, staging)
            recorded(stream).synchronize()
        copy_bytes(into, staging.numpy().data)

    def enqueue(self, offset: int, into: torch.Tensor) -> None:
        """Have the current stream fill `into`, bytes in the host's memory. The tensor is kept
        until that is done."""
        self._check_memory()  # a range that is freed now would end all work of the device
        items = self._open()
        if items.is_contiguous():
            into.copy_(items.view(torch.uint8)[offset : offset + into.numel()], non_blocking=True)
            return
        itemsize = items.dtype.itemsize
        for start in range(0, into.numel(), _GATHER_BYTES):
            part = into[start : start + _GATHER_BYTES]
            first, skipped = divmod(offset + start, itemsize)
            end = -(-(offset + start + part.numel()) // itemsize)
            gathered = torch.empty(end - first, dtype=items.dtype, device=items.device)
            _gather(items, first, end, gathered)
            part.copy_(
                gathered.view(torch.uint8)[skipped : skipped + part.numel()], non_blocking=True
            )


def _sample(data: np.ndarray) -> bytes:
    """Some of the bytes, spread evenly."""
    spots = max(1, min(_SAMPLE_SPOTS, data.size // _SAMPLE_BYTES))
    rows = data[: data.size // spots * spots].reshape(spots, -1)
    return rows[:, :_SAMPLE_BYTES].tobytes()


def source_of(tensor: torch.Tensor, outer: torch.Tensor | None = None) -> TensorSource:
    """A leaf of the elements of `tensor`. `outer` is a tensor that has it inside, if operations
    on that one advance no version but its own."""
    kind = CudaSource if tensor.device.type == "cuda" else TensorSource
    shape = stored_shape(tensor.dtype, tensor.shape)
    return kind(tensor, stored_dtype(tensor.dtype), shape, tensor.nbytes, outer)


def _gather(tensor: torch.Tensor, first: int, end: int, out: torch.Tensor) -> None:
    """Fill `out` with items [first, end) of `tensor` in C order."""
    done = 0
    for start, shape in boxes_of_range(tuple(tensor.shape), first, end):
        count = prod(shape)
        out[done : done + count].view(shape).copy_(tensor[slices(start, shape)])
        done += count


class TensorDestination:
    """Writes verified bytes into a live tensor, on any device, contiguous or not;
    implements core.adapters.Destination. With `part`, the tensor holds that box of the leaf."""

    __slots__ = ("_tensor", "part")

    def __init__(self, tensor: torch.Tensor, part: Part | None = None) -> None:
        """Raises ValueError if the box has another shape than the tensor, as it is stored."""
        if part is not None and stored_shape(tensor.dtype, tensor.shape) != tuple(part[1]):
            raise ValueError(f"a tensor of {tuple(tensor.shape)} is no box of {part[1]}")
        self._tensor = tensor
        self.part = part

    def write(self, start: Sequence[int], shape: Sequence[int], data: memoryview) -> None:
        tensor = self._tensor
        source = np.frombuffer(data, np.uint8)
        if self.part is not None:
            common = overlap(start, shape, *self.part)
            if common is None:
                return
            if common[1] != tuple(shape):
                items = np.frombuffer(data, f"u{ITEMSIZES[stored_dtype(tensor.dtype)]}")
                box = items.reshape(tuple(shape))[slices(*common, start)]
                source = np.ascontiguousarray(box).reshape(-1).view(np.uint8)
            start = [first - zero for first, zero in zip(common[0], self.part[0], strict=True)]
            shape = common[1]
        if not tensor.data_ptr():  # it was there when the restore was accepted
            raise no_memory_for(tensor)
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            target = _bytes_at(tensor.data_ptr(), tensor.nbytes)
            if source.size == target.size:
                np.copyto(target, source)  # releases the GIL
                touched(tensor)
                return
            first = box_offset(stored_shape(tensor.dtype, tensor.shape), start, shape)
            if first is not None:
                offset = first * ITEMSIZES[stored_dtype(tensor.dtype)]
                np.copyto(target[offset : offset + source.size], source)
                touched(tensor)
                return
        box = stored(tensor)[slices(start, shape)]
        if tensor.device.type == "cuda":
            _to_device(source, box)
        else:
            items = _tensor_over(source, box.dtype.itemsize)
            box.copy_(items.view(box.dtype).view(box.shape))
        touched(tensor)


def no_memory_for(tensor: torch.Tensor, path: str = "") -> StateError:
    """The error for a tensor to which nothing can be restored."""
    what = f"{path!r}, " if path else ""
    return StateError(
        f"cannot restore into {what}a tensor of {tensor.nbytes:,} bytes: its memory was freed "
        "or resized",
        hint="Restore where its parameters are gathered, e.g. in FSDP's summon_full_params.",
    )


def _to_device(source: np.ndarray, box: torch.Tensor) -> None:
    """Copy bytes into a box of a tensor on a GPU; there when it returns.

    `wait_for_device` made sure that nothing uses the memory, and as the copy is waited for
    here, nothing has to be ordered with it afterwards. Other threads read and verify
    meanwhile.
    """
    stream = side_stream("restores", box.device)
    block = thread_memory(source.size)
    np.copyto(block.numpy(), source)
    with torch.cuda.stream(stream):
        box.copy_(block.view(box.dtype).view(box.shape), non_blocking=True)
    recorded(stream).synchronize()


def copy_bits(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy between tensors of one dtype and shape, bit by bit."""
    raw(target).copy_(raw(source))
    touched(target)


def bytes_between(storage: torch.UntypedStorage, first: int, end: int) -> torch.Tensor:
    """The bytes [first, end) of a storage, as a tensor over them."""
    return _over(storage, torch.uint8, first, (end - first,), (1,))


def _view(
    tensor: torch.Tensor, dtype: torch.dtype, shape: Sequence[int], strides: Sequence[int]
) -> torch.Tensor:
    offset = tensor.storage_offset() * tensor.dtype.itemsize // dtype.itemsize
    return _over(tensor.untyped_storage(), dtype, offset, tuple(shape), tuple(strides))


def _over(
    storage: torch.UntypedStorage,
    dtype: torch.dtype,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
) -> torch.Tensor:
    if torch.is_inference_mode_enabled():
        # A tensor made now would refuse to be written when the mode has ended.
        with torch.inference_mode(False):
            return _over(storage, dtype, offset, shape, strides)
    empty = torch.empty(0, dtype=dtype, device=storage.device)
    return empty.set_(storage, offset, shape, strides)


def _flat_bytes(tensor: torch.Tensor) -> np.ndarray | None:
    """The memory of a contiguous CPU tensor; None for others."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return None
    return _bytes_of(tensor)


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a CPU tensor that fills it."""
    first = int(tensor.storage_offset()) * tensor.dtype.itemsize
    end = first + tensor.numel() * tensor.dtype.itemsize
    return bytes_between(tensor.untyped_storage(), first, end).numpy()


def _bytes_at(address: int, nbytes: int) -> np.ndarray:
    """Memory that the caller keeps alive. A view made by torch takes four times as long,
    which a state of 20,000 small tensors would feel."""
    return np.frombuffer(memoryview((ctypes.c_char * nbytes).from_address(address)), np.uint8)


class _Writable:
    """Makes NumPy believe that read-only memory is writable: torch warns about
    tensors over read-only memory, also where they are only read."""

    def __init__(self, data: np.ndarray) -> None:
        self._data = data
        self.__array_interface__ = {
            "data": (data.ctypes.data, False),
            "shape": data.shape,
            "typestr": "|u1",
            "version": 3,
        }


def _tensor_over(data: np.ndarray, alignment: int) -> torch.Tensor:
    """A uint8 tensor of the bytes `data`, to be read only."""
    if data.ctypes.data % alignment:
        return torch.from_numpy(data.copy())
    return torch.from_numpy(np.asarray(_Writable(data)))


def boxes_of_range(
    shape: tuple[int, ...], first: int, end: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Boxes that tile items [first, end) of a C-order array, in order.

    >>> list(boxes_of_range((3, 2), 1, 6))
    [((0, 1), (1, 1)), ((1, 0), (2, 2))]
    """
    if first >= end:
        return
    if not shape:
        yield (), ()
        return
    row_items = prod(shape[1:])
    row, inside = divmod(first, row_items)
    if inside:
        head_end = min(end, (row + 1) * row_items)
        yield from _in_row(shape, row, inside, head_end - row * row_items)
        row, first = row + 1, head_end
    rows = (end - first) // row_items
    if rows > 0:
        yield (row, *(0,) * (len(shape) - 1)), (rows, *shape[1:])
        row, first = row + rows, first + rows * row_items
    if first < end:
        yield from _in_row(shape, row, 0, end - first)


def _in_row(
    shape: tuple[int, ...], row: int, first: int, end: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for start, size in boxes_of_range(shape[1:], first, end):
        yield (row, *start), (1, *size)
