"""Safetensors in several files, and tensors that share memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

from holdfast.errors import DamagedObject, UsageError
from holdfast.manager import CheckpointManager, Listing
from tests.support.jobs import fresh_address


def saved(state: dict[str, Any]) -> str:
    address = fresh_address()
    with CheckpointManager(address) as manager:
        manager.save(1, state).result()
    return address


def test_shards_and_their_index(tmp_path: Path) -> None:
    model = {f"layer.{n}": np.full(100, n, np.float32) for n in range(5)}
    out = tmp_path / "out"
    with Listing(saved({"model": model})) as run:
        done = run.export_as(None, "safetensors", out, only="model", shard_size=1000)
        names = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert [path.name for path in done.files] == [*names, "model.safetensors.index.json"]
        assert sorted(done.files) == sorted(out.iterdir())
        assert done.nbytes == sum(path.stat().st_size for path in out.iterdir())
        assert index["metadata"] == {"total_size": 2000}
        assert index["weight_map"] == {f"layer.{n}": names[n // 2] for n in range(5)}
        for name, file in index["weight_map"].items():
            assert np.array_equal(load_file(out / file)[name], model[name])

        whole = run.export_as(None, "safetensors", tmp_path / "one", shard_size="5GB")
        assert [path.name for path in whole.files] == ["model.safetensors"]


def test_weights_that_would_be_loaded_instead_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Listing(saved({"a": np.arange(300.0), "b": np.arange(300.0) + 1})) as run:
        run.export_as(None, "safetensors", out, shard_size="1GB")
        (out / "notes.txt").write_text("mine")
        with pytest.raises(UsageError, match="not empty"):
            run.export_as(None, "safetensors", out, shard_size="1GB")
        with pytest.raises(UsageError, match=r"model\.safetensors would stay there"):
            run.export_as(None, "safetensors", out, shard_size=2500, replace=True)
        run.export_as(None, "safetensors", out, shard_size="1GB", replace=True)
    assert sorted(path.name for path in out.iterdir()) == ["model.safetensors", "notes.txt"]


def test_tensors_that_share_memory_are_themselves(tmp_path: Path) -> None:
    # With a seed: the halves of some numbers are NaNs, which equal nothing.
    flat = torch.randn(3_000_000, generator=torch.Generator().manual_seed(1))
    state: dict[str, Any] = {
        "rows": flat[:2_400_000].view(3, 800_000),
        "columns": flat[10:1_200_010].view(1000, 1200).t(),
        "tied": flat[10:1_200_010].view(1000, 1200).t(),
        "half": flat.view(torch.bfloat16)[7:20],
        "wide": flat[:400].view(torch.complex64)[3:9],
        "every_other": flat[::2],
    }
    array = np.arange(100, dtype=np.int16)
    state |= {"reversed": array[::-1], "apart": array[10:20], "rare": torch.zeros(9)}
    with Listing(saved(state)) as run:
        done = run.export_as(None, "safetensors", tmp_path / "x")
    found = load_torch(tmp_path / "x")
    assert sorted(done.tensors) == sorted(found) == sorted(set(state) - {"tied"})
    for name, tensor in found.items():
        expected = torch.tensor(np.array(state[name])) if name in ("reversed", "apart") else None
        expected = state[name] if expected is None else expected
        assert tensor.dtype == expected.dtype, name
        assert torch.equal(tensor, expected), name
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_options_of_other_formats(tmp_path: Path) -> None:
    with Listing(saved({"a": np.ones(3)})) as run:
        for to, named, words in [
            ("pt", {"shard_size": 5}, "--shard-size is not for 'pt'"),
            ("hf", {"adapter": "x"}, "--adapter is not for 'hf'"),
            ("dcp", {"files": tmp_path}, "--files is not for 'dcp'"),
            ("safetensors", {"shard_size": "5 apples"}, "is not a size"),
            ("safetensors", {"shard_size": 0}, "at least one byte"),
            ("onnx", {}, "no format 'onnx'"),
        ]:
            with pytest.raises(UsageError, match=words):
                run.export_as(None, to, tmp_path / "x", **named)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["safetensors", "pt", "dcp", "hf"])
def test_damage_leaves_nothing(tmp_path: Path, to: str) -> None:
    address = tmp_path / "run"
    with CheckpointManager(address) as manager:
        state = {"model": {"a": np.arange(9000.0)}, "pretrained_files": {"config.json": "{}"}}
        manager.save(1, state).result()
    with Listing(address) as run:
        [chunk] = run.manifest(None).leaves[0].chunks
    [pack] = (address / "packs").iterdir()
    data = bytearray(pack.read_bytes())
    data[chunk.offset] ^= 1
    pack.chmod(0o644)
    pack.write_bytes(data)
    before = sorted(tmp_path.rglob("*"))
    with Listing(address) as run, pytest.raises(DamagedObject):
        run.export_as(None, to, tmp_path / "deep" / "out")
    assert sorted(tmp_path.rglob("*")) == before
