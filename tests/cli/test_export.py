"""`holdfast export`: one file that other programs load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import load_model

import holdfast
from holdfast.errors import UsageError
from holdfast.manager import scratch
from tests.cli.conftest import Command, failed, flip, same_error_as_json, tidy


def test_export(run: Path, tmp_path: Path, holdfast_cli: Command) -> None:
    out = tmp_path / "all.safetensors"
    done = holdfast_cli("export", f"{run}@gold", out)
    assert (done.status, done.err) == (0, "")
    assert tidy(done.out, run, out) == (
        "3 tensors of A@200 written to B, 44.2 KB, every byte verified.\n"
    )
    tensors = load_file(out)
    assert sorted(tensors) == ["counts", "model/frozen", "model/w"]
    assert np.array_equal(tensors["model/w"], np.full((8, 4), 200, np.float32))
    assert list(tmp_path.iterdir()) == [run.parent, out] or set(tmp_path.iterdir()) == {
        run.parent,
        out,
    }
    with safe_open(out, "np") as file:
        metadata = file.metadata()
    checkpoint = holdfast_cli("show", f"{run}@gold", "--json").json["checkpoint"]
    assert metadata["format"] == "pt"
    assert json.loads(metadata["holdfast"]) == {
        "ref": checkpoint["ref"],
        "id": checkpoint["id"],
        "step": 200,
        "metrics": {"val_loss": 0.231, "acc": 0.81},
    }


def test_export_json(run: Path, tmp_path: Path, holdfast_cli: Command) -> None:
    out = tmp_path / "x.safetensors"
    value = holdfast_cli("export", run, out, "--only", "model", "--json").json
    assert value["ok"] is True
    assert value["checkpoint"]["step"] == 400
    assert (value["file"], value["nbytes"]) == (str(out), out.stat().st_size)
    assert value["tensors"] == ["w", "frozen"]


def test_a_module_loads_it(tmp_path: Path, holdfast_cli: Command) -> None:
    def build() -> torch.nn.Module:
        model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU(), torch.nn.Linear(3, 3))
        model[2].weight = model[0].weight
        return model

    model = build()
    optimizer = torch.optim.AdamW(model.parameters())
    with holdfast.CheckpointManager(tmp_path / "run") as manager:
        manager.save(1, {"model": model, "optimizer": optimizer, "text": "x" * 9999}).result()
    out = tmp_path / "model.safetensors"
    assert holdfast_cli("export", tmp_path / "run", out, "--only", "model").status == 0
    other = build()
    load_model(other, out)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    assert holdfast_cli("export", tmp_path / "run", tmp_path / "all").status == 0
    assert "text" not in load_file(tmp_path / "all"), "a text is no tensor"


def test_export_does_not_overwrite(run: Path, tmp_path: Path, holdfast_cli: Command) -> None:
    out = tmp_path / "x.safetensors"
    out.write_text("mine")
    assert "exists" in failed(holdfast_cli("export", run, out), 2)
    assert "--force" in same_error_as_json(holdfast_cli, "export", run, out)["hint"]
    assert out.read_text() == "mine"
    assert holdfast_cli("export", run, out, "--force").status == 0
    assert "model/w" in load_file(out)
    assert "is not a file" in failed(holdfast_cli("export", run, tmp_path, "--force"), 2)
    assert holdfast_cli("export", run, tmp_path / "new" / "x").status == 0


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "x"

    def fill(path: Path) -> None:
        path.write_text("ours")
        target.write_text("theirs")

    with pytest.raises(UsageError, match="exists"):
        scratch.write_file(target, fill, replace=False)
    assert target.read_text() == "theirs"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_what_is_not_there(run: Path, tmp_path: Path, holdfast_cli: Command) -> None:
    out = tmp_path / "x"
    error = same_error_as_json(holdfast_cli, "export", run, out, "--only", "modle")
    assert "no tensor below 'modle'" in error["error"]
    assert error["hint"] == "It has tensors below counts, model."
    assert "no checkpoint at step 7" in failed(holdfast_cli("export", f"{run}@7", out), 1)
    assert not out.exists()


def test_a_damaged_checkpoint_leaves_no_file(
    run: Path, tmp_path: Path, holdfast_cli: Command
) -> None:
    for pack in (run / "packs").iterdir():
        flip(pack, pack.stat().st_size - 1)
    assert "is damaged" in failed(holdfast_cli("export", f"{run}@400", tmp_path / "x"), 4)
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]


def test_every_format(tmp_path: Path, holdfast_cli: Command) -> None:
    files = {"config.json": "{}", "adapter_config.json": '{"peft_type": "LORA"}'}
    model = {"q.weight": torch.ones(2, 2)}
    adapter = {"q.lora_A.mine.weight": torch.ones(1, 2), "q.lora_B.mine.weight": torch.ones(2, 1)}
    with holdfast.CheckpointManager(tmp_path / "run") as manager:
        state = {"model": model, "pretrained_files": files, "adapter": adapter}
        manager.save(1, {**state, "words": np.array(["a"]), "when": torch.channels_last}).result()
    run, out = tmp_path / "run", tmp_path / "out"
    for to, options, printed in [
        ("pt", [], "3 tensors of A@1 written to B"),
        ("dcp", [], "3 tensors of A@1 written to B, 2 files"),
        ("hf", [], "1 tensor of A@1 written to B, 2 files"),
        ("peft", ["--only", "adapter"], "2 tensors of A@1 written to B, 2 files"),
        ("safetensors", ["--shard-size", "1GB", "--only", "model"], "1 tensor of A@1 written to B"),
    ]:
        words = ["export", run, out, "--to", to, *options]
        done = holdfast_cli(*words)
        assert (done.status, done.err) == (0, "")
        first, *more = tidy(done.out, run, out).splitlines()
        assert first.startswith(f"{printed}, ")
        assert first.endswith(", every byte verified.")
        odd = ["words: <U1 array", "when: a torch.memory_format"]
        left_out = odd if to in ("pt", "dcp") else []
        lines = ["Left out, for there is no form for it:", *(f"  {line}" for line in left_out)]
        assert more == (lines if left_out else [])
        value = holdfast_cli(*words, "--force", "--json").json
        assert (value["file"], value["format"], value["left_out"]) == (str(out), to, left_out)
        paths = [Path(path) for path in value["files"]]
        assert value["nbytes"] == sum(path.stat().st_size for path in paths)
        assert sorted(paths) == (sorted(out.iterdir()) if out.is_dir() else [out])
        assert int(printed[0]) == len(value["tensors"])
        shutil.rmtree(out) if out.is_dir() else out.unlink()
