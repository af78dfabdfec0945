"""Values of a foreign file as a state that can be saved, or compared with one."""

from __future__ import annotations

from collections import OrderedDict
from math import prod
from typing import Any, Literal, cast

import numpy as np

from holdfast.core import arrays
from holdfast.core.address import some_of
from holdfast.core.given import GivenLeaf, GivenNode
from holdfast.core.plan import ITEMSIZES
from holdfast.core.types import Node
from holdfast.errors import StateError, UsageError
from holdfast.foreign.data import ForeignBytes, ForeignObject, ForeignTensor, Tree
from holdfast.foreign.harmless import TORCH_NAMES
from holdfast.foreign.opened import flat, key_text

Tensors = Literal["torch", "numpy"]

DEFAULT_NAME = "model"
_NUMPY_CODES = {
    **{f"{kind.upper()}{8 * size}": f"<{kind}{size}" for kind in "iu" for size in (2, 4, 8)},
    "I8": "|i1",
    "U8": "|u1",
    "BOOL": "|b1",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
    "C64": "<c8",
    "complex128": "<c16",
}


def below(tree: Tree, only: str, path: str) -> Tree:
    """What is below a path of the file. A key may hold a slash itself."""
    rest = only.strip("/")
    while rest:
        if isinstance(tree, list | tuple):
            tree = dict(enumerate(cast("list[Any]", tree)))
        known = {str(key): item for key, item in tree.items()} if isinstance(tree, dict) else {}
        fitting = [key for key in known if rest == key or rest.startswith(f"{key}/")]
        if not fitting:
            hint = f"It has {some_of(sorted(known))} there." if known else "It has nothing there."
            raise UsageError(f"{path} has nothing at {only!r}", hint=hint)
        key = max(fitting, key=len)
        tree, rest = known[key], rest[len(key) + 1 :]
    return tree


def named(tree: Tree, name: str, only: str) -> dict[str, Tree]:
    """The state: names and what is below them."""
    if name:
        return {name: tree}
    known = cast("dict[Any, Any]", tree) if isinstance(tree, dict) else {}
    if not known or _is_state_dict(known) or not all(isinstance(key, str) for key in known):
        return {only.strip("/").rpartition("/")[2] or DEFAULT_NAME: tree}
    return known


def _is_state_dict(value: Any) -> bool:
    """Whether it is what a module's `state_dict` gives: tensors by name, and nothing else."""
    if not isinstance(value, dict) or not value:
        return False
    items = cast("dict[Any, Any]", value).items()
    return all(
        isinstance(key, str) and (isinstance(item, ForeignTensor) or key.endswith("_extra_state"))
        for key, item in items
    )


class _Source:
    """A tensor of the file, as `adapters.LeafSource`."""

    streamed = True

    def __init__(
        self, tensor: ForeignTensor | ForeignBytes, dtype: str, shape: tuple[int, ...]
    ) -> None:
        self.dtype, self.shape = dtype, shape
        self.nbytes = tensor.nbytes
        self._data = tensor.data

    def copy_range(self, offset: int, into: memoryview) -> None:
        self._data.read(offset, into)

    def mark(self) -> object:
        return None

    def close(self) -> None: ...


class Converter:
    """Foreign trees as a state; keeps count."""

    def __init__(self, tensors: Tensors | None) -> None:
        self._tensors = tensors
        self._made: dict[object, Any] = {}
        """By id of a container, or by what equal tensors share."""
        self._kept: list[object] = []
        self.objects: list[tuple[str, str]] = []
        self.count = 0
        self.nbytes = 0

    def state(self, names: dict[str, Tree]) -> dict[str, Any]:
        """What a save takes."""
        found: dict[str, Any] = {}
        for name, value in names.items():
            if isinstance(value, ForeignObject):
                self.objects.append((name, value.name))
                continue
            try:
                found[name] = self._top(name, value)
            except RecursionError:
                text = f"{name[:200]!r} is nested more deeply than a checkpoint can be"
                raise StateError(text, hint="Take a part of it: --only PATH (only=).") from None
        return found

    def _top(self, name: str, value: Tree) -> Any:
        made = self._of(value, name)
        if not _is_state_dict(value):
            return made
        first = next(iter(cast("dict[str, Any]", value).values()), None)
        if not isinstance(first, ForeignTensor) or self._as_numpy(first):
            return made
        # As a module is saved, so that it restores into one.
        ordered: OrderedDict[str, Any] = OrderedDict(made)
        if versions := getattr(made, "_metadata", None):
            ordered._metadata = versions  # type: ignore[attr-defined]
        return GivenNode({"!": "torch.module", "type": "torch.nn.modules.module:Module"}, ordered)

    def _of(self, value: Tree, path: str) -> Any:
        if isinstance(value, ForeignObject):
            self.objects.append((path, value.name))
            return None
        if isinstance(value, ForeignTensor):
            return self._tensor(value)
        if isinstance(value, ForeignBytes):
            self.nbytes += value.nbytes
            tag = "str" if value.text else "bytes"
            return GivenLeaf({"!": tag}, _Source(value, "U8", (value.nbytes,)))
        if not isinstance(value, dict | list | tuple):
            return cast("object", value)
        key = ("container", id(cast("object", value)))
        if key not in self._made:
            self._kept.append(cast("object", value))
            self._made[key] = self._container(value, path)
        return self._made[key]

    def _container(self, value: Any, path: str) -> Any:
        if not isinstance(value, dict):
            items = cast("list[Any]", value)
            made = [self._of(item, _join(path, str(i))) for i, item in enumerate(items)]
            return tuple(made) if isinstance(value, tuple) else made
        found: dict[Any, Any] = OrderedDict() if isinstance(value, OrderedDict) else {}
        for key, item in cast("dict[Any, Any]", value).items():
            where = _join(path, key_text(key))
            if isinstance(key, ForeignObject):
                self.objects.append((where, key.name))
            elif isinstance(item, ForeignObject):
                self.objects.append((where, item.name))
            else:
                found[key] = self._of(item, where)
        versions = getattr(cast("object", value), "_metadata", None)
        if versions is not None and not any(
            isinstance(v, ForeignObject) for _, v in flat(versions)
        ):
            found._metadata = self._of(versions, path)  # type: ignore[attr-defined]
        return found

    def _as_numpy(self, tensor: ForeignTensor) -> bool:
        if self._tensors == "numpy":
            return tensor.dtype in _NUMPY_CODES or tensor.numpy
        return tensor.numpy and (self._tensors is None or tensor.dtype not in TORCH_NAMES)

    def _tensor(self, tensor: ForeignTensor) -> GivenLeaf:
        key = ("tensor", tensor.same if tensor.same is not None else id(tensor))
        if (known := self._made.get(key)) is not None:
            return known
        self._kept.append(tensor)
        self.count += 1
        self.nbytes += tensor.nbytes
        if self._as_numpy(tensor):
            dtype = np.dtype(_NUMPY_CODES.get(tensor.dtype, tensor.dtype))
            stored = arrays.stored_dtype(dtype) or "U8"
            shape = arrays.stored_shape(tensor.shape, dtype)
            node: dict[str, Node] = {"!": "array", "dtype": dtype.str}
        else:
            stored = tensor.dtype if tensor.dtype in ITEMSIZES else "U8"
            size = tensor.nbytes // max(1, prod(tensor.shape))
            shape = tensor.shape if tensor.dtype in ITEMSIZES else (*tensor.shape, size)
            node = {"!": "torch.tensor", "dtype": TORCH_NAMES[tensor.dtype]}
        made = self._made[key] = GivenLeaf(node, _Source(tensor, stored, shape))
        return made


def _join(path: str, key: str) -> str:
    return f"{path}/{key}" if path else key
