"""decode(encode(x)) is x: types, bits, order and aliasing, for the whole universe."""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import pathlib
import random
import struct
import zoneinfo
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from typing import Any

import msgspec
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from holdfast.core.tree import capture
from tests.core.exactness import assert_exact
from tests.core.tree_harness import roundtrip, save


class Color(enum.Enum):
    RED = 1
    DEEP = "a b"


class Bits(enum.Flag):
    A = 1
    B = 2
    C = 4


class Level(enum.IntEnum):
    LOW = 1


Point = namedtuple("Point", "x y")


@dataclasses.dataclass
class Plain:
    a: Any
    b: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    a: Any


@dataclasses.dataclass(slots=True)
class Slotted:
    a: Any


ZONES = st.one_of(
    st.none(),
    st.just(dt.UTC),
    st.sampled_from([zoneinfo.ZoneInfo("Europe/Berlin"), zoneinfo.ZoneInfo("Asia/Tokyo")]),
    st.builds(
        dt.timezone,
        st.timedeltas(dt.timedelta(hours=-23), dt.timedelta(hours=23)),
        st.text(max_size=5),
    ),
)

FLOATS = st.one_of(
    st.floats(),
    st.integers(0, 2**64 - 1).map(lambda bits: struct.unpack(">d", struct.pack(">Q", bits))[0]),
)

TEXT = st.text(alphabet=st.characters(exclude_categories=()), max_size=8)

# Hashable ones, without the NaNs and ints in disguise that make sets ambiguous.
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**200), 2**200),
    FLOATS,
    st.builds(complex, FLOATS, FLOATS),
    TEXT,
    st.text(max_size=3).map(lambda text: text + "é" * 5000),
    st.binary(max_size=8),
    st.binary(max_size=3).map(lambda data: data + bytes(5000)),
    st.sampled_from([Color.RED, Color.DEEP, Bits.A, Bits.A | Bits.C, Bits(0), Level.LOW]),
    TEXT.filter(lambda text: "\0" not in text).map(pathlib.PurePosixPath),
    st.just(pathlib.Path("/data/x")),
    st.just(pathlib.PureWindowsPath("c:\\x")),
    st.datetimes(timezones=ZONES),
    st.builds(lambda at, fold: at.replace(fold=fold), st.datetimes(), st.integers(0, 1)),
    st.dates(),
    st.times(),
    st.timedeltas(),
    ZONES.filter(lambda zone: zone is not None),
    st.builds(range, st.integers(), st.integers(), st.integers(1, 2**70)),
    st.just(...),
)

DTYPES = st.one_of(
    nps.scalar_dtypes(),
    nps.scalar_dtypes().map(lambda dtype: dtype.newbyteorder("S")),
    nps.unicode_string_dtypes(),
    nps.byte_string_dtypes(),
    st.just(np.dtype("V5")),
    st.just(np.dtype(np.longdouble)),
    st.just(np.dtype(np.clongdouble)),
    nps.array_dtypes(allow_subarrays=True, max_size=3),
)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    """Random bits in any dtype, shape and layout."""
    dtype = draw(DTYPES)
    if dtype.subdtype is not None:
        dtype = dtype.base
    shape = draw(nps.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    count = int(np.prod(shape))
    data = bytearray(
        draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    )
    if dtype.itemsize == 0:
        return np.zeros(shape, dtype)
    if dtype.kind == "b":
        data = bytearray(byte & 1 for byte in data)
    if dtype.kind == "U" or dtype.names is not None:  # not every code is a character
        array = np.zeros(shape, dtype)
        if dtype.kind == "U" and count:
            array.reshape(-1)[0] = draw(st.text(max_size=3))
    else:
        array = np.frombuffer(data, dtype).reshape(shape)
    axes = draw(st.permutations(range(len(shape))))
    array = array.transpose(axes)
    if draw(st.booleans()):
        array = np.array(array, order="K")
    if array.ndim and draw(st.booleans()):
        array = array[..., :: draw(st.sampled_from([1, 2, -1]))]
    return array


NUMPY = st.one_of(
    arrays(),
    nps.arrays(nps.scalar_dtypes(), nps.array_shapes(max_dims=3, max_side=30)),
    arrays().filter(lambda array: array.size > 0).map(lambda array: array.reshape(-1)[0]),
    st.text(max_size=3).map(np.str_),
    st.binary(max_size=3).map(np.bytes_),
)

GENERATORS = st.one_of(
    st.integers(0, 9).map(random.Random),
    st.sampled_from(
        [np.random.MT19937, np.random.PCG64, np.random.PCG64DXSM, np.random.Philox, np.random.SFC64]
    ).flatmap(lambda kind: st.integers(0, 9).map(lambda seed: np.random.Generator(kind(seed)))),
    st.integers(0, 9).map(np.random.RandomState),
    st.integers(0, 9).map(lambda seed: np.random.SeedSequence(seed, spawn_key=(1, seed))),
    st.integers(0, 9).map(np.random.Philox),
)


def _hashables(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.lists(children, max_size=3).map(tuple),
        st.frozensets(children, max_size=3),
        st.builds(Point, children, children),
        st.builds(Frozen, children),
    )


KEYS = st.recursive(SCALARS, _hashables, max_leaves=4)


def _counter(pairs: dict[Any, Any]) -> Counter[Any]:
    counter: Counter[Any] = Counter()
    dict.update(counter, pairs)
    return counter


def _containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    dicts = st.dictionaries(KEYS, children, max_size=4)
    factories = st.sampled_from([list, int, dict, float, set, None])
    return st.one_of(
        st.lists(children, max_size=4),
        st.lists(children, max_size=4).map(lambda items: [items, *items, items]),  # aliasing
        st.lists(children, max_size=4).map(tuple),
        dicts,
        dicts.map(OrderedDict),
        dicts.map(_counter),
        st.builds(defaultdict, factories, dicts),
        st.sets(KEYS, max_size=4),
        st.frozensets(KEYS, max_size=4),
        st.builds(
            lambda items, extra: deque(items, None if extra is None else len(items) + extra),
            st.lists(children, max_size=4),
            st.none() | st.integers(0, 3),
        ),
        st.builds(Point, children, children),
        st.builds(Plain, children, children),
        st.builds(Frozen, children),
        st.builds(Slotted, children),
        st.builds(slice, children, children, children),
    )


NUMBERS = st.one_of(
    st.lists(FLOATS, min_size=1, max_size=3).map(lambda items: items * 4097),
    st.lists(st.integers(-(2**64), 2**64), min_size=1, max_size=3).map(lambda items: items * 4097),
)

UNIVERSE = st.recursive(
    st.one_of(SCALARS, NUMPY, GENERATORS, NUMBERS, st.binary(max_size=9).map(bytearray)),
    _containers,
    max_leaves=12,
)


@settings(max_examples=300)
@given(UNIVERSE)
def test_what_is_saved_comes_back_exactly(value: Any) -> None:
    assert_exact(value, roundtrip(value))


@settings(max_examples=100)
@given(UNIVERSE)
def test_the_tree_survives_json_and_is_the_same_every_time(value: Any) -> None:
    tree = capture({"value": value}).tree
    encoded = msgspec.json.encode(tree)
    assert msgspec.json.encode(msgspec.json.decode(encoded)) == encoded
    again = capture({"value": value})
    assert msgspec.json.encode(again.tree) == encoded


@settings(max_examples=100)
@given(UNIVERSE)
def test_a_restored_value_saves_as_the_same_bytes(value: Any) -> None:
    first = save({"value": value})
    second = save(first.restore())
    assert first.json == second.json
    assert first.bytes == second.bytes


@settings(max_examples=100)
@given(st.dictionaries(st.text(max_size=3), UNIVERSE, max_size=4), st.data())
def test_restoring_over_another_state_gives_the_saved_one(
    state: dict[str, Any], data: st.DataObject
) -> None:
    live = {key: data.draw(UNIVERSE) for key in state}
    saved = save(state)
    decoder = saved.decoder()
    decoder.apply(saved.tree, live)
    if decoder.mismatch:  # a generator where the other has something else
        return
    saved.fetch(decoder.requests)
    decoder.run()
    # What was two objects stays two: aliasing is the live side's.
    for key, value in state.items():
        assert_exact(value, live[key], key, aliasing=False)
