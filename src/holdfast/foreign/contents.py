"""From what a pickle would build to a list of tensors and plain values.

The graph can be a bomb: a few bytes that name one list a thousand times over, nested
without end. Every container is entered once, no deeper than a limit, without recursion.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple, TypeAlias

from holdfast.foreign.described import ForeignLeaf
from holdfast.foreign.harmless import DTYPES, HARMLESS, SIZES, STORAGES, numpy_dtype
from holdfast.foreign.machine import (
    MAX_OPERATIONS,
    Items,
    Made,
    Name,
    Pairs,
    Stored,
    Value,
    Walked,
    walk,
)

MAX_LEAVES = 100_000
MAX_VALUES = 20_000
_DEPTH = 64
_TEXT = 200
_PATH = 400
_ITEMS = 8
_REMEMBERED = 100_000
_DIMENSIONS = 64
_LARGEST = 1 << 62

_Child: TypeAlias = tuple[str, Value]
"""A path and what is there."""


class Storage(NamedTuple):
    """Where tensors' bytes are kept."""

    key: str
    nbytes: int


class TensorPlace(NamedTuple):
    """What a call builds: a tensor, or an array."""

    storage: Storage | None
    """None: its elements are elsewhere."""
    offset: int
    """In elements, as the strides are."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    note: str = ""
    changed: bool = False
    """Its elements are not those in the storage: conjugated, negated, quantized."""


@dataclass
class Contents:
    """What is in a pickle."""

    leaves: list[ForeignLeaf] = field(default_factory=list[ForeignLeaf])
    values: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    storages: dict[str, Storage] = field(default_factory=dict[str, Storage])
    notes: list[str] = field(default_factory=list[str])
    problems: list[str] = field(default_factory=list[str])


def runs_of(walked: Walked) -> list[str]:
    """What loading the pickle would import or do, beyond what is harmless."""
    named = [_cut(name) for name in walked.names if name not in HARMLESS]
    return [*named, *map(_cut, walked.deeds)]


class Budget:
    """For a file of many pickles: all of them together get what one would get."""

    def __init__(self) -> None:
        self._operations = MAX_OPERATIONS

    def walk(self, data: bytes, start: int = 0) -> Walked:
        walked = walk(data, start, operations=self._operations)
        self._operations -= walked.operations
        return walked


def contents_of(root: Value) -> Contents:
    """The tensors, arrays and plain values below `root`, by path."""
    return _Reader().read(root)


class _Reader:
    def __init__(self) -> None:
        self.found = Contents()
        self._seen: dict[int, str] = {}
        """id of a container or tensor -> the path where it was first."""
        self._starts: dict[tuple[str, int, tuple[int, ...]], str] = {}
        """(storage, offset, shape) -> the path of the first tensor there."""
        self._used: dict[str, str] = {}
        """Storage -> the path of the first tensor in it."""

    def read(self, root: Value) -> Contents:
        # Iterators, not lists: what is below is looked at one by one.
        open_: list[Iterator[_Child]] = [iter([("", root)])]
        while open_:
            child = next(open_[-1], None)
            if child is None:
                open_.pop()
                continue
            open_.append(self._visit(*child, depth=len(open_)))
        return self.found

    def _visit(self, path: str, value: Value, *, depth: int) -> Iterator[_Child]:
        """Note `value` down; what is below it."""
        if not isinstance(value, Items | Pairs | Made | Stored):
            self._say(path, _scalar(value))
            return iter(())
        if isinstance(value, Made) and (tensor := tensor_of(value)) is not None:
            self._add(path, value, tensor)
            return iter(())
        first = self._first_at(path, value)
        if first is not None:
            self._say(path, f"<the same as {first or 'all of it'}>")
            return iter(())
        if depth > _DEPTH:
            self._say(path, "<…>")
            return iter(())
        if isinstance(value, Items):
            return self._visit_items(path, value)
        if isinstance(value, Pairs):
            if not value.pairs:
                self._say(path, "{}")
            return ((_join(path, _key(key)), item) for key, item in value.pairs)
        if isinstance(value, Made):
            return self._visit_made(path, value)
        self._say(path, "<kept outside of the pickle>")
        return iter([(path, value.id)])

    def _first_at(self, path: str, value: object) -> str | None:
        """Where `value` was before; None if this is the first time."""
        first = self._seen.get(id(value))
        if first is None:
            self._seen[id(value)] = path if len(self._seen) < _REMEMBERED else "an earlier one"
        return first

    def _visit_items(self, path: str, value: Items) -> Iterator[_Child]:
        if any(isinstance(item, Items | Pairs | Made | Stored) for item in value.items):
            return ((_join(path, str(i)), item) for i, item in enumerate(value.items))
        text = ", ".join(_scalar(item) for item in value.items[:_ITEMS])
        if len(value.items) > _ITEMS:
            text += f", … ({len(value.items):,} in all)"
        brackets = {"list": "[]", "tuple": "()"}.get(value.kind, "{}")
        self._say(path, brackets[0] + text + brackets[1])
        return iter(())

    def _visit_made(self, path: str, value: Made) -> Iterator[_Child]:
        by = value.by.text if isinstance(value.by, Name) else "what was made before"
        args = [arg for arg in value.args if isinstance(arg, Items | Pairs | Made | Stored)]
        if by in _CONTAINERS:
            if not args and not value.content:
                self._say(path, "{}")
            return ((path, item) for item in (*args, *value.content))
        if (text := _plain_text(by, value)) is not None:
            self._say(path, text)
            return iter(())
        self._say(path, f"<{by}>")
        return ((path, item) for item in (*args, *value.content, *value.state))

    def _say(self, path: str, text: str) -> None:
        if len(self.found.values) < MAX_VALUES:
            self.found.values.append((path, _cut(text)))
        elif len(self.found.values) == MAX_VALUES:
            self.found.values.append(("", f"… more than {MAX_VALUES:,} values"))

    def _add(self, path: str, made: Made, tensor: TensorPlace) -> None:
        if len(self.found.leaves) >= MAX_LEAVES:
            if not self.found.notes:
                self.found.notes.append(f"it has more tensors than the {MAX_LEAVES:,} listed")
            return
        note = tensor.note
        if (first := self._first_at(path, made)) is not None:
            note = f"the same tensor as {first}"
        elif tensor.storage is not None:
            note = self._shared(path, tensor) or note
            known = self.found.storages.get(tensor.storage.key)
            if known is None or known.nbytes < tensor.storage.nbytes:
                self.found.storages[tensor.storage.key] = tensor.storage
            if reach_of(tensor) > tensor.storage.nbytes:
                self.found.problems.append(f"{path}: it reaches beyond its storage")
        nbytes = prod(tensor.shape) * SIZES.get(tensor.dtype, 0)
        self.found.leaves.append(ForeignLeaf(path, tensor.dtype, tensor.shape, nbytes, _cut(note)))

    def _shared(self, path: str, tensor: TensorPlace) -> str:
        """What the tensor shares its bytes with."""
        assert tensor.storage is not None
        key = tensor.storage.key
        same = self._starts.setdefault((key, tensor.offset, tensor.shape), path)
        if same != path:
            return f"same data as {same}"
        first = self._used.setdefault(key, path)
        return f"shares data with {first}" if first != path else ""


_CONTAINERS = frozenset(
    {
        *(f"collections.{name}" for name in ("OrderedDict", "Counter", "defaultdict", "deque")),
        *(f"builtins.{name}" for name in ("set", "frozenset", "list", "tuple", "dict")),
    }
)


# -- tensors and arrays -------------------------------------------------------


def tensor_of(made: Made) -> TensorPlace | None:
    """What a call builds, if it builds a tensor or an array; None for any other."""
    for _ in range(_DEPTH):
        if (wrapper := _WRAPPERS.get(_name(made))) is None:
            break
        inner = wrapper(made.args)
        if not isinstance(inner, Made):
            return None
        made = inner
    read = _REBUILDERS.get(_name(made))
    try:
        tensor = read(made) if read else None
    except (IndexError, TypeError, ValueError):
        return None  # not the arguments that it takes
    return tensor if tensor and prod(tensor.shape) < _LARGEST else None


def _name(made: Made) -> str:
    return made.by.text if isinstance(made.by, Name) else ""


def _retyped(args: list[Value]) -> Value:
    """`_rebuild_from_type_v2(function, type, args, state)`: a tensor of a subclass."""
    if len(args) < 3 or not isinstance(args[2], Items):
        return None
    return Made(args[0], args[2].items)


def _first(args: list[Value]) -> Value:
    return args[0] if args else None


_WRAPPERS: dict[str, Callable[[list[Value]], Value]] = {
    "torch._tensor._rebuild_from_type_v2": _retyped,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
}


def _strided(made: Made) -> TensorPlace | None:
    """`(storage, offset, size, stride, …)`, since version 3 with the dtype."""
    args = made.args
    stored = args[0]
    if not isinstance(stored, Stored) or not isinstance(stored.id, Items):
        return None
    _, kind, key, _, count = stored.id.items[:5]
    if not isinstance(kind, Name) or not isinstance(key, str):
        return None
    dtype = STORAGES.get(kind.text.rpartition(".")[2], kind.text)
    storage = Storage(key, _number(count) * SIZES.get(dtype, 1))
    if len(args) > 6 and isinstance(args[6], Name):
        dtype = _dtype(args[6])
    # A dict of what else is to be done with it stands last: {"conj": True}.
    changed = any(isinstance(arg, Pairs) and arg.pairs for arg in args[6:])
    place = _number(args[1]), _numbers(args[2]), _numbers(args[3])
    return TensorPlace(storage, *place, dtype, changed=changed)


def _quantized(made: Made) -> TensorPlace | None:
    place = _strided(Made(made.by, made.args[:4]))
    return place._replace(changed=True) if place else None


def _meta(made: Made) -> TensorPlace | None:
    dtype, shape, stride = made.args[:3]
    return TensorPlace(
        None, 0, _numbers(shape), _numbers(stride), _dtype(dtype), "meta: without data"
    )


def _inner(value: Value) -> TensorPlace | None:
    """A plain tensor that another one is made of: no deeper, whatever the file says."""
    return (
        _REBUILDERS[_name(value)](value)
        if isinstance(value, Made) and _name(value) in _PLAIN
        else None
    )


def _sparse(made: Made) -> TensorPlace | None:
    """As its values: the indices are small beside them, and have no name of their own."""
    layout, data = made.args[:2]
    if not isinstance(data, Items):
        return None
    compressed = len(data.items) >= 4 and isinstance(data.items[3], Made | Items)
    values, shape = (data.items[2], data.items[3]) if compressed else data.items[1:3]
    inner = _inner(values)
    if inner is None:
        return None
    kind = _scalar(layout) if isinstance(layout, str) else "sparse"
    if isinstance(layout, Made) and layout.args:
        kind = _scalar(layout.args[0])
    kind = kind.removeprefix("torch.")
    stored = prod(inner.shape)
    return TensorPlace(None, 0, _numbers(shape), (), inner.dtype, f"{kind}: {stored:,} stored")


def _nested(made: Made) -> TensorPlace | None:
    inner = _inner(made.args[0])
    return inner._replace(note="nested: all of its tensors in a row") if inner else None


def _wrapped(made: Made) -> TensorPlace | None:
    """`(class, dtype, size, stride, …)`: what is inside comes with its state."""
    cls, dtype, shape, stride = made.args[:4]
    note = f"a {_scalar(cls)}"
    return TensorPlace(None, 0, _numbers(shape), _numbers(stride), _dtype(dtype), note)


def _from_numpy(made: Made) -> TensorPlace | None:
    inner = _inner(made.args[0])
    return inner._replace(dtype=_dtype(made.args[1])) if inner else None


def _array(made: Made) -> TensorPlace | None:
    """NumPy's `_reconstruct(…)` and the state (version, shape, dtype, order, data)."""
    state = made.state[0] if made.state else None
    if not isinstance(state, Items) or len(state.items) != 5:
        return None
    _, shape, dtype, _, data = state.items
    if isinstance(data, Items):
        return None  # of objects: its items are values
    return TensorPlace(
        None, 0, _numbers(shape), (), numpy_dtype(_numpy_code(dtype)), "in the pickle"
    )


_REBUILDERS: dict[str, Callable[[Made], TensorPlace | None]] = {
    "torch._utils._rebuild_tensor": _strided,
    "torch._utils._rebuild_tensor_v2": _strided,
    "torch._utils._rebuild_tensor_v3": _strided,
    "torch._utils._rebuild_qtensor": _quantized,
    "torch._utils._rebuild_meta_tensor_no_storage": _meta,
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_nested_tensor": _nested,
    "torch._utils._rebuild_wrapper_subclass": _wrapped,
    "torch._utils._rebuild_device_tensor_from_numpy": _from_numpy,
    "numpy.core.multiarray._reconstruct": _array,
    "numpy._core.multiarray._reconstruct": _array,
}


_PLAIN = frozenset(name for name, read in _REBUILDERS.items() if read in (_strided, _meta, _array))


def reach_of(tensor: TensorPlace) -> int:
    """The byte after the last one that the tensor uses in its storage."""
    if 0 in tensor.shape or tensor.storage is None:
        return 0
    steps = zip(tensor.shape, tensor.stride, strict=False)
    last = tensor.offset + sum((size - 1) * stride for size, stride in steps)
    return (last + 1) * SIZES.get(tensor.dtype, 1)


def _number(value: Value) -> int:
    """A size as it can be; raises TypeError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _LARGEST:
        raise TypeError("no size")
    return value


def _numbers(value: Value) -> tuple[int, ...]:
    if isinstance(value, Made) and isinstance(value.by, Name) and value.by.text == "torch.Size":
        value = value.args[0]
    if not isinstance(value, Items) or len(value.items) > _DIMENSIONS:
        raise TypeError("no shape")
    return tuple(_number(item) for item in value.items)


def _dtype(value: Value) -> str:
    if not isinstance(value, Name):
        raise TypeError("no dtype")
    return DTYPES.get(value.text.removeprefix("torch."), value.text)


def _numpy_code(value: Value) -> str:
    if not isinstance(value, Made) or not value.args or not isinstance(value.args[0], str):
        raise TypeError("no dtype")
    return value.args[0]


# -- texts --------------------------------------------------------------------


def _join(path: str, key: str) -> str:
    return _cut(f"{path}/{key}", _PATH) if path else key


def _key(key: Value) -> str:
    """A string as it is, any other key so that `0` and `"0"` differ."""
    return _cut(key) if isinstance(key, str) else f"[{_scalar(key)}]"


def _scalar(value: Value) -> str:
    match value:
        case None:
            return "none"
        case bool():
            return "yes" if value else "no"
        case int():
            # Python converts no longer ones, and they say nothing.
            bits = value.bit_length()
            return str(value) if bits <= 128 else f"<a whole number of {bits:,} bits>"
        case float():
            return repr(value)
        case str():
            return _cut(value)
        case bytes():
            return f"<{len(value):,} bytes>"
        case Name():
            return _cut(f"<{value.text}>")
        case Made():
            return f"<{value.by.text}>" if isinstance(value.by, Name) else "<…>"
        case _:
            return "<…>"


_SCALARS = {"f8": "<d", "f4": "<f", "i8": "<q", "i4": "<i", "u8": "<Q", "b1": "<?"}


def _plain_text(by: str, made: Made) -> str | None:
    """Small values that come from a call; None for any other."""
    if by == "torch.Size" and made.args and isinstance(made.args[0], Items):
        return f"<torch.Size {[_scalar(item) for item in made.args[0].items[:_ITEMS]]}>".replace(
            "'", ""
        )
    if by in ("torch.device", "builtins.complex") or by.startswith("pathlib."):
        said = ", ".join(_scalar(arg) for arg in made.args[:_ITEMS])
        return f"<{by.rpartition('.')[2]} {said}>"
    if by in ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"):
        return _scalar_text(made)
    if by.startswith("builtins.") and not made.args and not made.content:
        return f"<empty {by.removeprefix('builtins.')}>"
    return None


def _scalar_text(made: Made) -> str | None:
    try:
        code = _numpy_code(made.args[0])
        data = _bytes_of(made.args[1])
        if data is not None and code in _SCALARS:
            return _scalar(struct.unpack(_SCALARS[code], data)[0])
    except (IndexError, TypeError, struct.error):
        return None
    return f"<a NumPy {numpy_dtype(code)}>"


def _bytes_of(value: Value) -> bytes | None:
    """Bytes, which old pickles write as an encoded text."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, Made) and isinstance(value.by, Name) and value.by.text == "_codecs.encode":
        text = value.args[0] if value.args else None
        if isinstance(text, str) and len(text) <= 64 and value.args[1:] == ["latin1"]:
            try:
                return text.encode("latin1")
            except UnicodeEncodeError:
                return None
    return None


def _cut(text: str, most: int = _TEXT) -> str:
    return text if len(text) <= most else text[:most] + "…"
