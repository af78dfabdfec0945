"""Files and runs that examples of the help texts name and that are in no snapshot."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import torch
import xgboost
from safetensors.numpy import save_file
from torch.distributed.checkpoint.state_dict_saver import save

import holdfast


def make(folder: Path) -> None:
    weights = {"w": np.ones((8, 4), np.float32), "frozen": np.arange(5000.0)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name, value in (("old", 1.0), ("new", 2.0)):
        torch.save({"state_dict": {"w": torch.full((2, 3), value)}}, folder / f"{name}.pt")
    where = folder / "checkpoints" / "step_400"
    with warnings.catch_warnings():  # it says that there is one process
        warnings.simplefilter("ignore")
        save({"model": {"w": torch.ones(2, 3)}}, checkpoint_id=where, no_dist=True)
    rows = xgboost.DMatrix(np.arange(8.0).reshape(4, 2), label=[0, 1, 0, 1])
    xgboost.train({"max_depth": 1}, rows, 1).save_model(folder / "model.ubj")

    adapter = {"peft_type": "LORA", "r": 1, "target_modules": ["q"]}
    base = folder / "base-model"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "gpt2"}')
    (base / "adapter_config.json").write_text(json.dumps(adapter))
    lora = f"base_model.model.q.lora_{'{}'}.default.weight"
    runs = {
        "tune": {
            "model": {"w": torch.ones(2)},
            "pretrained_files": {"config.json": '{"model_type": "gpt2"}'},
        },
        "lora": {"model": {lora.format(side): torch.ones(1, 1) for side in "AB"}},
        "a": {"model": {"w": torch.ones(2)}},
        "b": {"model": {"w": torch.zeros(2)}},
    }
    for name, state in runs.items():
        with holdfast.CheckpointManager(folder / "runs" / name) as run:
            run.save(1, state, metrics={"val_loss": 0.5}).result()
