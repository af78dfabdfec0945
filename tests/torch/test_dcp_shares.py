"""How shares of ranks become one manifest, without any rank."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from holdfast.core.records import Chunk, Leaf, Manifest, Pack
from holdfast.core.types import Node
from holdfast.errors import StateError
from holdfast.repo.check import check_manifest
from holdfast.torch.dcp.naming import named, selector_of
from holdfast.torch.dcp.shares import Joined, Part, Share, Value, join, moved, own_part

DIGEST = "0" * 64


def rows(rank: int, first: int, count: int) -> Share:
    """Rows of a tensor of 4 x 2, and a value with a leaf and an id."""
    name = f"000001-{'ab' * 8}-{rank}-0"
    pack = Pack(name, 4096 + 8 * count + 5, 1, 4096, DIGEST)
    chunk = Chunk((0, 0), (count, 2), 0, 4096, 8 * count, DIGEST)
    part = Leaf("model/w", "F32", (count, 2), (chunk,))
    text = Leaf(f"own{rank}/text", "U8", (5,), (Chunk((0,), (5,), 0, 4096 + 8 * count, 5, DIGEST),))
    node: Node = {
        "!": "tuple",
        "v": [[{"!": "id", "v": 1}, 3], {"!": "ref", "v": 1}, {"!": "str", "leaf": 0}],
    }
    tensor: dict[str, Node] = {"!": "torch.tensor", "dtype": "float32"}
    return Share(
        parts=(Part(("model", "w"), tensor, moved(part, (4, 2), (first, 0))),),
        values=(Value((f"own{rank}", "text"), node),),
        leaves=(text,),
        packs=(pack,),
    )


def manifest(joined: Joined) -> Manifest:
    more: Any = {"epoch": 1, "nonce": "", "ordinal": 1, "step": 1, "time_s": 0.0, "runtime": None}
    return Manifest(run="r", tree=joined.tree, leaves=joined.leaves, packs=joined.packs, **more)


def test_parts_are_one_leaf_and_values_keep_to_themselves() -> None:
    joined = join([rows(1, 2, 2), rows(0, 0, 2)])
    found = manifest(joined)
    check_manifest(found, "it")
    (leaf,) = [leaf for leaf in found.leaves if leaf.path == "model/w"]
    assert [(chunk.start, chunk.pack) for chunk in leaf.chunks] == [((0, 0), 1), ((2, 0), 0)]
    entries = {one.name: one for one in named(joined.tree)}
    assert entries["model.w"].is_tensor
    for rank, id in ((1, 1), (0, 2)):
        node: Any = entries[f"own{rank}.text"].node
        assert node["v"][:2] == [[{"!": "id", "v": id}, 3], {"!": "ref", "v": id}]
        assert found.leaves[node["v"][2]["leaf"]].path == f"own{rank}/text"


@pytest.mark.parametrize(
    ("shares", "told"),
    [
        ([rows(0, 0, 2)], "4 elements, and it has 8"),
        ([rows(0, 0, 4), rows(1, 2, 2)], "12 elements"),
        ([rows(0, 0, 2), rows(0, 2, 2)], "two ranks have written 'own0/text'"),
    ],
)
def test_what_does_not_fit_is_refused(shares: list[Share], told: str) -> None:
    with pytest.raises(StateError, match=told):
        join(shares)


def test_ranks_that_do_not_agree_are_told() -> None:
    one, other = rows(0, 0, 2), rows(1, 2, 2)
    part = other.parts[0]
    other = replace(other, parts=(replace(part, leaf=replace(part.leaf, dtype="I32")),))
    with pytest.raises(StateError, match="the ranks do not agree about 'model/w'"):
        join([one, other])
    below = Value(("model", "w", "x"), 3)
    with pytest.raises(StateError, match="below"):
        join([one, replace(rows(1, 2, 2), values=(below,))])


def test_each_chunk_is_one_ranks_to_reuse() -> None:
    base = manifest(join([rows(0, 0, 1), rows(1, 1, 3)]))
    boxes = [((0, 0), (2, 2)), ((2, 0), (2, 2))]
    shares = [own_part(base, {"model/w": [box]}, {f"own{n}/text"}) for n, box in enumerate(boxes)]
    kept = [{leaf.path: len(leaf.chunks) for leaf in share.leaves} for share in shares]
    assert kept == [{"model/w": 2, "own0/text": 1}, {"model/w": 0, "own1/text": 1}]


@pytest.mark.parametrize(
    ("id", "meant"),
    [
        (1000, "1000"),
        ("7", "7"),
        ("out/step-7/", "7"),
        ("global_step7", "7"),
        ("Iter7", "7"),
        ("epoch=7", "7"),
        ("model-v7", "model-v7"),
        ("v1.7", "v1.7"),
        ("latest", "latest"),
        ("out/final", "final"),
        ("best:val/loss", "best:val/loss"),
    ],
)
def test_what_checkpoint_ids_mean(id: Any, meant: str) -> None:
    assert str(selector_of(id)) == meant
