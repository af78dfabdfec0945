"""The small files that stand beside the weights where `from_pretrained` loads a model."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any


def pretrained_files(model: Any, tokenizer: Any = None) -> dict[str, str | bytes]:
    """Names to contents of what `from_pretrained` needs besides the weights: `config.json`,
    `generation_config.json`, `adapter_config.json` of a PEFT model, and the files of a tokenizer
    or processor. Text is str, all else bytes.

    Track it beside the model, so that `holdfast export --to hf` and `--to peft` write whole
    folders:

        run.track(model=model, pretrained_files=pretrained_files(model, tokenizer))
    """
    with tempfile.TemporaryDirectory(prefix="holdfast-") as folder:
        _write_configs(model, Path(folder))
        if hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(folder)
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): _content(path) for path in paths}


def _write_configs(model: Any, folder: Path) -> None:
    adapters = getattr(model, "peft_config", None)
    if isinstance(adapters, dict) and hasattr(model, "get_base_model"):
        for name, adapter in adapters.items():
            adapter = copy.copy(adapter)
            adapter.inference_mode = True  # as PeftModel.save_pretrained has it
            adapter.save_pretrained(folder if name == "default" else folder / name)
        model = model.get_base_model()
    config: Any = getattr(model, "config", None)
    if hasattr(config, "save_pretrained"):
        config = copy.deepcopy(config)
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
    generation = getattr(model, "generation_config", None)
    if generation is not None and model.can_generate():
        generation.save_pretrained(folder)


def _content(path: Path) -> str | bytes:
    data = path.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data
