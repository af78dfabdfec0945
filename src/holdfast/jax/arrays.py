"""Arrays and random keys as nodes and leaves.

    {"!": "jax.array", "dtype": "bfloat16", "leaf": 3}
    {"!": "jax.key", "impl": "threefry2x32", "v": <node of its data>}

Capture needs no copy of what lies on the CPU: an array does not change, and XLA does not
write into the memory of one that is donated while a view of it is held: it takes other
memory for the result. What lies on a device is brought to the host, all of it at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from holdfast.core.adapters import Decoder, Encoder, Waiting
from holdfast.core.arrays import ArraySource, MemoryDestination
from holdfast.core.leaves import Later, then
from holdfast.core.types import KiB, Node
from holdfast.errors import DamagedObject, StateError, UnsupportedValue
from holdfast.jax.dtypes import DTYPES, NAMES, STORED, WIDE, bits, has_own_dimension, words

_HELD_BYTES = 64 * KiB  # smaller ones are copied at once, into one block
_ALIGN = 64  # memory that starts on a cache line is taken over by JAX without a copy
# JAX 0.5.3 lets programs from its persistent compilation cache write what they were donated into
# such memory, and frees it under the results (`may_alias=False` does not help). 0.10.2 does not;
# those between were not tried.
_COPIES = jax.__version_info__ < (0, 10)


class HeldSource(ArraySource):
    """Bytes that stay as they are for as long as they are held: nothing is copied while the
    training stands still. See `core.adapters.LeafSource`."""

    __slots__ = ()
    streamed = True

    def close(self) -> None:
        self._array = np.empty(0, np.uint8)  # its memory is the training's again


# -- capture ------------------------------------------------------------------


def is_key(value: object) -> bool:
    """Whether `value` is an array of random keys (`jax.random.key`), or the shape of one."""
    known = isinstance(value, jax.Array | jax.ShapeDtypeStruct)
    return known and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def check_supported(value: Any, path: str) -> None:
    """Raises UnsupportedValue for arrays whose bytes are not here; StateError for those that
    have none any more."""
    if isinstance(value, Tracer):
        raise UnsupportedValue(
            path,
            f"a tracer ({value.aval})",
            hint="The run's loop must not be inside of jax.jit, grad or scan: jit the step.",
        )
    if value.is_deleted():
        raise StateError(
            f"{path!r} is {words(value.dtype, value.shape)}, and its memory was given away "
            "(donate_argnums) before the save",
            hint="Put each step's result in the box: state.params = step(state.params).",
        )
    if not value.is_fully_addressable:
        raise UnsupportedValue(
            path,
            f"{words(value.dtype, value.shape)} that is spread over several processes, "
            "not in this version",
            hint="Gather it on each of them: "
            "jax.experimental.multihost_utils.process_allgather(array, tiled=True).",
        )


def encode_arrays(waiting: Sequence[Waiting], encoder: Encoder) -> None:
    """Complete the nodes of arrays."""
    for value, path, node in waiting:
        check_supported(value, path)
        name = NAMES.get(np.dtype(value.dtype))
        if name is None:
            raise UnsupportedValue(
                path, f"array of dtype {value.dtype}", hint="Convert it with .astype(dtype)."
            )
        node.update({"!": "jax.array", "dtype": name})
        if value.weak_type:
            node["weak"] = True
    # Devices send all of it side by side, before the first is waited for.
    for value, _, _ in waiting:
        value.copy_to_host_async()
    sources = [_source(np.asarray(value)) for value, _, _ in waiting]
    leaves = encoder.leaves_of(sources, [path for _, path, _ in waiting])
    for (_, _, node), leaf in zip(waiting, leaves, strict=True):
        node["leaf"] = leaf


def _source(host: np.ndarray[Any, Any]) -> ArraySource:
    source = (HeldSource if host.nbytes >= _HELD_BYTES else ArraySource)(bits(host))
    source.dtype = STORED[NAMES[host.dtype]]
    return source


def encode_key(value: Any, path: str, encoder: Encoder) -> dict[str, Node]:
    check_supported(value, path)
    data = jax.random.key_data(value)
    return {"!": "jax.key", "impl": impl_of(value), "v": encoder.encode(data, path)}


def impl_of(key: Any) -> str:
    """The name of the algorithm that a key is for.

    >>> impl_of(jax.random.key(0, impl="rbg"))
    'rbg'
    """
    found: Any = jax.random.key_impl(key)
    return found if isinstance(found, str) else str(getattr(found, "name", found))


# -- restore ------------------------------------------------------------------


class Saved(NamedTuple):
    """What a node says."""

    leaf: int
    dtype: str
    shape: tuple[int, ...]
    weak: bool

    def __str__(self) -> str:
        return words(self.dtype, self.shape)


def read_node(node: dict[str, Node], path: str, decoder: Decoder) -> Saved:
    """Raises DamagedObject."""
    name, leaf = node.get("dtype"), cast(Any, node.get("leaf"))
    if not isinstance(name, str) or not name.isidentifier():
        raise DamagedObject("the tree", "its dtype is malformed", leaf=path)
    if name not in DTYPES:
        raise StateError(
            f"{path!r} is of dtype {name[:40]!r}, which this ml_dtypes does not have",
            hint="pip install -U jax ml_dtypes",
        )
    stored, shape = decoder.spec(leaf)
    fits = stored == STORED[name]
    if has_own_dimension(name):
        fits = fits and shape[-1:] == (DTYPES[name].itemsize,)
        shape = shape[:-1]
    if not fits:
        raise DamagedObject("the tree", f"its leaf of {stored} is no {name} array", leaf=path)
    return Saved(leaf, name, shape, node.get("weak") is True)


def decode_array(node: dict[str, Node], target: object, path: str, decoder: Decoder) -> Any:
    saved = read_node(node, path, decoder)
    live = target if isinstance(target, jax.Array | jax.ShapeDtypeStruct) else None
    if live is not None and not _fits(live, saved):
        decoder.changed(path, str(saved), words(live.dtype, live.shape))
        return live
    if saved.dtype in WIDE and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise StateError(
            f"{path!r} was saved as {saved}, which JAX would make half as wide here",
            hint='jax.config.update("jax_enable_x64", True), as when it was saved.',
        )
    arriving: dict[str, Any] = decoder.alias(("jax.arriving",))
    batch: Arriving = arriving.setdefault("batch", Arriving())
    host = _empty(saved.shape, DTYPES[saved.dtype])
    if host.size:
        decoder.request(saved.leaf, MemoryDestination(bits(host)))
    return batch.add(host, placement(live), weak=saved.weak)


def _fits(live: Any, saved: Saved) -> bool:
    return not is_key(live) and (live.shape, str(live.dtype)) == (saved.shape, saved.dtype)


def placement(live: Any) -> Any:
    """The sharding of a live array that is bound to its devices; None: JAX's default device,
    and where others are that it is used with."""
    if live is None:
        return None
    if isinstance(live, jax.ShapeDtypeStruct):
        return live.sharding
    committed = getattr(live, "committed", None)
    if committed is None:
        committed = getattr(live, "_committed", True)
    return live.sharding if committed else None


def decode_key(node: dict[str, Node], target: object, path: str, decoder: Decoder) -> Any:
    impl, data = node.get("impl"), node.get("v")
    if not isinstance(impl, str) or not isinstance(data, dict) or data.get("!") != "jax.array":
        raise DamagedObject("the tree", "a random key is malformed", leaf=path)
    live: Any = target if isinstance(target, jax.Array | jax.ShapeDtypeStruct) else None
    words_of_key = f"a random key ({impl})"
    if live is not None and not is_key(live):
        decoder.changed(path, words_of_key, words(live.dtype, live.shape))
        return live
    if live is not None and not _is_for(live, impl):
        decoder.changed(path, words_of_key, f"a random key ({live.dtype})")
        return live
    inner = None if live is None else _data_of(live)
    value = decoder.decode(data, inner, path)
    if value is inner and live is not None:
        return live  # another shape, which was reported

    def wrap(data: Any) -> Any:
        try:
            made = jax.random.wrap_key_data(data, impl=impl)
        except (ValueError, TypeError) as error:
            raise StateError(f"{path!r} is a random key of another JAX: {error}") from None
        if isinstance(inner, jax.ShapeDtypeStruct) and (where := placement(live)) is not None:
            return jax.device_put(made, where)
        return made

    return then(value, wrap)


def _is_for(live: Any, impl: str) -> bool:
    if isinstance(live, jax.Array):
        return impl_of(live) == impl
    try:
        return jax.eval_shape(lambda: jax.random.key(0, impl=impl)).dtype == live.dtype
    except ValueError:
        return False


def _data_of(live: Any) -> Any:
    """The words of live keys, or their shape where there are none, or none any more."""
    if isinstance(live, jax.Array) and not live.is_deleted():
        return jax.random.key_data(live)
    return jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(live.shape, live.dtype))


def _empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.empty(nbytes + _ALIGN, np.uint8)
    start = -memory.ctypes.data % _ALIGN
    return memory[start : start + nbytes].view(dtype).reshape(shape)


class Arriving:
    """The new arrays of a restore. When the first is asked for, the bytes of all have come."""

    def __init__(self) -> None:
        self._hosts: list[tuple[np.ndarray[Any, Any], Any, bool]] = []
        self._made: list[Any] = []

    def add(self, host: np.ndarray[Any, Any], sharding: Any, *, weak: bool) -> Later:
        number = len(self._hosts)
        self._hosts.append((host, sharding, weak))
        return Later(lambda: self._get(number))

    def _get(self, number: int) -> Any:
        if not self._made:
            self._made = self._make()
            self._hosts.clear()
        made, self._made[number] = self._made[number], None  # each is asked for once
        return made

    def _make(self) -> list[Any]:
        made: list[Any] = [None] * len(self._hosts)
        bound = [n for n, (_, sharding, _) in enumerate(self._hosts) if sharding is not None]
        free = [n for n, (_, sharding, _) in enumerate(self._hosts) if sharding is None]
        placed = jax.device_put(
            [self._hosts[n][0] for n in bound], [self._hosts[n][1] for n in bound]
        )
        for n, value in zip(bound, placed, strict=True):
            made[n] = value
        for n, value in zip(free, jax.device_put([self._hosts[n][0] for n in free]), strict=True):
            made[n] = value
        if _COPIES:
            made = [jnp.array(value, copy=True) for value in made]
        return [_weak(value) if w else value for value, (_, _, w) in zip(made, self._hosts)]  # noqa: B905


def _weak(value: Any) -> Any:
    """As the result of Python's numbers alone, whose dtype gives way to that of others. JAX
    has no public name for this; without it the array has a dtype as others have."""
    try:
        from jax._src.lax.lax import _convert_element_type
    except ImportError:
        return value
    return _convert_element_type(value, value.dtype, weak_type=True)
