"""Exports as Transformers and PEFT themselves load them, against what these save."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import holdfast
from holdfast.errors import UsageError
from holdfast.manager import Listing
from tests.support.jobs import fresh_address

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when they are imported
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import peft
import transformers

transformers.logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")

# Transformers 4 saves less where embeddings are tied in part; PEFT 0.17 forgets biases.
OLD = transformers.__version__.startswith("4.")

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 48}
SIZES = {**SMALL, "hidden_size": 8, "intermediate_size": 8}
LLAMA = {**SIZES, "num_key_value_heads": 2, "attention_bias": True}
T5 = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 48}


def files_of(model: Any, folder: Path) -> dict[str, str | bytes]:
    """What a run tracks beside `model`: config and a tokenizer."""
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    words = {"a": 0, "b": 1, "[UNK]": 2}
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run_with(**tracked: Any) -> Listing:
    """A run that has trained the model for a step, and saved."""
    address = fresh_address()
    with holdfast.Run(address, every=1) as run:
        run.track(**tracked)
        for _ in run.range(1):
            pass
    return Listing(address)


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def as_saved(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    same({name: found[name] for name in expected} if OLD else found, expected)


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


# -- Transformers -------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config", "options"),
    [
        ("Llama", {}, LLAMA),
        ("Llama", {"tie_word_embeddings": True}, LLAMA),
        ("GPT2", {}, {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 48}),
        ("Mixtral", {"num_local_experts": 2}, LLAMA),
        ("T5", {}, T5),
        ("T5", {"tie_word_embeddings": False}, T5),
        ("Bert", {}, SIZES),
        ("ViT", {"image_size": 4, "patch_size": 2}, SIZES),
    ],
)
def test_a_model_as_it_was(
    tmp_path: Path, name: str, config: dict[str, Any], options: dict[str, Any]
) -> None:
    kinds = {"T5": "ForConditionalGeneration", "Bert": "ForMaskedLM"}
    kinds |= {"ViT": "ForImageClassification"}
    kind = kinds.get(name, "ForCausalLM" if name != "GPT2" else "LMHeadModel")
    made = getattr(transformers, f"{name}Config")(
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **options, **config
    )
    model = getattr(transformers, name + kind)(made)
    run = run_with(model=model, pretrained_files=files_of(model, tmp_path / "files"))
    done = run.export_as(None, "hf", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").exists()
    loaded, about = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(about.values()), about
    same(loaded.state_dict(), model.state_dict())
    if name not in ("Mixtral", "ViT"):  # renamed since: saved by their older names
        model.save_pretrained(tmp_path / "native")
        as_saved(weights_in(tmp_path / "out"), weights_in(tmp_path / "native"))
    assert set(done.tensors) == weights_in(tmp_path / "out").keys()


def test_an_auto_class_loads_shards_of_another_dtype(tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).bfloat16()
    files = files_of(model, tmp_path / "files")
    config = {**json.loads(files["config.json"]), "dtype": "float32"}  # of when it was loaded
    run = run_with(task={"model": model, "pretrained_files": {**files, "config.json": str(config)}})
    with pytest.raises(UsageError, match=r"config\.json is no JSON"):
        run.export_as(None, "hf", tmp_path / "out")
    (tmp_path / "files" / "config.json").write_text(json.dumps(config))
    options: dict[str, Any] = {"files": tmp_path / "files", "shard_size": 1000}
    done = run.export_as(None, "hf", tmp_path / "out", **options)
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert index in done.files
    native = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert type(native) is type(model)
    same(native.state_dict(), model.state_dict())
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("b").input_ids == [1]
    ours = json.loads(index.read_text())
    # Its own cut of the same tensors, but for the order.
    model.save_pretrained(tmp_path / "native", max_shard_size=1000)
    theirs = json.loads((tmp_path / "native" / index.name).read_text())
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()


# -- PEFT ---------------------------------------------------------------------


def base(**config: Any) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, **config))


def trained(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return model


Q = {"target_modules": ["q_proj", "v_proj"], "r": 2}
KINDS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(**Q),
    "dora": lambda: peft.LoraConfig(**Q, use_dora=True),
    "biases": lambda: peft.LoraConfig(**Q, bias="lora_only"),
    "all biases": lambda: peft.LoraConfig(**Q, bias="all"),
    "a whole module": lambda: peft.LoraConfig(**Q, modules_to_save=["lm_head"]),
    "embeddings": lambda: peft.LoraConfig(target_modules=["q_proj", "embed_tokens"], r=2),
    "head": lambda: peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=2),
    "tokens": lambda: peft.LoraConfig(**Q, trainable_token_indices=[1, 2]),
    "loha": lambda: peft.LoHaConfig(**Q),
    "lokr": lambda: peft.LoKrConfig(**Q),
    "oft": lambda: peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4, r=0),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
}


@pytest.mark.parametrize(
    ("kind", "name"), [*((kind, "default") for kind in KINDS), ("dora", "mine"), ("tokens", "mine")]
)
def test_an_adapter_as_it_was(tmp_path: Path, kind: str, name: str) -> None:
    tied = {"tie_word_embeddings": kind == "tokens"}
    model = trained(peft.get_peft_model(base(**tied), KINDS[kind](), adapter_name=name))
    model.save_pretrained(tmp_path / "native")
    native = tmp_path / "native" / ("" if name == "default" else name)
    files = {
        "adapter_config.json": (native / "adapter_config.json").read_bytes(),
        **files_of(base(), tmp_path / "files"),
    }
    run = run_with(model=model, pretrained_files=files)
    out = tmp_path / "out"
    run.export_as(None, "peft", out)
    as_saved(weights_in(out), weights_in(native))
    assert {"tokenizer.json", "tokenizer_config.json"} < set(os.listdir(out))
    assert "config.json" not in os.listdir(out), "the base model's is beside its weights"
    loaded = peft.PeftModel.from_pretrained(base(**tied), out, adapter_name=name)
    same(loaded.state_dict(), model.state_dict())
    assert transformers.AutoTokenizer.from_pretrained(out)("b").input_ids == [1]


def test_one_of_two_adapters(tmp_path: Path) -> None:
    model = peft.get_peft_model(base(), peft.LoraConfig(**Q))
    model.add_adapter("other", peft.LoraConfig(**{**Q, "r": 3}))
    trained(model).save_pretrained(tmp_path / "native")
    run = run_with(model=model)
    for name, folder in (("default", "native"), ("other", "native/other")):
        out = tmp_path / name
        options: dict[str, Any] = {"files": tmp_path / folder, "adapter": name}
        run.export_as(None, "peft", out, **options)
        same(weights_in(out), weights_in(tmp_path / folder))
        assert set(os.listdir(out)) == {*os.listdir(tmp_path / folder)} - {"other"}
    # As PEFT names them, below one folder.
    configs = {
        name: (tmp_path / "native" / name).read_text()
        for name in ("adapter_config.json", "other/adapter_config.json")
    }
    tracked = run_with(model=model, pretrained_files=configs)
    tracked.export_as(None, "peft", tmp_path / "tracked", adapter="other")
    assert sorted(os.listdir(tmp_path / "tracked")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "tracked", adapter_name="other")
    assert loaded.peft_config["other"].to_dict()["r"] == 3
    alone = run_with(model=model, pretrained_files={"other/adapter_config.json": "{}"})
    with pytest.raises(UsageError, match=r"there is no adapter_config\.json"):
        alone.export_as(None, "peft", tmp_path / "x", adapter="third")
    with pytest.raises(UsageError, match="has 2 adapters: default, other"):
        run.export_as(None, "peft", tmp_path / "x", files=tmp_path / "native")
    with pytest.raises(UsageError, match=r"no adapter_config\.json for 'model'"):
        run.export_as(None, "peft", tmp_path / "x", adapter="other")
    assert not (tmp_path / "x").exists()


def test_an_adapter_without_the_model_around_it(tmp_path: Path) -> None:
    """Injected in a model that is no PeftModel; and an adapter's own state alone."""
    model = peft.get_peft_model(base(), peft.LoraConfig(**Q))
    trained(model).save_pretrained(tmp_path / "native")
    run = run_with(bare=model.base_model.model, own=peft.get_peft_model_state_dict(model))
    for name in ("bare", "own"):
        options: dict[str, Any] = {"files": tmp_path / "native", "only": name}
        run.export_as(None, "peft", tmp_path / name, **options)
        same(weights_in(tmp_path / name), weights_in(tmp_path / "native"))
