"""From what a pickle would build to plain values, with tensors that are not read yet.

The graph can be a bomb, as in `contents`: what occurs twice is made once, and is the same
object in both places. What is no plain value becomes a `ForeignObject`: a name.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable
from math import prod
from typing import Any

from holdfast.core.types import MiB
from holdfast.errors import DamagedObject
from holdfast.foreign.contents import Storage, TensorPlace, reach_of, tensor_of
from holdfast.foreign.data import (
    Data,
    ForeignObject,
    ForeignTensor,
    Held,
    Span,
    Strided,
    Swapped,
    Tree,
)
from holdfast.foreign.harmless import DTYPES, SIZES, numpy_dtype
from holdfast.foreign.machine import Items, Made, Name, Pairs, Stored, Value

MAX_DEPTH = 96  # a checkpoint takes 128
MAX_ITEMS = 2_000_000  # that is made of a pickle; its machine stops at a million objects
_EXPANDED_BYTES = 256 * MiB
_SCALARS = {
    "f8": "<d",
    "f4": "<f",
    "f2": "<e",
    "i8": "<q",
    "i4": "<i",
    "i2": "<h",
    "i1": "<b",
    "u8": "<Q",
    "u4": "<I",
    "u2": "<H",
    "u1": "<B",
    "b1": "<?",
}
_LISTS = ("builtins.list", "collections.deque")
_DICTS = ("collections.Counter", "collections.defaultdict", "builtins.dict")
_ARRAYS = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
_NUMBERS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
_PLAIN_DTYPES = frozenset(DTYPES.values()) - {name for name in SIZES if name.startswith("q")}

FindStorage = Callable[[Storage], Data]
"""Where the bytes of a storage are. Raises DamagedObject if they are not there."""


def tree_of(root: Value, find: FindStorage, name: str) -> Tree:
    """The plain tree below `root`. Raises DamagedObject, for `name`."""
    return _Builder(find, name).build(root, 0)


def attributes_of(value: Value) -> dict[str, Value]:
    """What an object is told to take as its attributes, by name; {} for anything else."""
    found: dict[str, Value] = {}
    if isinstance(value, Made):
        for state in value.state:
            # With slots: (attributes of the dict, those in slots).
            parts = state.items if isinstance(state, Items) else [state]
            for part in parts:
                if isinstance(part, Pairs):
                    found |= {key: item for key, item in part.pairs if isinstance(key, str)}
    return found


class _Builder:
    def __init__(self, find: FindStorage, name: str) -> None:
        self._find = find
        self._name = name
        self._made: dict[int, Tree] = {}
        """id of what is in the graph -> what became of it; None while that is made."""
        self._tensors: dict[object, ForeignTensor] = {}
        self._items = 0
        self._expanded = 0

    def build(self, value: Value, depth: int) -> Tree:
        self._items += 1
        if self._items > MAX_ITEMS:
            raise DamagedObject(self._name, f"it has more than {MAX_ITEMS:,} items")
        if isinstance(value, Name):
            return ForeignObject(value.text)
        if not isinstance(value, Items | Pairs | Made | Stored):
            return value
        if id(value) in self._made:
            known = self._made[id(value)]
            return ForeignObject("a container that holds itself") if known is None else known
        if depth > MAX_DEPTH:
            return ForeignObject(f"what is nested deeper than {MAX_DEPTH} levels")
        self._made[id(value)] = None
        made = self._made[id(value)] = self._of(value, depth + 1)
        return made

    def _of(self, value: Items | Pairs | Made | Stored, depth: int) -> Tree:
        if isinstance(value, Pairs):
            return self._fill({}, value.pairs, depth)
        if isinstance(value, Items):
            return self._sequence(value, depth)
        if isinstance(value, Stored):
            return ForeignObject("what is kept outside of the pickle")
        return self._call(value, depth)

    def _sequence(self, value: Items, depth: int) -> Tree:
        items = [self.build(item, depth) for item in value.items]
        if value.kind == "list":
            return items
        if value.kind == "tuple":
            return tuple(items)
        if not all(isinstance(item, str | int | float | bytes | None) for item in items):
            return ForeignObject(f"a {value.kind} of other things than plain values")
        return set(items) if value.kind == "set" else frozenset(items)

    def _fill(self, into: dict[Any, Tree], pairs: list[tuple[Value, Value]], depth: int) -> Tree:
        for key, item in pairs:
            into[self._key(key, depth)] = self.build(item, depth)
        return into

    def _key(self, key: Value, depth: int) -> Any:
        if isinstance(key, str | int | float | bytes | None):
            return key
        # No deeper: the hash of a nested tuple can take for ever.
        if isinstance(key, Items) and key.kind == "tuple":
            items = key.items
            if all(isinstance(item, str | int | float | bytes | None) for item in items):
                return tuple(items)
        return ForeignObject("a key that is no plain value")

    # -- calls -------------------------------------------------------------------

    def _call(self, made: Made, depth: int) -> Tree:
        place = tensor_of(made)
        by = made.by.text if isinstance(made.by, Name) else "what was made before"
        if by in _ARRAYS:
            return self._array(made) or ForeignObject("a NumPy array of objects")
        if place is not None:
            return self._tensor(place)
        args = [arg for arg in made.args if isinstance(arg, Items)]
        if by == "collections.OrderedDict":
            return self._ordered(made, depth)
        if by in _DICTS:
            found: dict[Any, Tree] = {}
            for part in (*made.args, *made.content):
                if isinstance(part, Pairs):
                    self._fill(found, part.pairs, depth)
            return found
        if by in _LISTS or by in ("builtins.set", "builtins.frozenset", "builtins.tuple"):
            parts = [part for part in (*args, *made.content) if isinstance(part, Items)]
            items = [item for part in parts for item in part.items]
            kind = by.rpartition(".")[2].replace("deque", "list")
            return self._sequence(Items(kind, items), depth)
        if by == "torch.Size" and args:
            return self._sequence(Items("tuple", args[0].items), depth)
        if by == "builtins.complex" and _are_numbers(made.args):
            return complex(*made.args)  # type: ignore[arg-type]
        if by == "_codecs.encode" and (data := _bytes_of(made)) is not None:
            return data
        if by in _NUMBERS and (number := _number(made)) is not None:
            return number
        return ForeignObject(by)

    def _ordered(self, made: Made, depth: int) -> Tree:
        found: OrderedDict[Any, Tree] = OrderedDict()
        for part in (*made.args, *made.content):
            if isinstance(part, Pairs):
                self._fill(found, part.pairs, depth)
            elif isinstance(part, Items):  # of pairs
                pairs = [tuple(p.items) for p in part.items if isinstance(p, Items)]
                self._fill(found, [(p[0], p[1]) for p in pairs if len(p) == 2], depth)
        # Versions of the modules in a state_dict, which decide how some are loaded.
        versions = attributes_of(made).get("_metadata")
        if versions is not None:
            found._metadata = self.build(versions, depth)  # type: ignore[attr-defined]
        return found

    def _tensor(self, place: TensorPlace) -> Tree:
        if place.storage is None or place.changed or place.dtype not in _PLAIN_DTYPES:
            return ForeignObject(f"a tensor that is {place.note or place.dtype}")
        size = SIZES[place.dtype]
        key = (place.storage.key, place.offset, place.shape, place.stride, place.dtype)
        if (known := self._tensors.get(key)) is not None:
            return known
        nbytes, reach = prod(place.shape) * size, reach_of(place)
        if reach > place.storage.nbytes or len(place.stride) != len(place.shape):
            raise DamagedObject(self._name, "a tensor reaches beyond its storage")
        # A stride of 0 makes a tensor of any size out of one element.
        expanded = self._expanded + max(0, nbytes - place.storage.nbytes)
        if expanded > _EXPANDED_BYTES:
            return ForeignObject(f"a tensor of {nbytes:,} bytes made of {reach:,}")
        self._expanded = expanded
        data: Data = Held(b"")
        if nbytes:
            start = place.offset * size
            whole = self._find(place.storage)
            dense = _is_dense(place.shape, place.stride)
            data = _part(whole, start, nbytes if dense else reach - start)
            if not dense:
                data = Strided(data, reach - start, place.shape, place.stride, size)
        tensor = ForeignTensor(place.dtype, place.shape, data, same=key)
        self._tensors[key] = tensor
        return tensor

    def _array(self, made: Made) -> Tree:
        """An array whose bytes are in the pickle: NumPy's (version, shape, dtype, whether
        in Fortran's order, bytes)."""
        place = tensor_of(made)
        if place is None:
            return None
        state = made.state[0]
        assert isinstance(state, Items)
        data = _bytes_of(state.items[4])
        code = _code(state.items[2])
        if data is None or code is None:
            return None
        return numpy_tensor(code, place.shape, Held(data), len(data), bool(state.items[3]))


def numpy_tensor(
    code: str, shape: tuple[int, ...], data: Data, nbytes: int, fortran: bool
) -> ForeignTensor | None:
    """An array of NumPy's; `code` is a dtype in its words. None for a dtype that has no
    plain bytes, or another number of them."""
    order, kind, digits = code[:1], code[1:2], code[2:]
    if order not in "<>|=" or not digits.isdigit() or len(digits) > 6 or kind not in "biufcSU":
        return None
    size = int(digits) * (4 if kind == "U" else 1)
    if kind == "b" and size != 1:
        return None
    if prod(shape) * size != nbytes:
        return None
    if order == ">" and size > 1:
        part = {"c": size // 2, "U": 4, "S": 1}.get(kind, size)
        data, code = Swapped(data, part), f"<{code[1:]}"
    name = numpy_dtype(code)
    if name not in SIZES and kind not in "SU":
        return None
    if fortran and len(shape) > 1 and nbytes:
        steps = [1]
        for extent in shape[:-1]:
            steps.append(steps[-1] * extent)
        data = Strided(data, nbytes, shape, tuple(steps), size)
    return ForeignTensor(name, shape, data, numpy=True, itemsize=size)


def _part(data: Data, start: int, nbytes: int) -> Data:
    if isinstance(data, Span):
        return Span(data.source, data.offset + start, nbytes)
    return Shifted(data, start)


class Shifted:
    """What of another one is behind a place."""

    def __init__(self, inner: Data, start: int) -> None:
        self._inner, self._start = inner, start

    def read(self, offset: int, into: memoryview) -> None:
        self._inner.read(self._start + offset, into)


def _is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for extent, step in zip(reversed(shape), reversed(stride), strict=True):
        if extent != 1 and step != expected:
            return False
        expected *= extent
    return True


def _are_numbers(values: list[Value]) -> bool:
    return 0 < len(values) <= 2 and all(isinstance(value, float | int) for value in values)


def _code(value: Value) -> str | None:
    """The dtype of an array, with its order of bytes, as NumPy pickles it."""
    if not isinstance(value, Made) or not value.args or not isinstance(value.args[0], str):
        return None
    state = value.state[0] if value.state else None
    order = state.items[1] if isinstance(state, Items) and len(state.items) > 1 else "|"
    names = state.items[3] if isinstance(state, Items) and len(state.items) > 3 else None
    if not isinstance(order, str) or len(order) != 1 or names is not None:
        return None
    return order + value.args[0]


def _bytes_of(value: Value) -> bytes | None:
    """Bytes, which pickles of protocols before 3 write as an encoded text."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, Made) and isinstance(value.by, Name) and value.by.text == "_codecs.encode":
        text = value.args[0] if value.args else None
        if isinstance(text, str) and value.args[1:] == ["latin1"]:
            try:
                return text.encode("latin1")
            except UnicodeEncodeError:
                return None
    return None


def _number(made: Made) -> Any:
    code = _code(made.args[0]) if made.args else None
    data = _bytes_of(made.args[1]) if len(made.args) > 1 else None
    how = _SCALARS.get((code or "")[1:])
    if how is None or data is None or len(data) != struct.calcsize(how):
        return None
    return struct.unpack(how.replace("<", ">") if code and code[0] == ">" else how, data)[0]
