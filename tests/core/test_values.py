from __future__ import annotations

import datetime as dt
import enum
import inspect
import pathlib
import struct
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import msgspec
import pytest

from holdfast.core import values
from holdfast.core.tree import capture
from holdfast.errors import DamagedObject, StateError, UnsupportedValue
from tests.core.exactness import assert_exact
from tests.core.tree_harness import roundtrip, save


def tree_of(value: object) -> Any:
    return capture({"v": value}).tree["v"][0][1]


@pytest.mark.parametrize(
    "bits",
    [
        "7ff8000000000000",
        "7ff4000000000001",  # signalling
        "fff8deadbeef0001",
        "8000000000000000",
        "0000000000000001",
        "7ff0000000000000",
        "fff0000000000000",
        "7fefffffffffffff",
    ],
)
def test_floats_keep_their_bits(bits: str) -> None:
    (value,) = struct.unpack(">d", bytes.fromhex(bits))
    assert struct.pack(">d", roundtrip(value)).hex() == bits
    back = roundtrip(complex(value, -value))
    assert struct.pack(">d", back.real).hex() == bits


@pytest.mark.parametrize("value", [1e22, 2.0**53, 2.0**63, 5.0, -7.0, 1e-300])
def test_whole_floats_stay_floats(value: float) -> None:
    assert type(roundtrip(value)) is float
    text = msgspec.json.encode(tree_of(value))
    assert b"." in text or b"e" in text


@pytest.mark.parametrize(
    "value",
    [2**53, 2**53 + 1, -(2**53), -(2**53) - 1, 2**64, -(10**5000), 1 << 100_000],
    ids=lambda value: f"{value.bit_length()} bits",  # str() refuses the longest
)
def test_integers_of_any_size(value: int) -> None:
    assert roundtrip(value) == value
    node = tree_of(value)
    assert (type(node) is int) == (abs(value) <= 2**53)


def test_an_absurd_integer_is_refused_at_save() -> None:
    with pytest.raises(UnsupportedValue, match="bits"):
        capture({"v": 1 << (values.MAX_INT_BITS + 1)})


def test_bool_is_no_int() -> None:
    assert_exact([True, 1, False, 0], roundtrip([True, 1, False, 0]))


@pytest.mark.parametrize(
    "text", ["", "a", "é", "\U0001f600", "\ud800", "\ud83d\ude00", "\0", "\x7f"]
)
@pytest.mark.parametrize("times", [1, 6000])
def test_strings(text: str, times: int) -> None:
    value = text * times
    assert roundtrip(value) == value
    assert roundtrip({value: 1}) == {value: 1}
    assert roundtrip([(value, {value})]) == [(value, {value})]


def test_long_strings_and_bytes_are_leaves() -> None:
    captured = capture({"s": "é" * 5000, "b": bytes(5000), "a": bytearray(5000), "short": "x"})
    assert [leaf.path for leaf in captured.leaves] == ["s", "b", "a"]
    assert captured.leaves[0].source.nbytes == 10000


def test_keys_keep_type_and_order() -> None:
    nan = float("nan")
    state = {0: "int", "0": "str", True: "bool", (1, "a"): "tuple", None: 1, 1.5: 2, nan: 3, b"": 4}
    back = roundtrip(state)
    assert_exact(state, back)
    assert list(map(type, back)) == list(map(type, state))
    # True and 1 are one key to Python; the first one written is kept.
    assert list(map(type, roundtrip({1: "a"}))) == [int]
    assert list(map(type, roundtrip({True: "a"}))) == [bool]


class Mode(enum.Enum):
    TRAIN = "train"
    ODD = (1, 2)


class Flags(enum.Flag):
    A = 1
    B = 2


class Strict(enum.IntFlag):
    X = 4


class Word(enum.StrEnum):
    HELLO = "hello"


@pytest.mark.parametrize(
    "member",
    [Mode.TRAIN, Mode.ODD, Flags.A, Flags.A | Flags.B, Flags(0), Strict.X, Strict(5), Word.HELLO],
)
def test_enums_come_back_as_the_same_member(member: Any) -> None:
    back = roundtrip(member)
    assert type(back) is type(member)
    assert back == member


def test_time_zones_and_folds() -> None:
    from zoneinfo import ZoneInfo

    berlin = ZoneInfo("Europe/Berlin")
    first = dt.datetime(2024, 10, 27, 2, 30, tzinfo=berlin)
    second = first.replace(fold=1)
    back = roundtrip([first, second, dt.time(1, 2, tzinfo=dt.UTC, fold=1)])
    assert [item.fold for item in back] == [0, 1, 1]
    assert back[0].utcoffset() != back[1].utcoffset()
    assert back[0].tzinfo is berlin
    named = dt.timezone(dt.timedelta(hours=1, microseconds=5), "X\ud800")
    assert repr(roundtrip(named)) == repr(named)
    assert roundtrip(dt.UTC) is dt.UTC


def test_an_unknown_time_zone_type_is_refused() -> None:
    class Mine(dt.tzinfo):
        pass

    with pytest.raises(UnsupportedValue, match=r"'v/at'.*Mine"):
        capture({"v": {"at": dt.datetime(2024, 1, 1, tzinfo=Mine())}})


def test_paths_keep_their_kind() -> None:
    paths = [
        pathlib.Path("a/../b"),
        pathlib.PurePosixPath("/x\udc80"),
        pathlib.PureWindowsPath("c:\\x\\y"),
    ]
    back = roundtrip(paths)
    assert back == paths
    assert list(map(type, back)) == list(map(type, paths))


def test_a_windows_path_restored_elsewhere_is_pure() -> None:
    node = {"!": "path", "kind": "windows", "v": "c:\\x"}
    found = values.decode_path(node, "c:\\x", "p")
    assert found == pathlib.PureWindowsPath("c:/x")


def test_ordered_dict_attributes() -> None:
    state = OrderedDict(a=1)
    state._metadata = OrderedDict({"": {"version": 2}, "long": "x" * 5000})  # type: ignore[attr-defined]
    back = roundtrip(state)
    assert_exact(state, back)
    live: Any = OrderedDict(b=2)
    save({"v": state}).restore({"v": live})
    assert_exact(state, live)


def test_containers_keep_their_parameters() -> None:
    state = [
        deque([1, 2], 2),
        deque(maxlen=0),
        deque("ab"),
        defaultdict(list, a=[1]),
        defaultdict(None, a=1),
        Counter(a=-1, b=0),
        frozenset({frozenset(), ()}),
    ]
    back = roundtrip(state)
    assert_exact(state, back)
    assert back[3]["new"] == []


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        ({"!": "int", "v": "12"}, "integer"),
        ({"!": "int", "v": "0x" + "f" * 5_000_000}, "integer"),
        ({"!": "int"}, "integer"),
        ({"!": "float", "bits": "zz"}, "bits"),
        ({"!": "float", "bits": "00" * 9}, "bits"),
        ({"!": "complex", "bits": 3}, "bits"),
        ({"!": "str", "b64": "****"}, "base64"),
        ({"!": "str", "b64": 3}, "not a string"),
        ({"!": "str", "b64": "gA=="}, "UTF-8"),
        ({"!": "datetime", "v": [2024, 13, 1, 0, 0, 0, 0]}, "datetime"),
        ({"!": "datetime", "v": [2024, 1]}, "datetime"),
        ({"!": "datetime", "v": [2024, 1, 1, 0, 0, 0, 0], "fold": 7}, "datetime"),
        ({"!": "datetime", "v": [2024, 1, 1, 0, 0, 0, 0], "zone": {"!": "date"}}, "datetime"),
        ({"!": "datetime", "v": [2024, 1, 1, 0, 0, 0, 0], "zone": 3}, "datetime"),
        ({"!": "timedelta", "v": [10**12, 0, 0]}, "timedelta"),
        ({"!": "timedelta", "v": [1.5, 0, 0]}, "timedelta"),
        ({"!": "timezone", "offset": [5, 0, 0]}, "timezone"),
        ({"!": "zone", "key": "../../etc/passwd"}, "zone"),
        ({"!": "zone", "key": "/etc/passwd"}, "zone"),
        ({"!": "zone", "key": "Nowhere/Land"}, "zone"),
        ({"!": "path", "kind": "mac", "v": "x"}, "path"),
        ({"!": "path", "kind": "posix", "v": 3}, "path"),
        ({"!": "range", "v": [1, 2, 0]}, "bounds"),
        ({"!": "range", "v": [1, 2]}, "bounds"),
        ({"!": "slice", "v": [1, 2]}, "bounds"),
        ({"!": "deque", "v": [1], "maxlen": 0}, "maxlen"),
        ({"!": "deque", "v": [], "maxlen": -1}, "maxlen"),
        ({"!": "deque", "v": [], "maxlen": 1 << 70}, "maxlen"),
        ({"!": "set", "v": [[1]]}, "hashable"),
        ({"!": "set", "v": [1, True]}, "twice"),
        ({"!": "set", "v": {"!": "dict"}}, "items"),
        ({"!": "dict", "v": [["a", 1], ["a", 2]]}, "twice"),
        ({"!": "dict", "v": [["a"]]}, "malformed"),
        ({"!": "dict", "v": [[{"!": "dict", "v": []}, 1]]}, "hashable"),
        ({"!": "dict"}, "items"),
        ({"!": "defaultdict", "v": [], "factory": "eval"}, "factory"),
        ({"!": "odict", "v": [], "attrs": {"!": "dict", "v": [["__class__", 1]]}}, "attributes"),
        ({"!": "dict", "v": [], "attrs": {"!": "dict", "v": []}}, "attributes"),
        ({"!": 3}, "tag"),
        ({}, "tag"),
    ],
)
def test_malformed_nodes_are_refused(node: Any, reason: str) -> None:
    saved = save({"v": 1})
    saved.tree["v"][0][1] = node
    with pytest.raises(DamagedObject, match=reason) as caught:
        saved.restore()
    assert "'v" in str(caught.value)


# -- depth -------------------------------------------------------------------------------


def nested(kind: Any, levels: int) -> Any:
    value: Any = kind(None)
    for _ in range(levels - 1):
        value = kind(value)
    return value


KINDS: dict[str, Any] = {
    "list": lambda inner: [inner],
    "tuple": lambda inner: (inner,),
    "dict": lambda inner: {"k": inner},
    "odict": lambda inner: OrderedDict(k=inner),
    "deque": lambda inner: deque([inner]),
    "frozenset": lambda inner: frozenset([inner]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_deep_structures_up_to_the_limit(kind: str) -> None:
    value = nested(KINDS[kind], values.MAX_DEPTH - 1)  # the state around it is a level too
    assert roundtrip(value) == value
    with pytest.raises(StateError, match="nested deeper than 128"):
        capture({"v": nested(KINDS[kind], values.MAX_DEPTH)})


def test_leaves_at_the_limit() -> None:
    for leaf in (Mode.TRAIN, 2**70, "\ud800", dt.timedelta(1), (1, 2), pathlib.Path("\udc80")):
        inner = [leaf] if not isinstance(leaf, tuple) else leaf
        value = nested(KINDS["list"], values.MAX_DEPTH - 2)
        at = value
        while at[0] is not None:
            at = at[0]
        at[0] = inner
        assert roundtrip(value) == value


def test_depth_is_a_clear_error_on_a_deep_stack_too() -> None:
    value = nested(KINDS["tuple"], values.MAX_DEPTH - 1)
    saved = save({"v": value})

    def deep(levels: int, action: Any) -> Any:
        return action() if levels == 0 else deep(levels - 1, action)

    room = sys.getrecursionlimit() - len(inspect.stack(0)) - 200
    with pytest.raises(StateError, match="nested deeper"):
        deep(room, lambda: capture({"v": value}))
    with pytest.raises(DamagedObject, match="nested too deeply"):
        deep(room, saved.restore)


@pytest.mark.parametrize("levels", [values.MAX_DEPTH + 10, 900, 100_000])
@pytest.mark.parametrize("kind", ["list", "tuple", "object"])
def test_hostile_depth_is_refused(kind: str, levels: int) -> None:
    node: Any = None
    for _ in range(levels):
        node = [node] if kind == "list" else {"!": kind, "type": "a:b", "v": [node]}
    saved = save({"v": 1})
    saved.tree["v"][0][1] = node
    with pytest.raises(DamagedObject, match="nested too deeply"):
        saved.restore()
    while node:  # freed level by level: Python's own deallocation is recursive
        node = node.pop() if isinstance(node, list) else node.pop("v")
