"""NumPy arrays as leaves: dtypes in words and nodes, sources, destinations.

A leaf holds an array's elements in C order, little-endian. A dtype that safetensors
cannot name is stored as its raw bytes: `U8`, with the item size as last dimension.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod
from typing import Any, TypeAlias, cast

import numpy as np

from holdfast.core.adapters import LeafSource
from holdfast.core.plan import Part, itemsize, meeting, slices
from holdfast.core.types import Node
from holdfast.errors import DamagedObject, UnsupportedValue

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
DType: TypeAlias = "np.dtype[Any]"

MAX_DIMENSIONS = 64  # NumPy 2's limit; NumPy 1 has 32 and refuses by itself

_STORED = {
    "b1": "BOOL",
    "i1": "I8",
    "i2": "I16",
    "i4": "I32",
    "i8": "I64",
    "u1": "U8",
    "u2": "U16",
    "u4": "U32",
    "u8": "U64",
    "f2": "F16",
    "f4": "F32",
    "f8": "F64",
    "c8": "C64",
}
_SIMPLE = re.compile(
    r"[<>|](?:b1|[iu][1248]|f(?:2|4|8|12|16)|c(?:8|16|24|32)"
    r"|[SUV](?P<size>0|[1-9][0-9]{0,8})"
    r"|[Mm]8(?:\[(?P<count>[1-9][0-9]{0,8})?(?P<unit>Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?)"
)
_FIELDS_MAX = 10_000
_NESTING_MAX = 32

# Caches of dtype -> node and so on are bounded: structured dtypes come from users.
_nodes: dict[DType, Node] = {}
_simple: dict[str, DType] = {}
_CACHE_MAX = 256


# -- dtypes -------------------------------------------------------------------


def dtype_node(dtype: DType, path: str) -> Node:
    """The node of a dtype: NumPy's own string ("<f4"), or an object for structured
    ones. Raises UnsupportedValue for Python objects and types of other packages."""
    node = _nodes.get(dtype)
    if node is None or dtype.names is not None or dtype.subdtype is not None:
        node = _describe(dtype, path, 0)
        if isinstance(node, str) and len(_nodes) < _CACHE_MAX:
            _nodes[dtype] = node
    return node


def _describe(dtype: DType, path: str, nesting: int) -> Node:
    if dtype.hasobject:
        raise UnsupportedValue(
            path,
            "NumPy array of "
            + ("strings of any length" if dtype.kind == "T" else "structures with Python objects"),
            hint="Use a list, array.tolist(), or an array with a numeric dtype or strings of "
            "a fixed length.",
        )
    if nesting > _NESTING_MAX:
        raise UnsupportedValue(path, "deeply nested dtype", hint="Flatten its fields.")
    if dtype.subdtype is not None:
        base, shape = cast("tuple[DType, tuple[int, ...]]", dtype.subdtype)
        return {"base": _describe(base, path, nesting + 1), "shape": list(shape)}
    if dtype.names is not None:
        fields: list[Node] = []
        by_name = cast("dict[str, tuple[Any, ...]]", dtype.fields)
        for name in dtype.names:
            inner, offset, *titles = by_name[name]
            title = titles[0] if titles else None
            if not (title is None or isinstance(title, str)):
                raise UnsupportedValue(
                    path, "structured array with a title that is no string", hint="Remove it."
                )
            node = [name, _describe(inner, path, nesting + 1), offset]
            fields.append(node if title is None else [*node, title])
        described: dict[str, Node] = {"fields": fields, "itemsize": dtype.itemsize}
        if dtype.isalignedstruct:
            described["aligned"] = True
        return described
    if not _SIMPLE.fullmatch(dtype.str) or (dtype.kind == "V" and dtype.type is not np.void):
        raise UnsupportedValue(
            path,
            f"NumPy array of dtype {dtype}",
            hint="Convert it to a plain NumPy dtype, e.g. with array.astype(...).",
        )
    return dtype.str


def parse_dtype(node: Node, path: str) -> DType:
    """The dtype of a node. Only what `dtype_node` writes is understood: nothing is
    evaluated. Raises DamagedObject."""
    if isinstance(node, str):
        known = _simple.get(node)
        if known is not None:
            return known
    try:
        dtype = _parse(node, 0)
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise DamagedObject("the tree", f"its dtype is malformed ({error})", leaf=path) from None
    if isinstance(node, str) and len(_simple) < _CACHE_MAX:
        _simple[node] = dtype
    return dtype


def _parse(node: Node, nesting: int) -> DType:
    if nesting > _NESTING_MAX:
        raise ValueError("nested too deeply")
    if isinstance(node, str):
        match = _SIMPLE.fullmatch(node)
        if not match:
            raise ValueError(node[:50])
        return np.dtype(node)
    if not isinstance(node, dict):
        raise ValueError("neither a string nor an object")
    fields = cast(dict[str, Any], node)
    if "base" in fields:
        shape = [_natural(size) for size in fields["shape"]]
        base = _parse(fields["base"], nesting + 1)
        if len(shape) > MAX_DIMENSIONS or prod(shape) * base.itemsize > 1 << 31:
            raise ValueError("its subarray is too large")
        return np.dtype((base, tuple(shape)))
    names: list[str] = []
    formats: list[DType] = []
    offsets: list[int] = []
    titles: list[Any] = []
    size = _natural(fields["itemsize"])
    for field in fields["fields"]:
        name, inner, offset, *title = field
        if not isinstance(name, str) or len(title) > 1 or len(names) > _FIELDS_MAX:
            raise ValueError("a field is malformed")
        dtype = _parse(inner, nesting + 1)
        if _natural(offset) + dtype.itemsize > size:
            raise ValueError("a field lies outside the item")
        names.append(name)
        formats.append(dtype)
        offsets.append(offset)
        titles.append(title[0] if title else None)
    spec: dict[str, Any] = {
        "names": names,
        "formats": formats,
        "offsets": offsets,
        "itemsize": size,
    }
    if any(title is not None for title in titles):
        if not all(title is None or isinstance(title, str) for title in titles):
            raise ValueError("a title is not a string")
        spec["titles"] = titles
    return np.dtype(cast(Any, spec), align=fields.get("aligned") is True)


def _natural(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise ValueError("a size is out of range")
    return value


def stored_dtype(dtype: DType) -> str | None:
    """The safetensors dtype of a leaf of `dtype`; None if stored as raw bytes.

    >>> stored_dtype(np.dtype(">f4")), stored_dtype(np.dtype("U3"))
    ('F32', None)
    """
    if dtype.kind in "mM":
        return "I64"
    return _STORED.get(dtype.str[1:])


def stored_shape(shape: tuple[int, ...], dtype: DType) -> tuple[int, ...]:
    return shape if stored_dtype(dtype) else (*shape, dtype.itemsize)


def in_words(shape: Sequence[int], dtype: DType | str) -> str:
    """As errors say it.

    >>> in_words((4, 2), np.dtype("f4"))
    'float32[4, 2]'
    """
    return f"{dtype}[{', '.join(map(str, shape))}]"


# -- layout -------------------------------------------------------------------


def dense_order(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> list[int] | None:
    """The order of dimensions, outermost first, in which the elements lie without
    gaps; None if there is no such order.

    >>> dense_order((2, 3), (8, 16), 8), dense_order((2, 3), (8, 17), 8)
    ([1, 0], None)
    """
    order = sorted(range(len(shape)), key=lambda d: (-strides[d], -shape[d], d))
    expected = itemsize
    for dimension in reversed(order):
        if shape[dimension] != 1:
            if strides[dimension] != expected:
                return None
            expected *= shape[dimension]
    return order


def byte_span(
    start: int, shape: Sequence[int], strides: Sequence[int], itemsize: int
) -> tuple[int, int]:
    """[low, high): the bytes between which the elements lie whose first is at `start`.

    >>> byte_span(100, (3,), (-8,), 8)
    (84, 108)
    """
    if 0 in shape:
        return start, start
    low = high = start
    for size, stride in zip(shape, strides, strict=True):
        reach = (size - 1) * stride
        if reach < 0:
            low += reach
        else:
            high += reach
    return low, high + itemsize


def raw_view(array: Array) -> Array:
    """`array` as the leaf stores it: raw bytes get a dimension of their own,
    datetimes become integers. Shares memory."""
    if array.dtype.kind in "mM":
        return array.view(array.dtype.byteorder + "i8")
    if stored_dtype(array.dtype) is None:
        if array.dtype.itemsize == 0:
            return np.empty((*array.shape, 0), np.uint8)
        return array[..., None].view(np.uint8)
    return array


class ArraySource:
    """A leaf of an array's elements; see `adapters.LeafSource`."""

    __slots__ = ("_array", "dtype")
    streamed = False

    def __init__(self, array: Array) -> None:
        dtype = stored_dtype(array.dtype)
        self._array = array if dtype and array.dtype.kind not in "mM" else raw_view(array)
        self.dtype = dtype or "U8"

    def become(self, source: LeafSource) -> None:
        """Hold another array from now on (see `sharing`)."""
        if not isinstance(source, ArraySource):
            raise TypeError(source)
        self._array, self.dtype = source._array, source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self._array.shape

    @property
    def nbytes(self) -> int:
        return self._array.nbytes

    def copy_range(self, offset: int, into: memoryview) -> None:
        array = self._array
        little = array.dtype.newbyteorder("<")
        size = array.dtype.itemsize
        if array.flags.c_contiguous and array.dtype == little:
            flat = array.reshape(-1).view(np.uint8)
            np.frombuffer(into, np.uint8)[:] = flat[offset : offset + len(into)]
        elif offset % size == 0 and len(into) % size == 0:
            _copy_elements(array, offset // size, np.frombuffer(into, little))
        else:
            first, last = offset // size, -(-(offset + len(into)) // size)
            whole = np.empty(last - first, little)
            _copy_elements(array, first, whole)
            at = offset - first * size
            np.frombuffer(into, np.uint8)[:] = whole.view(np.uint8)[at : at + len(into)]

    def mark(self) -> object:
        return None  # NumPy counts no changes

    def close(self) -> None: ...


def _copy_elements(array: Array, first: int, into: Array) -> None:
    """Copy `into.size` elements of `array`, in C order, from number `first` on."""
    count = into.size
    if count == 0:
        return
    if first == 0 and count == array.size:
        np.copyto(into.reshape(array.shape), array)
        return
    row = array.size // array.shape[0]
    done = 0
    while done < count:
        index, inside = divmod(first + done, row)
        if inside == 0 and count - done >= row:
            rows = (count - done) // row
            part = into[done : done + rows * row]
            np.copyto(part.reshape(rows, *array.shape[1:]), array[index : index + rows])
            done += rows * row
        else:
            step = min(row - inside, count - done)
            _copy_elements(array[index], inside, into[done : done + step])
            done += step


class BytesSource:
    """A leaf of plain bytes; see `adapters.LeafSource`."""

    dtype = "U8"
    streamed = False

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self._data = memoryview(data)
        self.nbytes = self._data.nbytes
        self.shape: tuple[int, ...] = (self.nbytes,)

    def copy_range(self, offset: int, into: memoryview) -> None:
        into[:] = self._data[offset : offset + len(into)]

    def mark(self) -> object:
        return None

    def close(self) -> None: ...


class MemoryDestination:
    """A leaf's bytes go into a NumPy array, contiguous or not; see `adapters.Destination`.

    With `part`, the array holds that box of the leaf.

    >>> right = np.zeros((2, 1), "<u2")
    >>> to = MemoryDestination(right, part=((0, 1), (2, 1)))
    >>> to.write((0, 0), (1, 2), memoryview(np.array([1, 2], "<u2")).cast("B"))
    >>> right.tolist()
    [[2], [0]]
    """

    __slots__ = ("_array", "part")

    def __init__(self, array: Array, part: Part | None = None) -> None:
        """Raises ValueError if the box has another shape than the array, as it is stored."""
        if part is not None and raw_view(array).shape != tuple(part[1]):
            raise ValueError(f"an array of {array.shape} is no box of {part[1]}")
        self._array = array
        self.part = part

    def write(self, start: Sequence[int], shape: Sequence[int], data: memoryview) -> None:
        array = raw_view(self._array)
        elements = np.frombuffer(data, array.dtype.newbyteorder("<")).reshape(tuple(shape))
        if self.part is None:
            box = slices(start, shape)
        elif (places := meeting(start, shape, self.part)) is not None:
            mine, box = places
            elements = elements[(*mine, ...)]
        else:
            return
        # An index per dimension gives a view of the box; the empty index one of a 0-d array.
        np.copyto(array[(*box, ...)], elements)


def box_destination(
    data: memoryview, dtype: str, start: Sequence[int], shape: Sequence[int]
) -> MemoryDestination:
    """The bytes of a box of a leaf go into `data`, in the box's C order."""
    items = np.frombuffer(data, f"<u{itemsize(dtype)}").reshape(tuple(shape))
    return MemoryDestination(items, part=(tuple(start), tuple(shape)))


class _Memory:
    """Bytes at an address; `keep` owns them."""

    def __init__(self, address: int, nbytes: int, keep: object) -> None:
        self._keep = keep
        self.__array_interface__ = {
            "data": (address, True),
            "shape": (nbytes,),
            "typestr": "|u1",
            "version": 3,
        }


def memory_source(low: int, high: int, keep: object) -> ArraySource:
    """The bytes between two addresses inside one buffer, which `keep` keeps alive."""
    if low == high:
        return ArraySource(np.empty(0, np.uint8))
    return ArraySource(np.asarray(_Memory(low, high - low, keep)))


def scalar_bytes(array: Array) -> bytes:
    """The bytes of a 0-d array. Padding of extended floats is made zero: it is not
    part of the value and would differ from run to run."""
    data = bytearray(array.tobytes())
    if array.dtype.char in "gG" and np.finfo(np.longdouble).nmant == 63:
        size = np.dtype(np.longdouble).itemsize
        for start in range(0, len(data), size):
            data[start + 10 : start + size] = bytes(size - 10)
    return bytes(data)
