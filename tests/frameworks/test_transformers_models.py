"""LoRA by PEFT, and the files that `from_pretrained` needs beside the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

import holdfast
from holdfast.transformers import pretrained_files
from tests.support.jobs import fresh_address
from tests.support.tiny_transformers import LENGTH, WORDS, Leaving, tiny_model, train

# PEFT asks a model for an old name of an attribute.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


def adapted(width: int = 16) -> Any:
    base = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=WORDS,
            n_positions=2 * LENGTH,
            n_embd=width,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    return get_peft_model(
        base, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    )


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w0")


def test_an_adapter_killed_anywhere() -> None:
    address = fresh_address()
    leaving = Leaving(address)
    whole = train(address, leaving, model=adapted)
    for left in leaving.left[1::3]:
        assert train(left, model=adapted) == whole


def test_only_the_adapter_is_written_again(tmp_path: Path) -> None:
    address = str(tmp_path / "run")
    train(address, run={"keep": None}, model=lambda: adapted(width=128))
    with holdfast.CheckpointManager(address) as manager:
        infos = manager.checkpoints()
        state = manager.load()["trainer"]
        model = {name: state["model"][name] for name in state["model"]}
    sizes = {name: value.nbytes for name, value in model.items()}
    adapter = sum(size for name, size in sizes.items() if "lora_" in name)
    base = sum(sizes.values()) - adapter
    assert base > 50 * adapter
    assert infos[0].new_bytes > base
    for info in infos[1:]:
        # The weights, two moments each, and the rest: counters, random states, the log.
        assert info.new_bytes < 3 * adapter + 65_536 < base / 10


def test_a_checkpoint_has_all_that_from_pretrained_needs(tmp_path: Path) -> None:
    address = fresh_address()
    words = tokenizer()
    train(address, options={"processing_class": words})
    state = holdfast.open(address)["trainer"]
    folder = write(tmp_path, state["pretrained_files"])
    model = {name: torch.as_tensor(state["model"][name]) for name in state["model"]}
    save_file(
        {k: v.clone() for k, v in model.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded).__name__ == "GPT2LMHeadModel"
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model[name])
    assert (
        AutoTokenizer.from_pretrained(folder)("w3 w7")["input_ids"] == words("w3 w7")["input_ids"]
    )
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= set(
        state["pretrained_files"]
    )


def test_files_of_an_adapter(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("second", LoraConfig(r=1, target_modules=["c_proj"], fan_in_fan_out=True))
    files = pretrained_files(model)
    assert set(files) == {
        *("adapter_config.json", "second/adapter_config.json"),
        *("config.json", "generation_config.json"),
    }
    folder = write(tmp_path, files)
    assert AutoConfig.from_pretrained(folder).n_embd == 16
    weights = {
        name.replace(".default", ""): value
        for name, value in model.state_dict().items()
        if "lora_" in name and ".default" in name
    }
    save_file(weights, folder / "adapter_model.safetensors")
    again: Any = PeftModel.from_pretrained(tiny_model(), folder)
    assert again.peft_config["default"].r == 2
    for name, value in again.state_dict().items():
        if "lora_" in name:
            assert torch.equal(value, model.state_dict()[name])


def test_models_of_no_library_have_no_files() -> None:
    assert pretrained_files(torch.nn.Linear(1, 1)) == {}


def write(folder: Path, files: Any) -> Path:
    for name in files:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        content = files[name]
        path.write_bytes(content.encode() if isinstance(content, str) else bytes(content))
    return folder
