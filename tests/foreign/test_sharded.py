"""Models in several files, of safetensors and of PyTorch: every shard against the index."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import holdfast
from holdfast.errors import DamagedObject, UsageError
from holdfast.foreign import is_foreign, open_foreign, shards
from tests.foreign.values import same, values_in

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.arange(4, dtype=torch.bfloat16),
    "c": torch.arange(5),
}


class Model:
    """A folder, as Transformers lays a model out."""

    def __init__(self, folder: Path, stem: str, suffix: str) -> None:
        self.folder = folder
        self.suffix = suffix
        self.first, self.second = (f"{stem}-0000{n}-of-00002{suffix}" for n in (1, 2))
        self.index = folder / f"{stem}{suffix}.index.json"
        folder.mkdir()
        where = {"a": self.first, "b": self.second, "c": self.second}
        for shard in (self.first, self.second):
            self.save({name: TENSORS[name] for name in TENSORS if where[name] == shard}, shard)
        self.write_index(where, {"total_size": sum(tensor.nbytes for tensor in TENSORS.values())})
        (folder / "config.json").write_text("{}")

    def save(self, tensors: dict[str, torch.Tensor], shard: str) -> None:
        if self.suffix == ".safetensors":
            save_file(tensors, self.folder / shard, metadata={"format": "pt"})
        else:
            torch.save(tensors, self.folder / shard)

    def write_index(self, weights: Any, metadata: Any) -> None:
        self.index.write_text(json.dumps({"metadata": metadata, "weight_map": weights}))

    def weights(self) -> Any:
        return json.loads(self.index.read_text())["weight_map"]


def safetensors(tmp_path: Path) -> Model:
    return Model(tmp_path / "model", "model", ".safetensors")


def bins(tmp_path: Path) -> Model:
    return Model(tmp_path / "model", "pytorch_model", ".bin")


@pytest.fixture(params=[safetensors, bins])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Model:
    return request.param(tmp_path)


def test_a_folder_and_its_index_are_one(model: Model) -> None:
    shards = [model.folder / model.first, model.folder / model.second]
    for path in (model.folder, model.index):
        assert is_foreign(str(path))
        with open_foreign(str(path)) as foreign:
            assert foreign.file.kind.endswith(" (sharded)")
            assert foreign.file.nbytes == sum(shard.stat().st_size for shard in shards)
            assert foreign.check() == []
            assert any("that the index names" in text for text in foreign.proof.checked)
        assert same(values_in(path), TENSORS)


def test_without_an_index_all_safetensors_files_are_taken(tmp_path: Path) -> None:
    model = safetensors(tmp_path)
    model.index.unlink()
    assert same(values_in(model.folder), TENSORS)
    with open_foreign(str(model.folder)) as foreign:
        assert foreign.file.notes == ("no index: all of its 2 safetensors files",)
        assert not any("index" in text for text in foreign.proof.checked)
    (model.folder / model.first).unlink()
    with open_foreign(str(model.folder)) as foreign:
        assert foreign.file.kind == "safetensors"


def test_files_of_other_kinds_end_with_bin_too(tmp_path: Path) -> None:
    model = bins(tmp_path)
    torch.save({"lr": 0.1}, model.folder / "optimizer.bin")
    assert same(values_in(model.folder), TENSORS)
    with open_foreign(str(model.folder)) as foreign:
        assert foreign.file.notes == ()
    model.index.unlink()
    assert not is_foreign(str(model.folder))


def test_a_folder_with_both_is_one_of_safetensors(tmp_path: Path) -> None:
    model = bins(tmp_path)
    save_file({"other": torch.ones(2)}, model.folder / "model.safetensors")
    assert list(values_in(model.folder)) == ["other"]
    assert same(values_in(model.index), TENSORS)


def test_equal_names_of_storages_in_two_shards_are_two(tmp_path: Path) -> None:
    """`torch.save` counts storages from 0 in each file; what they share, they share within one."""
    model = bins(tmp_path)
    tied = torch.arange(4.0)
    model.save({"a": torch.arange(6.0).reshape(2, 3)}, model.first)
    model.save({"b": torch.ones(2, 3), "c": tied, "d": tied}, model.second)
    where = {"a": model.first, "b": model.second, "c": model.second, "d": model.second}
    model.write_index(where, {"total_size": 64})
    run = tmp_path / "run"
    done = holdfast.import_checkpoint(str(model.folder), str(run), name="model")
    assert done.tensors == 3
    with holdfast.CheckpointManager(run) as manager:
        found = manager.load()["model"]
    assert torch.equal(found["a"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(found["b"], torch.ones(2, 3))
    assert torch.equal(found["d"], tied)
    assert torch.equal(found["c"], tied)


def lost(model: Model) -> str:
    (model.folder / model.first).unlink()
    return f"the shard '{model.first}' is missing"


def cut(model: Model) -> str:
    path = model.folder / model.second
    path.write_bytes(path.read_bytes()[:-1])
    return f"{model.second}: "


def of_another_kind(model: Model) -> str:
    (model.folder / model.second).write_text("no shard")
    return f"{model.second}: "


def elsewhere(model: Model) -> str:
    model.write_index({**model.weights(), "b": model.first}, {})
    return f"'b' should be in {model.first}, but it is in {model.second}"


def nowhere(model: Model) -> str:
    model.write_index({**model.weights(), "d": model.first}, {})
    return f"'d' should be in {model.first}, but it is in no shard"


def not_listed(model: Model) -> str:
    weights = model.weights()
    del weights["c"]
    model.write_index(weights, {})
    return f"'c', in {model.second}, is not in the index"


def twice(model: Model) -> str:
    model.save({"a": TENSORS["a"], "b": TENSORS["b"]}, model.first)
    return f"'b' is in {model.first} and in {model.second}"


SPOILED = [lost, cut, of_another_kind, elsewhere, nowhere, not_listed, twice]


@pytest.mark.parametrize("spoil", SPOILED)
def test_what_does_not_agree_is_found(model: Model, spoil: Callable[[Model], str]) -> None:
    said = spoil(model)
    with open_foreign(str(model.folder)) as foreign:
        assert any(problem.startswith(said) for problem in foreign.check()), foreign.check()
        with pytest.raises(DamagedObject):
            foreign.tree()


def test_another_total(tmp_path: Path) -> None:
    model = safetensors(tmp_path)
    model.write_index(model.weights(), {"total_size": 7})
    with open_foreign(str(model.folder)) as foreign:
        assert foreign.check() == ["the index says 7 bytes, its tensors have 72"]


def test_a_flipped_bit_in_a_shard_of_pytorch_is_found(tmp_path: Path) -> None:
    model = bins(tmp_path)
    path = model.folder / model.first
    data = bytearray(path.read_bytes())
    data[data.index(TENSORS["a"].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(data)
    with open_foreign(str(model.folder)) as foreign:
        [problem] = foreign.check()
    assert problem.startswith(f"{model.first}: ")
    assert "CRC-32" in problem


def test_code_in_a_shard_is_named_and_not_run(tmp_path: Path) -> None:
    model = bins(tmp_path)
    torch.save({"a": TENSORS["a"], "c": os.getcwd}, model.folder / model.first)
    with open_foreign(str(model.folder)) as foreign:
        assert foreign.file.runs == ("posix.getcwd",)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""])
def test_a_shard_is_in_the_folder(model: Model, name: str) -> None:
    model.write_index({"a": name}, {})
    with pytest.raises(DamagedObject, match="it names a file elsewhere"):
        open_foreign(str(model.folder))


@pytest.mark.parametrize(
    "text", ["", "[]", '{"weight_map": 3}', "[" * 100_000, '{"weight_map":{"a":1}}']
)
def test_a_malformed_index(model: Model, text: str) -> None:
    model.index.write_text(text)
    with pytest.raises(DamagedObject, match="it is no index"):
        open_foreign(str(model.folder))


def test_an_index_longer_than_any(model: Model) -> None:
    with model.index.open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(DamagedObject, match="longer than any"):
        open_foreign(str(model.folder))


def test_two_indexes(model: Model) -> None:
    (model.folder / f"other{model.suffix}.index.json").write_bytes(model.index.read_bytes())
    with pytest.raises(UsageError, match="has 2 indexes"):
        open_foreign(str(model.folder))
    assert same(values_in(model.index), TENSORS)


def test_more_shards_than_can_be_open(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_OPEN_SHARDS", 1)
    assert same(values_in(model.folder), TENSORS)


def test_folders_of_others(tmp_path: Path) -> None:
    assert not is_foreign(str(tmp_path))
    with pytest.raises(UsageError, match="of neither safetensors files"):
        open_foreign(str(tmp_path))
