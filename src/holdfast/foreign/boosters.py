"""Models of XGBoost (UBJSON and JSON) and LightGBM (text).

For an import a model is the bytes that its own library loads; to be shown and compared, it
is taken apart into arrays.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any, cast

import msgspec

from holdfast.core.types import MiB
from holdfast.errors import DamagedObject, UnknownFile
from holdfast.foreign import ubjson
from holdfast.foreign.contents import MAX_LEAVES, MAX_VALUES
from holdfast.foreign.data import Computed, ForeignBytes, ForeignTensor, Held, Span, Tree
from holdfast.foreign.described import ForeignFile, ForeignLeaf
from holdfast.foreign.opened import Foreign, Proof, flat, nothing_more
from holdfast.foreign.source import Source

_MAX_TEXT_BYTES = 256 * MiB  # read whole
# A number takes 32 bytes of memory while JSON is parsed, an empty container 64.
_MAX_NUMBERS = 8_000_000
_MAX_CONTAINERS = 1_000_000
_MAX_LINES = 4_000_000
_TEXT = 200
_XGBOOST = Proof(
    (
        "the file is well formed to its end",
        "there are as many trees as it says, and each has as many nodes",
        "children are nodes of their tree",
    ),
    ("the numbers in it: the format has no checksum at all",),
)
_LIGHTGBM = Proof(
    (
        "each tree is as long as tree_sizes says",
        "each tree has as many leaves as it says",
        "the end of the trees is there",
    ),
    ("the numbers in it: the format has no checksum at all",),
)
# The names of XGBoost's arrays of numbers, as its UBJSON types them: a model is then the
# same in both of its formats. Texts of 32-bit floats come back as they were.
_TYPES = {
    **dict.fromkeys(("base_weights", "loss_changes", "split_conditions"), ("f", "F32")),
    **dict.fromkeys(("sum_hessian", "weights", "boosted_weights"), ("f", "F32")),
    **dict.fromkeys(("left_children", "right_children", "parents"), ("i", "I32")),
    **dict.fromkeys(("split_indices", "categories", "categories_nodes"), ("i", "I32")),
    **dict.fromkeys(("feature_segments", "sorted_idx"), ("i", "I32")),
    **dict.fromkeys(("categories_segments", "categories_sizes"), ("q", "I64")),
    **dict.fromkeys(("default_left", "split_type"), ("B", "U8")),
}
_NODES = ("left_children", "right_children", "parents", "split_indices", "split_conditions")


# -- XGBoost --------------------------------------------------------------------


def is_ubjson(head: bytes) -> bool:
    """An object whose first key has a length, as no text starts."""
    return head[:1] == b"{" and head[1:2] in (b"i", b"U", b"I", b"l", b"L") and head[2:3] < b"\x80"


def is_json(head: bytes) -> bool:
    stripped = head.lstrip(b" \t\r\n")
    return stripped[:1] == b"{" and stripped[1:].lstrip(b" \t\r\n")[:1] == b'"'


def describe_xgboost(source: Source, *, text: bool) -> ForeignFile:
    """Raises DamagedObject; UnknownFile for JSON or UBJSON of other makes."""
    model = _read_json(source) if text else ubjson.parse(source)
    if _at(model, "learner", "gradient_booster") is None:
        kind = "JSON" if text else "UBJSON"
        raise UnknownFile(
            f"{source.name} is {kind}, but no model of XGBoost",
            hint="For a model in shards name its folder, or its index: *.safetensors.index.json, "
            "*.bin.index.json.",
        )
    leaves, values = _listed(model)
    kind = f"XGBoost ({'JSON' if text else 'UBJSON'})"
    problems = tuple(dict.fromkeys(_tree_problems(cast("dict[str, Any]", model))))
    return ForeignFile(kind, source.nbytes, leaves, values, problems=problems)


def open_xgboost(source: Source, file: ForeignFile) -> Foreign:
    def content() -> Tree:
        return _read_json(source) if file.kind.endswith("(JSON)") else ubjson.parse(source)

    whole = ForeignBytes(source.nbytes, Span(source, 0, source.nbytes))
    return Foreign(file, _XGBOOST, lambda: whole, nothing_more, content)


def _read_json(source: Source) -> Any:
    data = _whole(source)
    if data.count(b",") > _MAX_NUMBERS or data.count(b"{") + data.count(b"[") > _MAX_CONTAINERS:
        raise UnknownFile(
            f"{source.name} is JSON of too many parts to be looked at",
            hint="Save the model as .ubj, which is read in pieces.",
        )
    try:
        return _with_tensors(msgspec.json.decode(data))
    except (ValueError, RecursionError) as error:
        raise DamagedObject(source.name, f"its JSON is malformed ({error})"[:300]) from None


def _whole(source: Source) -> bytes:
    if source.nbytes > _MAX_TEXT_BYTES:
        raise UnknownFile(f"{source.name} is a text too long to be looked at")
    return source.read(0, source.nbytes)


def _with_tensors(value: Any, name: str = "") -> Any:
    """Lists of numbers as arrays. JSON's own parser bounds the depth."""
    if isinstance(value, dict):
        known = cast("dict[str, Any]", value)
        return {key: _with_tensors(item, key) for key, item in known.items()}
    if not isinstance(value, list):
        return value
    items = cast("list[Any]", value)
    if name in _TYPES and set(map(type, items)) <= {int, float}:
        code, dtype = _TYPES[name]
        try:
            data = Held(array(code, items).tobytes())
        except (OverflowError, TypeError):
            return items
        return ForeignTensor(dtype, (len(items),), data, numpy=True)
    return [_with_tensors(item) for item in items]


def _listed(model: Any) -> tuple[tuple[ForeignLeaf, ...], tuple[tuple[str, str], ...]]:
    leaves: list[ForeignLeaf] = []
    values: list[tuple[str, str]] = []
    for path, value in flat(model):
        if isinstance(value, ForeignTensor):
            if len(leaves) < MAX_LEAVES:
                leaves.append(ForeignLeaf(path, value.dtype, value.shape, value.nbytes))
        elif len(values) < MAX_VALUES and not isinstance(value, list | dict):
            text = f"{value}"
            values.append((path, text if len(text) <= _TEXT else f"{text[:_TEXT]}…"))
    return tuple(leaves), tuple(values)


def _tree_problems(model: dict[str, Any]) -> Iterator[str]:
    booster = _at(model, "learner", "gradient_booster")
    if _at(booster, "name") == "dart":
        booster = _at(booster, "gbtree")
    inner = _at(booster, "model")
    trees = _at(inner, "trees")
    if not isinstance(trees, list):
        return  # gblinear has weights only
    known = cast("list[Any]", trees)
    said = _at(inner, "gbtree_model_param", "num_trees")
    if said != str(len(known)):
        yield f"it says {said} trees, and has {len(known):,}"
    for number, tree in enumerate(known):
        count = _at(tree, "tree_param", "num_nodes")
        for name in _NODES:
            found = _at(tree, name)
            if not isinstance(found, ForeignTensor):
                if found is None or count != str(len(found)):
                    yield f"tree {number}: it has no {name}"
            elif count != str(found.shape[0]):
                yield f"tree {number}: {count} nodes, but {found.shape[0]:,} {name}"
        if isinstance(count, str) and count.isdigit():
            for name in ("left_children", "right_children"):
                found = _at(tree, name)
                if isinstance(found, ForeignTensor) and _outside(found, int(count)):
                    yield f"tree {number}: {name} that are no nodes of it"


def _outside(tensor: ForeignTensor, count: int) -> bool:
    data = bytearray(tensor.nbytes)
    tensor.data.read(0, memoryview(data))
    code = {"I32": "i", "I64": "q"}.get(tensor.dtype)
    return code is None or any(not -1 <= child < count for child in array(code, bytes(data)))


def _at(value: Any, *keys: str) -> Any:
    for key in keys:
        value = cast("dict[str, Any]", value).get(key) if isinstance(value, dict) else None
    return value


# -- LightGBM -------------------------------------------------------------------


def is_lightgbm(head: bytes) -> bool:
    return head.startswith((b"tree\nversion=", b"tree\r\nversion="))


def describe_lightgbm(source: Source) -> ForeignFile:
    """A model that LightGBM wrote as text. Raises DamagedObject."""
    model, problems = _read_lightgbm(source)
    leaves, values = _listed(model)
    return ForeignFile("LightGBM (text)", source.nbytes, leaves, values, problems=tuple(problems))


def open_lightgbm(source: Source, file: ForeignFile) -> Foreign:
    whole = ForeignBytes(source.nbytes, Span(source, 0, source.nbytes), text=True)
    return Foreign(file, _LIGHTGBM, lambda: whole, nothing_more, lambda: _read_lightgbm(source)[0])


def _read_lightgbm(source: Source) -> tuple[dict[str, Any], list[str]]:
    """(the model, what is wrong with it)."""
    data = _whole(source)
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedObject(source.name, f"it is no text ({error})"[:300]) from None
    if data.count(b"\n") > _MAX_LINES:
        raise UnknownFile(f"{source.name} has too many lines to be looked at")
    problems: list[str] = []
    head, mark, rest = data.partition(b"\nTree=0\n")
    model: dict[str, Any] = dict(_settings(head))
    if not mark:
        return model, ["it has no trees"]
    rest = mark[1:] + rest
    body, end, tail = rest.partition(b"\nend of trees\n")
    if not end:
        problems.append("the end of its trees is not there: it is cut off")
    starts = _tree_starts(body)
    sizes = [int(size) for size in head.rpartition(b"tree_sizes=")[2].split() if size.isdigit()]
    lengths = [b - a for a, b in zip(starts, [*starts[1:], len(body) + 1], strict=True)]
    if b"\ntree_sizes=" in head and (
        len(sizes) != len(starts) or sizes[:-1] != lengths[:-1] or sizes[-1] > lengths[-1]
    ):
        problems.append("its trees do not have the lengths that tree_sizes says")
    trees: list[dict[str, Any]] = []
    for number, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        tree = dict(_settings(body[start : start + length]))
        trees.append(tree)
        found = tree.get("leaf_value")
        count = found.shape[0] if isinstance(found, ForeignTensor) else 0 if found is None else 1
        if tree.get("Tree") != str(number) or tree.get("num_leaves") != str(count):
            problems.append(f"tree {number}: {tree.get('num_leaves')} leaves, but {count} values")
    model["trees"] = trees
    model["parameters"] = dict(_parameters(tail))
    return model, problems


def _tree_starts(body: bytes) -> list[int]:
    starts, at = [0], 0
    while (at := body.find(b"\nTree=", at)) >= 0:
        at += 1
        starts.append(at)
    return starts


def _settings(text: bytes) -> Iterator[tuple[str, Any]]:
    """`name=value` of each line; of several numbers an array."""
    for line in text.splitlines():
        name, equals, value = line.partition(b"=")
        if not equals:
            continue
        words = value.count(b" ") + 1
        key = name.decode("utf-8", "replace")
        if words > 1 and not value.translate(None, b"0123456789+-.eEinfa "):
            yield key, ForeignTensor("F64", (words,), Computed(_numbers(value)), numpy=True)
        else:
            yield key, value.decode("utf-8", "replace")


def _numbers(text: bytes) -> Any:
    def make() -> bytes:
        try:
            return array("d", map(float, text.split(b" "))).tobytes()
        except ValueError as error:
            raise DamagedObject("the file", f"what should be a number is none ({error})") from None

    return make


def _parameters(text: bytes) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        if line.startswith(b"[") and line.endswith(b"]"):
            name, _, value = line[1:-1].partition(b": ")
            yield name.decode("utf-8", "replace"), value.decode("utf-8", "replace")
