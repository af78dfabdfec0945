"""Dense tensors as nodes and leaves.

    {"!": "torch.tensor", "dtype": "bfloat16", "leaf": 3, ...}

A tensor is a leaf of its elements in C order; `order` lists its dimensions from the
outermost to the innermost in memory if that is not their own order (channels_last).
A tensor that shares memory with another is a view of a leaf of bytes instead: `shape`,
`strides` and `offset`, the last two in bytes (see core.sharing). Further keys:
`parameter` and `grad` for nn.Parameter and requires_grad, `device` if it was not the
plain CPU (without a number if it was the one that the process uses, where several save
together), `mesh` (its shape) and `placements` if it was a DTensor (see torch.sharded).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from functools import partial
from math import prod
from typing import Any

import torch
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy

from holdfast.core.adapters import Decoder, Encoder
from holdfast.core.arrays import dense_order
from holdfast.core.placement import Placement
from holdfast.core.sharing import Layout, SharedMemory
from holdfast.core.types import Node
from holdfast.errors import StateError, UnsupportedValue
from holdfast.torch.backing import backing_of
from holdfast.torch.dtypes import NAMES, describe, name_of
from holdfast.torch.memory import (
    TensorDestination,
    bytes_between,
    copy_bits,
    holds_items,
    no_memory_for,
    overlaps_itself,
    source_of,
    storage_of,
    touched,
)
from holdfast.torch.saved import Saved, malformed, read_node
from holdfast.torch.sharded import (
    check_box,
    cut_out,
    destination_in,
    encode_sharded,
    is_sharded,
    local_of,
    outer_of,
    place_of,
    shared_placement,
)

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_PARAMETERS = (torch.nn.Parameter, UninitializedParameter)
_LAZY = (UninitializedParameter, UninitializedBuffer)

_recorded_devices: ContextVar[bool] = ContextVar("recorded_devices", default=False)


@contextlib.contextmanager
def recorded_devices() -> Iterator[None]:
    """Tensors loaded inside, with no live tensor to go to, are put on the device they
    were saved from. Elsewhere they come to the CPU. Raises StateError if the device
    is not there."""
    token = _recorded_devices.set(True)
    try:
        yield
    finally:
        _recorded_devices.reset(token)


# -- capture ------------------------------------------------------------------


def check_supported(tensor: torch.Tensor, path: str) -> None:
    """Raises UnsupportedValue for tensors whose bytes are not their own."""
    if is_sharded(tensor):
        return check_supported(local_of(tensor), path)
    kind = type(tensor)
    # A kind of parameter comes back as a plain one; live ones keep their class.
    simple = kind in _PLAIN or kind in _LAZY or issubclass(kind, torch.nn.Parameter)
    if not simple or not has_memory(kind):
        raise UnsupportedValue(
            path,
            f"tensor of class {kind.__module__}.{kind.__qualname__}, not in this version",
            hint="Save a plain tensor, e.g. tensor.as_subclass(torch.Tensor).",
        )
    if tensor.is_meta:
        raise UnsupportedValue(
            path,
            f"{describe(tensor)}, without data",
            hint="Materialise it first, e.g. module.to_empty(device='cpu') and load its weights.",
        )
    if tensor.is_quantized:
        raise UnsupportedValue(
            path,
            f"quantized tensor ({name_of(tensor.dtype)})",
            hint="Save tensor.int_repr() with its scale and zero point.",
        )
    if tensor.is_nested:
        raise UnsupportedValue(path, "nested tensor", hint="Save its parts: list(tensor.unbind()).")


def has_memory(kind: type) -> bool:
    """Whether tensors of this class hold their elements themselves; DTensor and other
    wrappers intercept every operation and hold other tensors."""
    own: Any = torch.Tensor
    return getattr(kind, "__torch_dispatch__", None) is own.__torch_dispatch__


def has_storage(tensor: torch.Tensor) -> bool:
    """Whether its elements lie in a storage of its own, which can be asked for."""
    kind = type(tensor)
    return tensor.layout is torch.strided and has_memory(kind) and not is_lazy(tensor)


def encode_tensor(
    value: torch.Tensor, path: str, node: dict[str, Node], encoder: Encoder
) -> dict[str, Node]:
    """Complete and return the node of a dense tensor that `check_supported` accepted. It
    may be changed until everything is encoded (see core.sharing)."""
    dtype = value.dtype
    if dtype not in NAMES:
        raise UnsupportedValue(
            path, f"tensor of dtype {name_of(dtype)}", hint="Convert it with .to(dtype)."
        )
    node.update(first_keys(value))
    if encoder.ranks is not None and "device" in node:
        node["device"] = common_device(value.device, node["device"])
    if is_sharded(value):
        return encode_sharded(value, path, node, encoder)
    placement = shared_placement(value, encoder)
    if type(value) in _LAZY:
        # Its shape is not known before the module has seen its first input.
        node["uninitialized"] = True
        return node
    tensor = value.detach() if value.requires_grad else value
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    if tensor.numel() == 0:
        node["leaf"] = encoder.leaf(source_of(tensor), path, placement)
        return node
    # With dimensions of size 1 a tensor is contiguous in several orders at once; torch
    # chooses the memory format of results by strides that make no other difference.
    if not tensor.is_contiguous() or 1 in tensor.shape:
        order = dense_order(tensor.shape, tensor.stride(), 1)
        if order and order != sorted(order):
            node["order"] = order
    _place(tensor, node, path, encoder, placement)
    return node


def common_device(device: torch.device, name: str) -> str:
    """The same name in all processes, of which each has a device of its own."""
    if device.type == "cuda" and device.index == torch.cuda.current_device():
        return device.type
    return name


def first_keys(value: torch.Tensor) -> dict[str, Node]:
    """The node of a dense tensor, without its leaf."""
    return {"!": "torch.tensor", "dtype": NAMES[value.dtype], **attributes(value)}


def memory_memo(device: torch.device, encoder: Encoder) -> dict[int, Any]:
    """Of a device: a storage's address -> (tensor, node, source, placement) of the one tensor
    in it, or a SharedMemory of all once there is a second."""
    # One memo for all storages: the sources keep those alive, so no address comes twice.
    return encoder.alias(("torch", device), None).setdefault("memory", {})


def _place(
    tensor: torch.Tensor,
    node: dict[str, Node],
    path: str,
    encoder: Encoder,
    placement: Placement | None,
) -> None:
    """Give `node` its leaf: a new one, or one that holds the tensor's memory already."""
    memo = memory_memo(tensor.device, encoder)
    storage = tensor.untyped_storage()
    base = storage.data_ptr()
    known = memo.get(base)
    whole = tensor.is_contiguous() or not overlaps_itself(tensor.shape, tensor.stride())
    if known is None and whole:
        source = source_of(tensor)
        node["leaf"] = encoder.leaf(source, path, placement)
        memo[base] = (tensor, node, source, placement)
        return
    if not isinstance(known, SharedMemory):
        shared = memo[base] = SharedMemory(
            lambda low, high: source_of(bytes_between(storage, low - base, high - base))
        )
        if known is not None:
            first, first_node, first_source, its_placement = known
            shared.add(_layout(first, first_node), first_node, first_source, its_placement)
        known = shared
    known.place(encoder, _layout(tensor, node), node, lambda: source_of(tensor), path, placement)


def _layout(tensor: torch.Tensor, node: dict[str, Node]) -> Layout:
    itemsize = tensor.dtype.itemsize
    start = storage_of(tensor) + int(tensor.storage_offset()) * itemsize
    strides = tuple(step * itemsize for step in tensor.stride())
    return Layout(start, tuple(tensor.shape), strides, itemsize, node["dtype"])


def attributes(tensor: torch.Tensor) -> dict[str, Node]:
    """What a node says of a tensor besides its elements."""
    found: dict[str, Node] = {}
    # isinstance() is slow: its class overrides it. Parameters that are DTensors have a mark.
    if issubclass(type(tensor), _PARAMETERS) or getattr(tensor, "_is_param", False) is True:
        found["parameter"] = True
    # A result of other tensors comes back without its graph.
    if tensor.requires_grad and tensor.is_leaf:
        found["grad"] = True
    if tensor.device.type != "cpu":
        found["device"] = str(tensor.device)
    # Asking is slow, and without a device nothing is pinned.
    elif (
        torch.cuda.is_initialized()
        and tensor.layout is torch.strided
        and (local_of(tensor) if is_sharded(tensor) else tensor).is_pinned()
    ):
        found["device"] = "cpu pinned"
    return found


# -- restore ------------------------------------------------------------------


def decode_tensor(
    node: dict[str, Node],
    target: object,
    path: str,
    decoder: Decoder,
    device: torch.device | None = None,
) -> Any:
    """Into the live tensor `target` if it is one, else a new tensor on `device`
    (default: CPU)."""
    if node.get("uninitialized") is True:
        if isinstance(target, torch.Tensor) and not isinstance(target, _LAZY):
            decoder.changed(path, "an uninitialized tensor", describe(target))
        return target if isinstance(target, torch.Tensor) else UninitializedBuffer()
    saved = read_node(node, path, decoder)
    if isinstance(target, torch.Tensor):
        if fits(saved, target, path, decoder):
            write_into(saved, target, path, decoder)
        return target
    tensor = new_tensor(saved, decoder, device or recorded_device(node, path))
    return dressed(tensor, node)


def fits(saved: Saved, target: torch.Tensor, path: str, decoder: Decoder) -> bool:
    """Whether the live `target` can hold `saved`; reports it if not. Raises
    StateError for tensors that this version cannot write."""
    if is_sharded(target):
        return _fits_sharded(saved, target, path, decoder)
    kind = type(target)
    if not has_memory(kind):
        raise StateError(
            f"cannot restore into {path!r}: it is a {kind.__module__}.{kind.__qualname__}, "
            "not in this version",
            hint="Restore into plain tensors, before they are wrapped.",
        )
    if target.is_meta:
        raise _no_memory_on_meta(path)
    if (
        target.layout is not torch.strided
        or target.dtype != saved.dtype
        or tuple(target.shape) != saved.shape
    ):
        decoder.changed(path, str(saved), describe(target))
        return False
    if target.is_contiguous() or not overlaps_itself(target.shape, target.stride()):
        return True
    strides = saved.view[1] if saved.view else ()
    if tuple(target.stride()) != strides:
        decoder.changed(path, str(saved), f"{describe(target)} whose items share memory")
        return False
    return True


def _fits_sharded(saved: Saved, target: Any, path: str, decoder: Decoder) -> bool:
    local = local_of(target)
    if local.is_meta:
        raise _no_memory_on_meta(path)
    if target.dtype != saved.dtype or tuple(target.shape) != saved.shape:
        decoder.changed(path, str(saved), describe(target))
        return False
    check_box(target, path)
    local_saved = Saved(saved.leaf, saved.dtype, tuple(local.shape))
    return fits(local_saved, local, path, decoder)


def _no_memory_on_meta(path: str) -> StateError:
    return StateError(
        f"cannot restore into {path!r}: it is on the meta device, without memory",
        hint="Call module.to_empty(device=...) before the restore.",
    )


def write_into(saved: Saved, target: torch.Tensor, path: str, decoder: Decoder) -> None:
    """Fill the live `target`, which `fits`. Nothing changes before the bytes came."""
    if 0 in saved.shape or not _claim(saved, target, path, decoder):
        return
    sharded = target if is_sharded(target) else None
    if sharded is not None:
        decoder.finish(partial(touched, outer_of(sharded)))  # has a version of its own
        target = local_of(sharded)
    if not target.numel():
        return
    if not holds_items(target):
        raise no_memory_for(target, path)
    wait_for_device(target.device, decoder)
    if saved.view is None and not target.is_conj() and not target.is_neg():
        there = TensorDestination(target) if sharded is None else destination_in(sharded, path)
        decoder.request(saved.leaf, there)
        return
    fresh = new_tensor(saved, decoder, torch.device("cpu"))

    def copy() -> None:
        here = fresh if sharded is None else cut_out(fresh, sharded, path)
        if target.is_conj() or target.is_neg():
            with torch.no_grad():
                target.detach().copy_(here)
            touched(target)
        elif overlaps_itself(target.shape, target.stride()):
            copy_bits(*(_spanned(tensor) for tensor in (here, target)))
            touched(target)
        else:
            copy_bits(here, target)

    decoder.finish(copy)


def _claim(saved: Saved, target: torch.Tensor, path: str, decoder: Decoder) -> bool:
    """False if the same bytes go to the same memory already (tied weights). Memory
    that two different leaves should fill is reported: one would be lost."""
    claimed, spot = _claims(target, decoder)
    known = claimed.get(spot)
    if known is None:
        claimed[spot] = (saved, path)
        return True
    known_saved, known_path = known
    if known_saved != saved and not (
        # Formats that know no tied weights hold them twice: nothing is lost.
        known_saved == saved._replace(leaf=known_saved.leaf)
        and decoder.same_bytes(known_saved.leaf, saved.leaf)
    ):
        decoder.changed(
            path, f"{saved}, not tied to {known_path!r}", f"{describe(target)}, tied to it"
        )
    return False


def _claims(target: torch.Tensor, decoder: Decoder) -> tuple[dict[Any, Any], Any]:
    """What is to be written to the storage of `target`, by place; and its own place."""
    if is_sharded(target):
        place = place_of(target)
        return decoder.alias(("torch.claimed", target.device, place[0])), place
    claimed = decoder.alias(("torch.claimed", target.device, storage_of(target)))
    return claimed, (target.storage_offset(), target.shape, target.stride(), target.dtype)


def is_claimed(target: torch.Tensor, decoder: Decoder) -> bool:
    """Whether something is to be written to the storage of `target`."""
    return bool(_claims(target, decoder)[0])


def filled_from(target: torch.Tensor, decoder: Decoder) -> tuple[int | None, str]:
    """(the leaf whose bytes this restore writes into `target`, and into nothing beside it;
    the path of `target`) as far as it is known now."""
    claimed, spot = _claims(target, decoder)
    saved, path = claimed.get(spot, (None, ""))
    return (saved.leaf if saved is not None and saved.view is None else None), path


def note_not_saved(target: object, decoder: Decoder) -> None:
    """The live `target` is not in the checkpoint: nor is what optimizers know of it."""
    _not_saved(decoder)[id(target)] = target


def is_not_saved(target: object, decoder: Decoder) -> bool:
    return id(target) in _not_saved(decoder)


def _not_saved(decoder: Decoder) -> dict[Any, Any]:
    return decoder.alias(("torch.not saved",))


def new_tensor(saved: Saved, decoder: Decoder, device: torch.device) -> torch.Tensor:
    """A tensor whose bytes come with the restore. Equal and overlapping views of one
    leaf share memory, as they did when they were saved."""
    if saved.view is not None:
        memo = decoder.alias(("torch.bytes", saved.leaf, str(device)))
        if "tensor" not in memo and (backing := backing_of(device)):
            memo["tensor"], place = backing.place(saved.leaf_bytes, *decoder.spec(saved.leaf))
            decoder.request(saved.leaf, place)
        if "tensor" not in memo:
            wait_for_device(device, decoder)
            memo["tensor"] = torch.empty(saved.leaf_bytes, dtype=torch.uint8, device=device)
            decoder.request(saved.leaf, TensorDestination(memo["tensor"]))
        storage = memo["tensor"].untyped_storage()
        offset, strides = saved.view
        view = _empty((0,), saved.dtype, device)
        return view.set_(storage, offset // saved.dtype.itemsize, saved.shape, strides)
    memo = decoder.alias(("torch.new", saved, str(device)))
    if "tensor" not in memo and 0 not in saved.shape and (backing := backing_of(device)):
        # In the order of its dimensions, which is how its bytes come.
        nbytes = prod(saved.shape) * saved.dtype.itemsize
        raw, place = backing.place(nbytes, *decoder.spec(saved.leaf))
        memo["tensor"] = raw.view(saved.dtype).view(saved.shape)
        decoder.request(saved.leaf, place)
    if "tensor" not in memo:
        wait_for_device(device, decoder)
        sizes = [saved.shape[dim] for dim in saved.order or range(len(saved.shape))]
        tensor = _empty(sizes, saved.dtype, device)
        if saved.order is not None:
            tensor = tensor.permute([saved.order.index(dim) for dim in range(len(sizes))])
        if tensor.numel():
            decoder.request(saved.leaf, TensorDestination(tensor))
        memo["tensor"] = tensor
    return memo["tensor"].detach()


def wait_for_device(device: torch.device, decoder: Decoder) -> None:
    """Bytes are written from other threads, and so on other CUDA streams than the one
    on which the memory may still be in use. Once per restore."""
    if device.type == "cuda":
        memo = decoder.alias(("torch.waited", str(device)))
        if not memo:
            memo["done"] = True
            torch.cuda.synchronize(device)


def dressed(tensor: torch.Tensor, node: dict[str, Node]) -> torch.Tensor:
    """A new tensor as the parameter or autograd leaf that was saved."""
    gradient = node.get("grad") is True and (tensor.is_floating_point() or tensor.is_complex())
    if node.get("parameter") is True:
        return torch.nn.Parameter(tensor, requires_grad=gradient)
    return tensor.requires_grad_(gradient)


def recorded_device(node: dict[str, Node], path: str) -> torch.device:
    """Where a new tensor goes: the CPU, or inside `recorded_devices` where it was."""
    text = node.get("device")
    if not _recorded_devices.get() or not isinstance(text, str) or text == "cpu pinned":
        return torch.device("cpu")
    if text.startswith("meta"):
        raise malformed(path, "the meta device has no memory")
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise StateError(
            f"{path!r} was saved from device {text!r}, which is not here: {error}",
            hint="Load it without holdfast.torch.recorded_devices(): it comes to the CPU.",
        ) from None
    return device


def _spanned(tensor: torch.Tensor) -> torch.Tensor:
    """All items between the first and the last of `tensor`, in one dimension."""
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    with torch.no_grad():
        return tensor.detach().as_strided((last + 1,), (1,))


def _empty(shape: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if dtype is not torch.complex32:
        return torch.empty(shape, dtype=dtype, device=device)
    # torch warns that arithmetic with it is experimental; here it is only carried.
    bits = torch.empty((*shape, 2), dtype=torch.float16, device=device)
    return torch.view_as_complex(bits)
