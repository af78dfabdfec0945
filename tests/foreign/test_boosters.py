"""Models as XGBoost and LightGBM write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pytest
import xgboost

from holdfast.errors import DamagedObject, UnknownFile
from holdfast.foreign import boosters, open_foreign
from holdfast.foreign.data import ForeignTensor
from holdfast.foreign.opened import flat
from tests.foreign.values import made, same, values_in

RANDOM = np.random.RandomState(0)
ROWS = RANDOM.rand(120, 4)
ROWS[::7, 1] = np.nan
LABELS = (ROWS[:, 0] > 0.5).astype(int)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    data = xgboost.DMatrix(ROWS, LABELS, feature_names=["a", "b", "c", "ü"])
    for name, params in {
        "tree": {"objective": "binary:logistic", "max_depth": 3},
        "dart": {"booster": "dart", "rate_drop": 0.5},
        "linear": {"booster": "gblinear"},
    }.items():
        model = xgboost.train({**params, "nthread": 1}, data, 3)
        model.save_model(folder / f"{name}.ubj")
        model.save_model(folder / f"{name}.json")
    options = {"objective": "binary", "num_leaves": 4, "verbose": -1, "num_threads": 1}
    lightgbm.train(options, lightgbm.Dataset(ROWS, LABELS), 3).save_model(folder / "light.txt")
    return folder


def content(path: Path) -> Any:
    with open_foreign(str(path)) as foreign:
        return made(foreign.compared())


def checked(path: Path) -> list[str]:
    with open_foreign(str(path)) as foreign:
        return foreign.check()


# -- XGBoost --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tree", "dart", "linear"])
def test_a_model_is_the_same_in_both_formats(folder: Path, name: str) -> None:
    first, second = content(folder / f"{name}.ubj"), content(folder / f"{name}.json")
    assert first["learner"].keys() == second["learner"].keys()
    found = [dict(flat(value)) for value in (first, second)]
    assert same(*found)
    assert checked(folder / f"{name}.ubj") == checked(folder / f"{name}.json") == []


def test_arrays_are_those_of_the_model(folder: Path) -> None:
    said = json.loads((folder / "tree.json").read_text())
    trees = said["learner"]["gradient_booster"]["model"]["trees"]
    found = content(folder / "tree.ubj")["learner"]["gradient_booster"]["model"]["trees"]
    for expected, tree in zip(trees, found, strict=True):
        for name in ("left_children", "split_conditions", "base_weights", "split_indices"):
            assert tree[name].tolist() == np.array(expected[name], tree[name].dtype).tolist()


def test_what_is_imported_is_what_xgboost_loads(folder: Path) -> None:
    for name in ("tree.ubj", "tree.json", "dart.ubj"):
        booster = xgboost.Booster(model_file=bytearray(values_in(folder / name)))
        expected = xgboost.Booster(model_file=folder / name)
        names = ["a", "b", "c", "ü"]
        data = xgboost.DMatrix(ROWS, feature_names=names)
        assert booster.predict(data).tobytes() == expected.predict(data).tobytes()


def test_it_is_described(folder: Path) -> None:
    with open_foreign(str(folder / "tree.ubj")) as foreign:
        file = foreign.file
    assert file.kind == "XGBoost (UBJSON)"
    leaves = {leaf.path: leaf.dtype for leaf in file.leaves}
    assert leaves["learner/gradient_booster/model/trees/0/split_conditions"] == "F32"
    assert dict(file.values)["learner/objective/name"] == "binary:logistic"
    assert dict(file.values)["learner/feature_names/3"] == "ü"


def change(model: Any, do: Callable[[Any], None], path: Path) -> Path:
    model = json.loads(json.dumps(model))
    do(model["learner"]["gradient_booster"]["model"])
    path.write_text(json.dumps(model))
    return path


def _fewer(model: Any) -> None:
    model["trees"].pop()


def _shorter(model: Any) -> None:
    model["trees"][1]["left_children"].pop()


def _outside(model: Any) -> None:
    model["trees"][0]["right_children"][0] = 99


def _without(model: Any) -> None:
    del model["trees"][2]["split_indices"]


@pytest.mark.parametrize(
    ("do", "says"),
    [
        (_fewer, "it says 3 trees, and has 2"),
        (_shorter, "tree 1: 9 nodes, but 8 left_children"),
        (_outside, "tree 0: right_children that are no nodes of it"),
        (_without, "tree 2: it has no split_indices"),
    ],
)
def test_trees_that_do_not_fit(
    folder: Path, tmp_path: Path, do: Callable[[Any], None], says: str
) -> None:
    model = json.loads((folder / "tree.json").read_text())
    count = model["learner"]["gradient_booster"]["model"]["trees"][1]["tree_param"]["num_nodes"]
    problems = checked(change(model, do, tmp_path / "x.json"))
    says = says.replace("9 nodes, but 8", f"{count} nodes, but {int(count) - 1}")
    assert says in problems


def test_json_of_others(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text in ('{"a": 1}', '  {"learner": {}}', '{"learner": [1]}'):
        path.write_text(text)
        with pytest.raises(UnknownFile, match="is JSON, but no model of XGBoost"):
            open_foreign(str(path))
    path.write_bytes(b"{i\x01aU\x01}")
    with pytest.raises(UnknownFile, match="is UBJSON, but no model of XGBoost"):
        open_foreign(str(path))


def test_json_too_large_to_be_looked_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boosters, "_MAX_NUMBERS", 10)
    with pytest.raises(UnknownFile, match="JSON of too many parts") as caught:
        open_foreign(str(folder / "tree.json"))
    assert ".ubj" in caught.value.hint
    monkeypatch.setattr(boosters, "_MAX_TEXT_BYTES", 10)
    with pytest.raises(UnknownFile, match="too long to be looked at"):
        open_foreign(str(folder / "tree.json"))


@pytest.mark.parametrize("end", range(2, 600, 23))
def test_a_model_that_is_cut_off(folder: Path, tmp_path: Path, end: int) -> None:
    for name in ("tree.ubj", "tree.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes()[:end])
        with pytest.raises((DamagedObject, UnknownFile)):
            open_foreign(str(tmp_path / name))


# -- LightGBM -------------------------------------------------------------------


def test_a_lightgbm_model(folder: Path) -> None:
    path = folder / "light.txt"
    assert checked(path) == []
    model = lightgbm.Booster(model_file=str(path))
    trees = model.dump_model()["tree_info"]
    found = content(path)
    assert len(found["trees"]) == len(trees) == 3
    assert found["objective"] == "binary sigmoid:1"
    assert found["parameters"]["num_leaves"] == "4"

    def values(node: Any) -> list[float]:
        if "leaf_value" in node:
            return [node["leaf_value"]]
        return values(node["left_child"]) + values(node["right_child"])

    for tree, expected in zip(found["trees"], trees, strict=True):
        assert sorted(tree["leaf_value"]) == sorted(values(expected["tree_structure"]))


def test_what_is_imported_is_what_lightgbm_loads(folder: Path) -> None:
    text = values_in(folder / "light.txt").decode()
    found = lightgbm.Booster(model_str=text).predict(ROWS)
    expected = lightgbm.Booster(model_file=str(folder / "light.txt")).predict(ROWS)
    assert same(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("leaf_value=", "leaf_value=7 ", "its trees do not have the lengths"),
        ("\nend of trees\n", "\n", "the end of its trees is not there"),
        ("num_leaves=4\n", "num_leaves=5\n", "tree 0: 5 leaves, but 4 values"),
        ("\nTree=1\n", "\nTree=2\n", "tree 1:"),
    ],
)
def test_trees_of_other_lengths(
    folder: Path, tmp_path: Path, before: str, after: str, says: str
) -> None:
    text = (folder / "light.txt").read_text()
    assert before in text
    path = tmp_path / "light.txt"
    path.write_text(text.replace(before, after, 1))
    assert any(problem.startswith(says) for problem in checked(path)), checked(path)


def test_a_number_that_is_none(folder: Path, tmp_path: Path) -> None:
    text = (folder / "light.txt").read_text()
    path = tmp_path / "light.txt"
    path.write_text(text.replace("internal_value=", "internal_value=1.2.3 ", 1))
    with open_foreign(str(path)) as foreign:
        tensor = foreign.compared()["trees"][0]["internal_value"]
        assert isinstance(tensor, ForeignTensor)
        with pytest.raises(DamagedObject, match="should be a number"):
            tensor.data.read(0, memoryview(bytearray(8)))
    path.write_bytes(b"tree\nversion=v4\n\xff\xfe")
    with pytest.raises(DamagedObject, match="it is no text"):
        open_foreign(str(path))
