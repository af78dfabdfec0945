"""`show` reads a tree without decoding it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.cli import nodes
from holdfast.cli.show import checkpoint_text
from holdfast.core.records import Chunk, Leaf, Manifest
from tests.cli.test_render import HOSTILE, info

LEAVES = (
    Leaf("model/w", "F32", (2, 3), (Chunk((0, 0), (2, 3), 0, 0, 24, "d"),)),
    Leaf("model/b", "BF16", (4,), (Chunk((0,), (4,), 0, 24, 8, "d"),)),
    Leaf("~/rng", "U8", (10,), (Chunk((0,), (10,), 0, 32, 10, "d"),)),
)


def array(leaf: int) -> dict[str, Any]:
    return {"!": "array", "leaf": leaf, "dtype": "f4"}


def pairs(**items: Any) -> dict[str, Any]:
    return {"!": "dict", "v": [[key, value] for key, value in items.items()]}


def manifest(tree: Any, runtime: Any = None, **fields: Any) -> Manifest:
    return Manifest(
        run="r",
        epoch=1,
        nonce="n",
        ordinal=1,
        step=7,
        time_s=0.0,
        tree=tree,
        runtime=pairs() if runtime is None else runtime,
        leaves=LEAVES,
        packs=(),
        **fields,
    )


def test_parts() -> None:
    tree = pairs(
        model={
            "!": "object",
            "type": "m.M",
            "v": pairs(w=array(0), deep=[{"!": "x", "a": array(1)}]),
        },
        tied=array(0),
        epoch=3,
        names=["a", "b"],
    )
    model, tied, epoch, names = nodes.parts(manifest(tree))
    assert (model.name, model.leaves, model.nbytes) == ("model", 2, 32)
    assert model.dtypes == ("BF16", "F32")
    assert (tied.leaves, tied.nbytes) == (0, 0), "counted where it is first"
    assert (epoch.leaves, epoch.value) == (0, 3)
    assert names.value == ["a", "b"]
    assert [leaf.path for leaf in nodes.state_leaves(manifest(tree))] == ["model/w", "model/b"]


@pytest.mark.parametrize(
    ("node", "text"),
    [
        (None, None),
        (1.5, 1.5),
        ([1, "a"], [1, "a"]),
        ({"!": "int", "v": "0xffffffffffffffffff"}, "0xffffffffffffffffff"),
        ({"!": "float", "bits": "7ff8000000000000"}, "nan"),
        ({"!": "float", "bits": "zz"}, "<float>"),
        ({"!": "tuple", "v": [1, 2]}, [1, 2]),
        (pairs(a=1), {"a": 1}),
        ({"!": "dict", "v": [[0, "int"], ["0", "str"]]}, {"[0]": "int", "0": "str"}),
        ({"!": "namedtuple", "type": "m.P", "fields": ["x", "y"], "v": [1, 2]}, {"x": 1, "y": 2}),
        ({"!": "object", "type": "m.M", "v": pairs(a=1)}, {"a": 1}),
        (array(0), "<F32[2, 3]>"),
        (array(99), "<array>"),
        ({"!": "pickle", "type": "m.P", "b64": "gA=="}, "<pickle m.P>"),
        ({"!": "path", "v": "/data"}, "<path /data>"),
        ({"!": "ellipsis"}, "<ellipsis>"),
        ({}, "<None>"),
        ({"!": "dict", "v": [["a"], 3, ["b", 1]]}, {"b": 1}),
    ],
)
def test_plain(node: Any, text: Any) -> None:
    assert nodes.plain(node, LEAVES) == text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["!", "v", "leaf", "type", "bits", "fields", "x"]), inner)
    ),
    max_leaves=20,
)


@given(JSON, JSON)
def test_any_tree_can_be_shown(tree: Any, runtime: Any) -> None:
    for node in (tree, pairs(a=tree)):
        page = checkpoint_text(info(7), manifest(node, pairs(loop=runtime)), 0.0, with_leaves=True)
        assert all(line.isprintable() for line in page.split("\n"))


def test_deep_trees_are_no_problem() -> None:
    node: Any = array(0)
    for _ in range(5000):
        node = [node]
    [part] = nodes.parts(manifest(pairs(deep=node)))
    assert part.leaves == 1
    node = 1
    for _ in range(5000):
        node = [node]
    [part] = nodes.parts(manifest(pairs(deep=node)))
    assert "<…>" in str(part.value)


def test_flat() -> None:
    value = {"lr": 0.1, "data": {"seed": None, "dirs": ["a", "b"]}, "on": True, "l": [{"x": 1}]}
    assert list(nodes.flat(value)) == [
        ("lr", "0.1"),
        ("data.seed", "none"),
        ("data.dirs", "a, b"),
        ("on", "yes"),
        ("l[0].x", "1"),
    ]
    assert list(nodes.flat(3)) == [("", "3")]
    assert list(nodes.flat(list(range(9)))) == [("", "0, 1, 2, 3, 4, 5, 6, 7, 8")]
    losses = [("", "2.294, 2.294, 2.294, 2.294, 2.294, 2.294, 2.294, 2.294, … (9,999 in all)")]
    assert list(nodes.flat([2.29443097114563] * 9999)) == losses
    assert list(nodes.flat(list(range(1410)))) == [("", "0, 1, 2, 3, 4, 5, 6, 7, … (1,410 in all)")]


def test_page_shows_hostile_names_as_escapes() -> None:
    tree = {"!": "dict", "v": [[HOSTILE, array(0)], ["value", HOSTILE]]}
    page = checkpoint_text(
        info(7, tags=(HOSTILE,), note=HOSTILE, metrics={HOSTILE: 1.0}),
        manifest(
            tree,
            config={HOSTILE: HOSTILE},
            environment={"argv": [HOSTILE]},
            runtime=pairs(loop=pairs(frames=[pairs(kind=HOSTILE, completed=HOSTILE)])),
        ),
        0.0,
        with_leaves=True,
    )
    assert all(line.isprintable() for line in page.split("\n"))
    assert r"\x1b[31m" in page


def test_loops() -> None:
    position = {
        "position": {
            "version": 1,
            "frames": [
                {"kind": "epochs", "name": "", "limit": 20, "completed": 3, "phase": "body"},
                {
                    "kind": "batches",
                    "name": "train",
                    "limit": None,
                    "completed": 5,
                    "phase": "tail",
                },
            ],
        }
    }
    assert nodes.loops(position) == [
        "epochs: 3 of 20 done",
        "batches train: 5 done, end of the body pending",
    ]
    over = [{"kind": "epochs", "limit": 20, "completed": 20}]
    assert nodes.loops({"frames": [], "done": over}) == ["epochs: 20 of 20 done"]
    for none in (None, 3, {}, {"frames": []}, {"frames": [1]}, {"frames": {"a": 1}}):
        assert nodes.loops(none) == []
