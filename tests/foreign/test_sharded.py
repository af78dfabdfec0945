"""safetensors in several files: every shard against the index."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from holdfast.errors import DamagedObject, UsageError
from holdfast.foreign import is_foreign, open_arrays, open_foreign
from tests.foreign.values import same, values_in

INDEX = "model.safetensors.index.json"
NAMES = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.arange(4, dtype=torch.bfloat16),
    "c": torch.arange(5),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As Transformers lays a model out."""
    folder = tmp_path / "model"
    folder.mkdir()
    where = {"a": NAMES[0], "b": NAMES[1], "c": NAMES[1]}
    for shard in NAMES:
        part = {name: TENSORS[name] for name in TENSORS if where[name] == shard}
        save_file(part, folder / shard, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in TENSORS.values())
    write_index(folder, where, {"total_size": total})
    (folder / "config.json").write_text("{}")
    return folder


def write_index(folder: Path, weights: Any, metadata: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": weights}))


def index(folder: Path) -> Any:
    return json.loads((folder / INDEX).read_text())


def test_a_folder_and_its_index_are_one(folder: Path) -> None:
    for path in (folder, folder / INDEX):
        assert is_foreign(str(path))
        with open_foreign(str(path)) as foreign:
            assert foreign.file.kind == "safetensors (sharded)"
            assert foreign.file.nbytes == sum((folder / n).stat().st_size for n in NAMES)
            assert foreign.check() == []
        assert same(values_in(path), TENSORS)


def test_without_an_index_all_files_are_taken(folder: Path) -> None:
    (folder / INDEX).unlink()
    assert same(values_in(folder), TENSORS)
    with open_foreign(str(folder)) as foreign:
        assert foreign.file.notes == ("no index: all of its 2 safetensors files",)
    (folder / NAMES[0]).unlink()
    with open_foreign(str(folder)) as foreign:
        assert foreign.file.kind == "safetensors"


def lost(folder: Path) -> str:
    (folder / NAMES[0]).unlink()
    return f"the shard '{NAMES[0]}' is missing"


def cut(folder: Path) -> str:
    path = folder / NAMES[1]
    path.write_bytes(path.read_bytes()[:-1])
    return f"{NAMES[1]}: its bytes are outside the file"


def elsewhere(folder: Path) -> str:
    value = index(folder)
    value["weight_map"]["b"] = NAMES[0]
    write_index(folder, value["weight_map"], value["metadata"])
    return f"'b' should be in {NAMES[0]}, but it is in {NAMES[1]}"


def nowhere(folder: Path) -> str:
    value = index(folder)
    write_index(folder, {**value["weight_map"], "d": NAMES[0]}, value["metadata"])
    return f"'d' should be in {NAMES[0]}, but it is in no shard"


def not_listed(folder: Path) -> str:
    value = index(folder)
    del value["weight_map"]["c"]
    write_index(folder, value["weight_map"], value["metadata"])
    return f"'c', in {NAMES[1]}, is not in the index"


def twice(folder: Path) -> str:
    save_file({"a": TENSORS["a"], "b": TENSORS["b"]}, folder / NAMES[0])
    return f"'b' is in {NAMES[0]} and in {NAMES[1]}"


def another_total(folder: Path) -> str:
    write_index(folder, index(folder)["weight_map"], {"total_size": 7})
    return "the index says 7 bytes, its tensors have 72"


@pytest.mark.parametrize("spoil", [lost, cut, elsewhere, nowhere, not_listed, twice, another_total])
def test_what_does_not_agree_is_found(folder: Path, spoil: Callable[[Path], str]) -> None:
    said = spoil(folder)
    with open_foreign(str(folder)) as foreign:
        assert any(problem.startswith(said) for problem in foreign.check()), foreign.check()
        with pytest.raises(DamagedObject):
            foreign.tree()


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""])
def test_a_shard_is_in_the_folder(folder: Path, name: str) -> None:
    write_index(folder, {"a": name}, {})
    with pytest.raises(DamagedObject, match="it names a file elsewhere"):
        open_foreign(str(folder))


@pytest.mark.parametrize(
    "text", ["", "[]", '{"weight_map": 3}', "[" * 100_000, '{"weight_map":{"a":1}}']
)
def test_a_malformed_index(folder: Path, text: str) -> None:
    (folder / INDEX).write_text(text)
    with pytest.raises(DamagedObject, match="it is no index"):
        open_foreign(str(folder))


def test_an_index_longer_than_any(folder: Path) -> None:
    with (folder / INDEX).open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(DamagedObject, match="longer than any"):
        open_foreign(str(folder))


def test_two_indexes(folder: Path) -> None:
    (folder / "other.safetensors.index.json").write_bytes((folder / INDEX).read_bytes())
    with pytest.raises(UsageError, match="has 2 indexes"):
        open_foreign(str(folder))
    assert same(values_in(folder / INDEX), TENSORS)


def test_more_shards_than_can_be_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_arrays, "_OPEN_SHARDS", 1)
    assert same(values_in(folder), TENSORS)


def test_folders_of_others(tmp_path: Path) -> None:
    assert not is_foreign(str(tmp_path))
    with pytest.raises(UsageError, match="of neither safetensors files"):
        open_foreign(str(tmp_path))
