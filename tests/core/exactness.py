"""Whether two values are the same: types, bits, order, attributes and aliasing."""

from __future__ import annotations

import dataclasses
import enum
import random
import struct
from collections import OrderedDict, defaultdict, deque
from typing import Any

import msgspec
import numpy as np

from holdfast.core.tree import capture


def assert_exact(one: Any, other: Any, where: str = "value", *, aliasing: bool = True) -> None:
    """Fails with the place of the first difference."""
    _Comparison(aliasing).compare(one, other, where)


class _Comparison:
    def __init__(self, aliasing: bool) -> None:
        self._aliasing = aliasing
        self._pairs: dict[int, int] = {}
        self._keep: list[object] = []

    def _same_object(self, one: Any, other: Any, where: str) -> bool:
        """Aliasing: an object met before must be the same one on the other side."""
        if not self._aliasing:
            return False
        self._keep += [one, other]
        if id(one) in self._pairs:
            assert self._pairs[id(one)] == id(other), f"{where}: aliasing differs"
            return True
        assert id(other) not in self._pairs.values(), f"{where}: two objects became one"
        self._pairs[id(one)] = id(other)
        return False

    def compare(self, one: Any, other: Any, where: str) -> None:
        if not self._aliasing and isinstance(one, dict) and isinstance(other, dict):
            self._pairs_of(one, other, where)  # a live dict keeps its own type
            return
        assert type(one) is type(other), f"{where}: {type(one)} became {type(other)}"
        match one:
            case enum.Enum():
                assert one is other, where
            case np.ndarray():
                if not self._same_object(one, other, where):
                    _array(one, other, where, layout=self._aliasing)
            case np.str_() | np.bytes_():  # as arrays they lose trailing NULs
                assert list(one) == list(other), where
            case np.generic():
                _array(np.asarray(one), np.asarray(other), where)
            case float():
                assert struct.pack(">d", one) == struct.pack(">d", other), where
            case complex():
                self.compare([one.real, one.imag], [other.real, other.imag], where)
            case dict():
                if not self._same_object(one, other, where):
                    self._dict(one, other, where)
            case list() | deque():
                if not self._same_object(one, other, where):
                    self._items(one, other, where)
                    if isinstance(one, deque):
                        assert one.maxlen == other.maxlen, where
            case tuple():
                self._items(one, other, where)
            case set() | frozenset():
                if isinstance(one, frozenset) or not self._same_object(one, other, where):
                    self._items(sorted(one, key=_order), sorted(other, key=_order), where)
            case bytearray():
                self._same_object(one, other, where)
                assert one == other, where
            case slice():
                self._items(
                    (one.start, one.stop, one.step), (other.start, other.stop, other.step), where
                )
            case random.Random():
                assert one.getstate() == other.getstate(), where
            case np.random.Generator():
                self._generator(one.bit_generator, other.bit_generator, where)
            case np.random.BitGenerator():
                self._generator(one, other, where)
            case np.random.RandomState():
                self.compare(one.get_state(legacy=False), other.get_state(legacy=False), where)
            case np.random.SeedSequence():
                self.compare(one.state, other.state, where)
            case _ if dataclasses.is_dataclass(one):
                if not self._same_object(one, other, where):
                    for field in dataclasses.fields(one):
                        name = field.name
                        assert hasattr(one, name) == hasattr(other, name), f"{where}.{name}"
                        if hasattr(one, name):
                            inner = f"{where}.{name}"
                            self.compare(getattr(one, name), getattr(other, name), inner)
                    self.compare(
                        getattr(one, "__dict__", None), getattr(other, "__dict__", None), where
                    )
            case _:
                assert one == other, f"{where}: {one!r} became {other!r}"
                assert repr(one) == repr(other), f"{where}: {one!r} became {other!r}"

    def _generator(self, one: Any, other: Any, where: str) -> None:
        assert type(one) is type(other), where
        if self._same_object(one, other, where):
            return
        self.compare(one.state, other.state, where)
        self.compare(one.seed_seq.state, other.seed_seq.state, where)

    def _items(self, one: Any, other: Any, where: str) -> None:
        assert len(one) == len(other), f"{where}: length {len(one)} became {len(other)}"
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            self.compare(left, right, f"{where}[{index}]")

    def _pairs_of(self, one: Any, other: Any, where: str) -> None:
        self._items(list(one), list(other), f"{where}.keys()")
        self._items(list(one.values()), list(other.values()), f"{where}.values()")

    def _dict(self, one: Any, other: Any, where: str) -> None:
        self._pairs_of(one, other, where)
        if isinstance(one, defaultdict):
            assert one.default_factory is other.default_factory, where
        if isinstance(one, OrderedDict):
            self.compare(one.__dict__, other.__dict__, f"{where}.__dict__")


def _order(item: Any) -> bytes:
    """Any order that does not depend on hashes. In a set, nothing of an item is a leaf."""
    return msgspec.json.encode(capture({"items": {item}}).tree)


def _array(one: np.ndarray, other: np.ndarray, where: str, *, layout: bool = True) -> None:
    assert one.dtype == other.dtype, f"{where}: {one.dtype} became {other.dtype}"
    assert one.dtype.str == other.dtype.str, where
    assert one.dtype.isalignedstruct == other.dtype.isalignedstruct, where
    assert one.shape == other.shape, f"{where}: {one.shape} became {other.shape}"
    if layout and (one.flags.c_contiguous or one.flags.f_contiguous):
        for size, left, right in zip(one.shape, one.strides, other.strides, strict=True):
            assert left == right or size == 1 or one.size == 0, f"{where}: layout"
    left, right = np.ascontiguousarray(one), np.ascontiguousarray(other)
    if one.dtype.char in "gG":  # padding of extended floats is no part of them
        size = np.dtype(np.longdouble).itemsize
        left = np.frombuffer(left.tobytes(), np.uint8).reshape(-1, size)[:, :10]
        right = np.frombuffer(right.tobytes(), np.uint8).reshape(-1, size)[:, :10]
    assert left.tobytes() == right.tobytes(), f"{where}: bits differ"
