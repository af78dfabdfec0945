"""Folders for Transformers and PEFT, as far as no framework is needed to look at them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from holdfast.errors import StateError, UsageError
from holdfast.manager import CheckpointManager, Listing
from holdfast.manager.peft_names import adapter_names
from tests.support.jobs import fresh_address

CONFIG = '{"model_type": "x", "vocab_size": 7, "dtype": "float64"}'
FILES = {"config.json": CONFIG, "tokenizer.json": b"{}", "chat.jinja": "ü" * 9000}
MODEL = {"embed": np.ones((7, 2)), "norm": np.zeros(2)}


def saved(state: dict[str, Any]) -> Listing:
    address = fresh_address()
    with CheckpointManager(address) as manager:
        manager.save(3, state, metrics={"loss": 0.5}).result()
    return Listing(address)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files_of_the_checkpoint(tmp_path: Path) -> None:
    run = saved({"model": MODEL, "pretrained_files": FILES, "epoch": 2})
    done = run.export_as(None, "hf", tmp_path / "out")
    assert names(tmp_path / "out") == sorted([*FILES, "model.safetensors"])
    assert sorted(done.files) == sorted((tmp_path / "out").iterdir())
    assert (tmp_path / "out" / "config.json").read_text() == CONFIG, "untouched"
    assert (tmp_path / "out" / "chat.jinja").read_text() == FILES["chat.jinja"]
    assert set(done.tensors) == set(MODEL)
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert json.loads(metadata["holdfast"])["step"] == 3


@pytest.mark.parametrize(
    ("state", "only"),
    [
        ({"trainer": {"model": MODEL, "pretrained_files": FILES}, "model": {"no": 1}}, ""),
        ({"trainer": {"model": MODEL, "pretrained_files": FILES}}, "trainer"),
        ({"trainer": {"model": MODEL, "pretrained_files": FILES}}, "trainer/model"),
        ({"a/b": {"net": MODEL}, "pretrained_files": FILES}, "a/b/net"),
        ({"net": MODEL, "hub": {"pretrained_files": FILES}}, "net"),
        ({"one": {"model": MODEL}, "pretrained_files": FILES}, ""),
        ({"one": MODEL, "two": {"model": MODEL, "pretrained_files": FILES}}, "two"),
    ],
)
def test_where_model_and_files_are(tmp_path: Path, state: dict[str, Any], only: str) -> None:
    done = saved(state).export_as(None, "hf", tmp_path / "out", only=only)
    assert set(done.tensors) == set(MODEL)
    assert names(tmp_path / "out") == sorted([*FILES, "model.safetensors"])


def test_what_is_not_there(tmp_path: Path) -> None:
    both = {"model": MODEL, "pretrained_files": FILES}
    for state, only, words, hint in [
        ({"model": MODEL}, "", "no config.json for 'model'", "--files FOLDER"),
        ({"model": MODEL, "pretrained_files": {}}, "", "no config.json", "--files FOLDER"),
        ({"net": MODEL}, "", "has no model", "--only NAME: net"),
        ({"net": MODEL}, "nut", "no model at 'nut'", "It has net"),
        ({"x": both, "y": both}, "", "has 2 models: x/model, y/model", "--only NAME"),
        ({"model": MODEL, "pretrained_files": {"config.json": "{"}}, "", "no JSON", "--files"),
        ({"model": MODEL, "pretrained_files": {"config.json": "[]"}}, "", "no object", "--files"),
        ({"model": MODEL, "pretrained_files": {"config.json": "[" * 10**5}}, "", "JSON", "--files"),
        ({"model": {"x": 1}, "pretrained_files": FILES}, "", "holds no tensor", "--only NAME"),
    ]:
        with pytest.raises(UsageError, match=words) as caught:
            saved(state).export_as(None, "hf", tmp_path / "deep" / "out", only=only)
        assert hint in caught.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["../x", "a/../x", "a//b", "..", ".", "", "/x", "a\\b", "a\nb", "\u202egpj", "x" * 300, 7],
)
def test_hostile_names(tmp_path: Path, name: Any) -> None:
    run = saved({"model": MODEL, "pretrained_files": {**FILES, name: "x"}})
    with pytest.raises(StateError, match="no plain file name") as caught:
        run.export_as(None, "hf", tmp_path / "in" / "out")
    assert "--files FOLDER" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_values_that_are_no_files(tmp_path: Path) -> None:
    run = saved({"model": MODEL, "pretrained_files": {**FILES, "x": np.ones(3)}})
    with pytest.raises(StateError, match="'pretrained_files/x' is not the text of a file"):
        run.export_as(None, "hf", tmp_path / "out")


def test_other_weights_are_never_beside_ours(tmp_path: Path) -> None:
    odd = ["pytorch_model.bin", "model.safetensors", "model.safetensors.index.json", "x.PT"]
    more = {**FILES, **dict.fromkeys(odd, "x"), "adapter_config.json": "{}"}
    templates = {"chat_templates/x.jinja": "x"}
    run = saved({"model": MODEL, "pretrained_files": {**more, **templates}})
    done = run.export_as(None, "hf", tmp_path / "out")
    assert done.left_out == [
        *(f"pretrained_files/{name}: other weights" for name in odd),
        "pretrained_files/chat_templates/x.jinja: in a folder",
    ]
    assert names(tmp_path / "out") == sorted([*FILES, "model.safetensors"])
    base = tmp_path / "base"
    base.mkdir()
    (base / "folder").mkdir()
    for name, text in more.items():
        (base / name).write_text(str(text))
    (base / "linked.txt").symlink_to(base / "tokenizer.json")  # as in the hub's cache
    done = run.export_as(None, "hf", tmp_path / "again", files=base)
    assert done.left_out == []
    assert names(tmp_path / "again") == sorted([*FILES, "linked.txt", "model.safetensors"])
    assert not (tmp_path / "again" / "linked.txt").is_symlink()
    with pytest.raises(UsageError, match="not a folder"):
        run.export_as(None, "hf", tmp_path / "third", files=base / "config.json")


def test_a_folder_of_the_other_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    run = saved({"model": MODEL, "pretrained_files": FILES})
    with pytest.raises(UsageError, match=r"adapter_config\.json would stay there"):
        run.export_as(None, "hf", tmp_path, replace=True)
    assert names(tmp_path) == ["adapter_config.json"]


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        ({}, "dtype", "float16"),
        ({"dtype": "float32"}, "dtype", "float16"),
        ({"torch_dtype": "bfloat16"}, "torch_dtype", "float16"),
        ({"dtype": "float32", "quantization_config": {}}, "dtype", "float32"),
    ],
)
def test_the_config_says_what_the_weights_are(
    tmp_path: Path, config: dict[str, Any], key: str, value: str
) -> None:
    model = {"count": np.arange(3), "w": np.ones(2, np.float16), "v": np.ones(2)}
    files = {"config.json": json.dumps({"inf": float("inf"), **config})}
    run = saved({"model": model, "pretrained_files": files})
    run.export_as(None, "hf", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {"inf": float("inf"), **config, key: value}


@pytest.mark.parametrize(
    ("config", "once"),
    [
        ({"vocab_size": 7}, True),
        ({"vocab_size": 7, "tie_word_embeddings": True}, True),
        ({"text_config": {"vocab_size": 7, "tie_word_embeddings": True}}, True),
        ({"vocab_size": 7, "tie_word_embeddings": False}, False),
        ({"vocab_size": 8}, False),
        ({}, False),
    ],
)
def test_tied_tensors(tmp_path: Path, config: dict[str, Any], once: bool) -> None:
    """Only what the config lets Transformers tie again may be left out."""
    embedding, norm = torch.randn(7, 2), torch.randn(2)
    model = {"embed": embedding, "norm": norm, "head": embedding, "norm2": norm}
    files = {"config.json": json.dumps(config)}
    run = saved({"model": model, "pretrained_files": files})
    run.export_as(None, "hf", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == set(model) - ({"head"} if once else set())
    for name, tensor in found.items():
        assert np.array_equal(tensor, model[name].numpy())


def test_a_model_with_an_adapter_is_no_model(tmp_path: Path) -> None:
    model = {"base_model.model.q.lora_A.default.weight": np.ones((2, 2))}
    run = saved({"model": model, "pretrained_files": FILES})
    with pytest.raises(UsageError, match="with a PEFT adapter") as caught:
        run.export_as(None, "hf", tmp_path / "out")
    assert "--to peft" in caught.value.hint


def test_what_is_no_tensor_is_said(tmp_path: Path) -> None:
    model = {**MODEL, "head": {"w": np.ones(2)}, "_extra_state": "x"}
    run = saved({"model": model, "pretrained_files": FILES})
    done = run.export_as(None, "hf", tmp_path / "out")
    assert set(done.tensors) == {*MODEL, "head.w"}
    assert done.left_out == ["model/_extra_state: no tensor"]


# -- names of adapters --------------------------------------------------------


def test_names_of_one_of_two_adapters() -> None:
    prefix = "base_model.model.layers.0"
    there = [
        f"{prefix}.q.base_layer.weight",
        *(f"{prefix}.q.lora_{x}.{name}.weight" for name in ("default", "lora") for x in "AB"),
        f"{prefix}.q.lora_magnitude_vector.lora.weight",
        f"{prefix}.head.original_module.weight",
        f"{prefix}.head.modules_to_save.lora.weight",
    ]
    config = {"peft_type": "LORA"}
    with pytest.raises(UsageError, match="has 2 adapters: default, lora") as caught:
        adapter_names(there, config)
    assert "--adapter NAME" in caught.value.hint
    assert set(adapter_names(there, config, "default")) == {
        f"{prefix}.q.lora_A.weight",
        f"{prefix}.q.lora_B.weight",
    }
    assert adapter_names(there, config, "lora") == {
        f"{prefix}.q.lora_A.weight": there[3],
        f"{prefix}.q.lora_B.weight": there[4],
        f"{prefix}.q.lora_magnitude_vector": there[5],
        f"{prefix}.head.weight": there[7],
    }
    with pytest.raises(UsageError, match="no adapter 'x'"):
        adapter_names(there, config, "x")


def test_models_without_an_adapter_that_is_known() -> None:
    with pytest.raises(UsageError, match="no tensor of an adapter of kind LORA"):
        adapter_names(["q.weight"], {"peft_type": "LORA"})
    with pytest.raises(UsageError, match="of kind 'PREFIX_TUNING'") as caught:
        adapter_names(["q.weight"], {"peft_type": "PREFIX_TUNING"})
    assert "save_pretrained" in caught.value.hint
