"""Trees and leaves that no save wrote: an error of ours, bounded work, nothing run."""

from __future__ import annotations

import copy
import json
import tracemalloc
from collections import OrderedDict, deque
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.core.leaves import check_leaf
from holdfast.core.records import Chunk, Leaf
from holdfast.core.tree import Directory, File
from holdfast.errors import DamagedObject, HoldfastError
from tests.core.test_tree_property import Bits, Color, Frozen, Plain, Point
from tests.core.tree_harness import Saved, save

SHARED: list[Any] = [1]
BASE = np.arange(40)

EXAMPLE: dict[str, Any] = {
    "numbers": [1, 2**70, 1.5, float("nan"), 1j, True, None],
    "text": ["a", "\ud800", "x" * 5000, b"b", b"y" * 5000, bytearray(b"c")],
    "keys": {0: 1, (1, "a"): 2, None: 3},
    "containers": [(1, [2]), {1, 2}, frozenset({3}), deque([1], 4), OrderedDict(a=1), range(3)],
    "classes": [Color.RED, Bits.A | Bits.B, Plain(1, [2]), Frozen(3), Point(1, 2)],
    "arrays": [np.arange(6).reshape(2, 3), np.zeros((2, 3), order="F"), np.float32(1)],
    "views": [BASE[:20], BASE[10:30], BASE[35:]],
    "structured": np.zeros(2, [("a", "<i4"), ("b", ">f8", (2,))]),
    "strings": np.array(["ab", "c"]),
    "generators": [np.random.default_rng(1), np.random.RandomState(1), np.random.SeedSequence(1)],
    "shared": [SHARED, SHARED],
    "slice": slice(1, None, 2),
    "history": [0.5] * 5000,
}


def nodes(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every place in the tree."""
    found: list[tuple[Any, Any]] = []
    stack = [tree]
    while stack:
        node = stack.pop()
        entries = node.items() if isinstance(node, dict) else enumerate(node)
        for key, inner in entries:
            found.append((node, key))
            if isinstance(inner, dict | list):
                stack.append(inner)
    return found


SAVED = save(EXAMPLE)


def tamperable() -> Saved:
    """A save whose tree can be changed, without saving again."""
    saved = copy.copy(SAVED)
    saved.tree = msgspec.json.decode(SAVED.json)
    return saved


TAGS = [
    "dict",
    "odict",
    "defaultdict",
    "counter",
    "tuple",
    "namedtuple",
    "dataclass",
    "set",
    "frozenset",
    "deque",
    "range",
    "slice",
    "ellipsis",
    "str",
    "bytes",
    "bytearray",
    "npstr",
    "npbytes",
    "path",
    "enum",
    "object",
    "pickle",
    "random",
    "randomstate",
    "bitgenerator",
    "generator",
    "seedsequence",
    "array",
    "numbers",
    "scalar",
    "file",
    "dir",
    "link",
    "ref",
    "id",
    "int",
    "float",
    "complex",
    "datetime",
    "date",
    "time",
    "timedelta",
    "timezone",
    "zone",
    "torch.nothing",
]
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 3, 2**31, 2**62, 2**63, 2**70, -(2**63), 1.5, 1e300]),
    st.sampled_from(["", "a", "<f4", "|O", "../../x", "/etc", "\0", "os:system", "AAAA", "ff" * 8]),
    st.just([]),
    st.just({}),
    st.lists(st.integers(-2, 2**40), max_size=4),
    st.builds(lambda tag: {"!": tag}, st.sampled_from(TAGS)),
    st.builds(lambda tag, v: {"!": tag, "v": v}, st.sampled_from(TAGS), st.integers()),
    st.builds(
        lambda tag, leaf: {"!": tag, "leaf": leaf, "dtype": "<f8", "mode": 0o600},
        st.sampled_from(TAGS),
        st.integers(-2, 12),
    ),
)


@settings(max_examples=600)
@given(st.data())
def test_a_tampered_tree_gives_an_error_of_ours_or_a_value(data: st.DataObject) -> None:
    saved = tamperable()
    for _ in range(data.draw(st.integers(1, 3))):
        places = nodes(saved.tree)
        if not places:
            break
        container, key = places[data.draw(st.integers(0, len(places) - 1))]
        match data.draw(st.sampled_from(["junk", "delete", "copy", "tag"])):
            case "delete":
                del container[key]
            case "copy":
                other, name = places[data.draw(st.integers(0, len(places) - 1))]
                container[key] = copy.deepcopy(other[name])
            case "tag" if isinstance(container, dict):
                container["!"] = data.draw(st.sampled_from(TAGS))
            case _:
                container[key] = data.draw(JUNK)
    json.dumps(saved.tree)  # what a store can hold
    try:
        saved.restore()
    except HoldfastError:
        pass
    live = copy.deepcopy(EXAMPLE)
    try:
        saved.restore(live, strict=False)
    except HoldfastError:
        pass


# -- leaves -------------------------------------------------------------------------------


def leaf(dtype: str, shape: tuple[int, ...], *chunks: tuple[Any, Any, int]) -> Leaf:
    made = tuple(Chunk(start, size, 0, 0, nbytes, "") for start, size, nbytes in chunks)
    return Leaf("model/w", dtype, shape, made)


@pytest.mark.parametrize(
    "bad",
    [
        leaf("O", (1,), ((0,), (1,), 8)),
        leaf("F32", (1 << 40,), ((0,), (2,), 8)),
        leaf("F32", (2,), ((0,), (2,), 9)),
        leaf("F32", (2,)),
        leaf("F32", (1 << 40, 0)[::-1], ((0,), (2,), 8)),
        leaf("F32", (-2,), ((0,), (-2,), -8)),
        leaf("F32", (-2, -2), ((0, 0), (-2, -2), 16)),
        leaf("F32", (0, 1 << 70)),
        leaf("U8", (1,) * 65, ((0,) * 65, (1,) * 65, 1)),
        leaf("U8", (4,), ((0,), (2,), 2), ((1,), (2,), 2)),
        leaf("U8", (4,), ((2,), (2,), 2), ((2,), (2,), 2)),
        leaf("U8", (4,), ((0,), (4,), 4), ((0,), (0,), 0)),
        leaf("U8", (4,), ((0,), (2,), 2), ((3,), (1,), 1)),
        leaf("U8", (4,), ((0,), (4,), 4), ((0,), (4,), 4)),
        leaf("U8", (2, 2), ((0, 0), (2, 1), 2), ((0, 1), (1, 2), 2)),
        leaf("U8", (2, 2), ((0, 0), (2, 1), 2), ((0, 0), (2, 1), 2)),
        leaf("U8", (2, 2), ((0, 0), (2, 1), 2), ((0, 1), (2, 1), 3)),
        leaf("U8", (4,), ((0, 0), (4,), 4)),
        leaf("U8", (4,), ((), (4,), 4)),
        leaf("U8", (4,), ((-1,), (4,), 4)),
    ],
)
def test_leaves_that_claim_what_is_not_stored(bad: Leaf) -> None:
    with pytest.raises(DamagedObject, match="model/w"):
        check_leaf(bad)


def test_good_leaves() -> None:
    assert check_leaf(leaf("F32", (), ((), (), 4))) == ("F32", ())
    assert check_leaf(leaf("F32", (0, 5))) == ("F32", (0, 5))
    halves = leaf("U8", (2, 2), ((0, 0), (1, 2), 2), ((1, 0), (1, 2), 2))
    assert check_leaf(halves) == ("U8", (2, 2))
    columns = leaf("U8", (2, 2), ((0, 1), (2, 1), 2), ((0, 0), (2, 1), 2))
    assert check_leaf(columns) == ("U8", (2, 2))


@pytest.mark.parametrize("index", [-1, 1, 2**70, 1.0, "0", None, True, [0]])
def test_leaf_numbers_out_of_range(index: Any) -> None:
    saved = save({"v": np.arange(3)})
    saved.tree["v"][0][1]["leaf"] = index
    with pytest.raises(DamagedObject, match="leaf"):
        saved.restore()


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "<f8"},  # the leaf is I64
        {"dtype": "<i4"},
        {"dtype": "<U2"},
        {"order": [0, 1, 2]},
        {"order": [0, 0]},
        {"order": [1]},
        {"order": "10"},
        {"strides": [8], "shape": [6], "offset": 0},
    ],
)
def test_array_nodes_that_do_not_fit_their_leaf(change: Any) -> None:
    saved = save({"v": np.arange(6).reshape(2, 3)})
    saved.tree["v"][0][1].update(change)
    with pytest.raises(DamagedObject):
        saved.restore()


@pytest.mark.parametrize(
    "change",
    [
        {"offset": 8 * 21},
        {"offset": -8},
        {"offset": 1 << 70},
        {"offset": 1.5},
        {"strides": [-8]},
        {"strides": [16]},
        {"strides": [1 << 62]},
        {"strides": [8, 8]},
        {"strides": None},
        {"shape": [31]},
        {"shape": [-1]},
        {"shape": [1 << 62], "strides": [0]},  # 8 bytes that claim to be 2**65
        {"shape": [1 << 32, 1 << 31], "strides": [0, 0]},
        {"shape": [0], "offset": 1 << 40},
        {"shape": [1] * 65, "strides": [0] * 65},
        {"dtype": "<U100"},
    ],
)
def test_views_outside_their_bytes(change: Any) -> None:
    saved = save({"a": BASE[:20], "b": BASE[10:30]})
    saved.tree["v"][1][1].update(change)
    with pytest.raises(DamagedObject):
        saved.restore()


def test_a_claim_of_petabytes_allocates_nothing() -> None:
    saved = save({"v": np.arange(6)})
    saved.leaves[0] = Leaf("v", "I64", (1 << 50,), saved.leaves[0].chunks)
    tracemalloc.start()
    try:
        with pytest.raises(DamagedObject):
            saved.restore()
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


# -- names of files --------------------------------------------------------------------------

FILE = {"!": "file", "leaf": 0, "mode": 0o600}


@pytest.mark.parametrize(
    "entries",
    [
        [["../x", FILE]],
        [["..", FILE]],
        [[".", FILE]],
        [["", FILE]],
        [["/etc/passwd", FILE]],
        [["a/b", FILE]],
        [["a\0b", FILE]],
        [["n" * 256, FILE]],
        [["\ud800", FILE]],
        [[3, FILE]],
        [["a", FILE], ["a", FILE]],
        [["a", {"!": "link", "v": "/etc"}]],
        [["a", {"!": "link", "v": ".."}]],
        [["a", {"!": "link", "v": "b/../.."}]],
        [["a", {"!": "link", "v": ""}]],
        [["a", {"!": "link", "v": "x\0"}]],
        [["a", {"!": "link"}]],
        [["a", {"!": "dict", "v": []}]],
        [["a", {**FILE, "mode": 0o4755}]],
        [["a", {**FILE, "mode": -1}]],
        [["a", {**FILE, "leaf": 7}]],
        [["a", {"!": "dir", "mode": 0o700, "v": [["..", FILE]]}]],
        [["a"]],
        "ab",
    ],
)
def test_hostile_folders_write_nothing(entries: Any, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x")
    saved = save({"d": File(source)})
    saved.tree["v"][0][1] = {"!": "dir", "mode": 0o700, "v": entries}
    target = tmp_path / "box" / "target"
    with pytest.raises(DamagedObject):
        saved.restore({"d": Directory(target)})
    assert not target.parent.exists()
    with pytest.raises(DamagedObject):
        saved.restore()


def test_hostile_folder_depth(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")
    saved = save({"d": File(tmp_path / "x")})
    node: Any = FILE
    for _ in range(500):
        node = {"!": "dir", "mode": 0o700, "v": [["d", node]]}
    saved.tree["v"][0][1] = node
    with pytest.raises(DamagedObject, match="nested"):
        saved.restore({"d": Directory(tmp_path / "t")})
