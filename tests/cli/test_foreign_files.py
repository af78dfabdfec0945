"""`diff`, `verify` and `import` of files of other makes, beside runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint import state_dict_saver

import holdfast
from holdfast.manager import foreign_comparison
from holdfast.manager.reader import ChunkReader
from tests.cli.conftest import Command, failed, same_error_as_json
from tests.cli.test_render import HOSTILE
from tests.foreign import hostile

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a.weight": torch.rand(3, 4),
        "b.weight": torch.rand(5).bfloat16(),
        "c": torch.tensor([1 + 2j], dtype=torch.complex128),
        "large": torch.arange(3 << 20, dtype=torch.int64),  # three chunks
    }


def module_of(tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    module = torch.nn.Module()
    for name, tensor in tensors.items():
        part, _, last = name.rpartition(".")
        if part:
            module.add_module(part, torch.nn.Module())
        module.get_submodule(part).register_buffer(last, tensor)
    return module


def save(address: str, step: int = 1, **more: Any) -> None:
    with holdfast.CheckpointManager(address, keep=None) as manager:
        manager.save(step, more).result()


# -- diff -------------------------------------------------------------------------


def test_equal_in_every_format(here: Path, holdfast_cli: Command) -> None:
    tensors = state()
    torch.save({"model": tensors}, "x.pt")
    torch.save(tensors, "old.pt", _use_new_zipfile_serialization=False)
    state_dict_saver.save({"model": tensors}, checkpoint_id="dcp")
    save("run", model=module_of(tensors))
    for first, second in [("x.pt", "run"), ("run", "old.pt"), ("dcp", "run"), ("old.pt", "dcp")]:
        done = holdfast_cli("diff", first, second)
        assert done.status == 0, done.out
        assert "The same, bit for bit: 4 tensors and 0 values." in done.out
    del tensors["c"]  # which safetensors has no name for
    save_file(tensors, "x.safetensors")
    save("other", net=tensors)
    assert holdfast_cli("diff", "x.safetensors", "other", "--only", "net").status == 0
    assert holdfast_cli("diff", "x.safetensors", "other").status == 5


def test_one_bit(here: Path, holdfast_cli: Command) -> None:
    tensors = state()
    save("run", model=module_of(tensors))
    tensors["large"][-1] += 5
    tensors["b.weight"] = tensors["b.weight"].float()
    tensors["new"] = torch.ones(1)
    torch.save({"model": tensors, "epoch": 3}, "x.pt")
    done = holdfast_cli("diff", "run", "x.pt", "--values", "--json")
    assert done.status == 5
    found = {d["path"]: d for d in done.json["differences"]}
    assert {path: d["kind"] for path, d in found.items()} == {
        "model/b.weight": "dtype",
        "model/large": "values",
        "model/new": "only b",
        "epoch": "only b",
    }
    large = found["model/large"]
    assert (large["unequal"], large["elements"], large["max_abs"]) == (1, 3 << 20, 5)
    assert done.json["a"]["ref"] == "run@1"
    assert done.json["b"]["kind"] == "PyTorch (zip)"
    assert done.json["parts"] == [
        {"name": "model", "leaves": 5, "equal": 2, "differ": 2, "only_a": 0, "only_b": 1}
    ]
    assert "model/large" in holdfast_cli("diff", "x.pt", "run").out


def test_of_a_checkpoint_only_what_differs_is_read(
    here: Path, holdfast_cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"large": torch.arange(3 << 20, dtype=torch.int64)}
    save("run", model=tensors)
    read: list[int] = []
    real = ChunkReader.read

    def noted(self: ChunkReader, wanted: Any) -> None:
        read.extend(one.chunk.nbytes for one in wanted)
        real(self, wanted)

    monkeypatch.setattr(ChunkReader, "read", noted)
    save_file(tensors, "x.safetensors")
    assert holdfast_cli("diff", "x.safetensors", "run").status == 0
    assert read == []
    tensors["large"][0] = -1
    save_file(tensors, "x.safetensors")
    assert holdfast_cli("diff", "run", "x.safetensors").status == 5
    assert read == [8 << 20]


def test_values_and_containers(here: Path, holdfast_cli: Command) -> None:
    torch.save({"a": [1, 2, {"x": 1.0}], "b": "text", "n": float("nan")}, "x.pt")
    torch.save({"a": (1, 2, {"x": 1}), "b": "text", "n": float("nan")}, "y.pt")
    done = holdfast_cli("diff", "x.pt", "y.pt", "--json")
    assert [(d["path"], d["kind"]) for d in done.json["differences"]] == [("a/2/x", "value")]
    torch.save({"a": torch.ones(1), "b": torch.ones(2), "e": 1}, "x.pt")
    torch.save({"a": 1, "b": torch.ones(1, 2), "e": 1}, "y.pt")
    done = holdfast_cli("diff", "x.pt", "y.pt", "--json")
    assert {d["path"]: d["kind"] for d in done.json["differences"]} == {"a": "type", "b": "shape"}
    assert [part["differ"] for part in done.json["parts"]] == [1, 1]


def test_what_was_not_compared_is_not_the_same(here: Path, holdfast_cli: Command) -> None:
    """Modules as a whole are no plain values."""
    torch.save(torch.nn.Linear(2, 1), "x.pt")
    torch.save(torch.nn.Linear(2, 1), "y.pt")
    assert "nothing could be compared" in failed(holdfast_cli("diff", "x.pt", "y.pt"), 1)
    torch.save({"a": 1, "model": torch.nn.Linear(2, 1)}, "x.pt")
    done = holdfast_cli("diff", "x.pt", "x.pt")
    assert "The same, of what can be compared, bit for bit: 0 tensors and 1 value." in done.out


def test_files_of_joblib_are_not_damaged(here: Path, holdfast_cli: Command) -> None:
    joblib.dump({"w": np.ones(3), "n": 1}, "x.joblib")
    done = holdfast_cli("show", "x.joblib")
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("x.joblib: joblib, ")
    assert "NumpyArrayWrapper, " in done.out.replace("\n  ", " ")
    assert "behind its first array" in done.out.replace("\n  ", " ")
    for command in (("verify", "x.joblib"), ("import", "x.joblib", "run")):
        assert "is joblib: it can be shown, and not more" in failed(holdfast_cli(*command), 1)


def test_numpy_and_torch_of_one_type_are_equal(here: Path, holdfast_cli: Command) -> None:
    np.savez("x.npz", a=np.arange(6.0).reshape(2, 3))
    torch.save({"a": torch.arange(6, dtype=torch.float64).reshape(2, 3)}, "x.pt")
    assert holdfast_cli("diff", "x.npz", "x.pt").status == 0


def test_pieces_of_two_files(
    here: Path, holdfast_cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreign_comparison, "_PIECE_BYTES", 64)
    a = torch.arange(100.0)
    save_file({"x": a}, "a.safetensors")
    save_file({"x": a.flip(0)}, "b.safetensors")
    done = holdfast_cli("diff", "a.safetensors", "b.safetensors", "--values", "--json")
    [found] = done.json["differences"]
    assert (found["unequal"], found["max_abs"]) == (100, 99)


def test_diff_with_damage_and_nothing(here: Path, holdfast_cli: Command) -> None:
    torch.save({"a": 1}, "x.pt")
    Path("cut.pt").write_bytes(Path("x.pt").read_bytes()[:-30])
    assert "cut off" in failed(holdfast_cli("diff", "x.pt", "cut.pt"), 4)
    assert failed(holdfast_cli("diff", "x.pt", "nowhere"), 10)
    assert same_error_as_json(holdfast_cli, "diff", "x.pt", "nowhere")["exit_code"] == 10


# -- verify -----------------------------------------------------------------------


def test_verify_says_what_nothing_can_find(here: Path, holdfast_cli: Command) -> None:
    save_file({"x": torch.ones(9)}, "x.safetensors")
    data = bytearray(Path("x.safetensors").read_bytes())
    data[-1] ^= 1
    Path("x.safetensors").write_bytes(data)
    done = holdfast_cli("verify", "x.safetensors", "--json")
    assert done.status == 0
    assert done.json["intact"] is True
    assert done.json["unchecked"] == ["the bytes of tensors: the format has no checksum at all"]
    Path("x.safetensors").write_bytes(data[:-1])
    assert "outside the file" in failed(holdfast_cli("verify", "x.safetensors"), 4)
    assert same_error_as_json(holdfast_cli, "verify", "x.safetensors")["exit_code"] == 4


def test_verify_a_folder_with_a_shard_lost(here: Path, holdfast_cli: Command) -> None:
    Path("shards").mkdir()
    save_file({"a": torch.ones(2)}, "shards/model-1.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "gone.safetensors"}}
    Path("shards/model.safetensors.index.json").write_text(json.dumps(index))
    done = holdfast_cli("verify", "shards", "--json")
    assert (done.status, done.json["intact"]) == (4, False)
    assert "the shard 'gone.safetensors' is missing" in done.json["problems"]
    assert done.json["exit_code"] == 4
    assert (
        "DAMAGED: the shard 'gone.safetensors' is missing" in holdfast_cli("verify", "shards").out
    )


# -- import -----------------------------------------------------------------------


def test_import_and_what_becomes_of_it(here: Path, holdfast_cli: Command) -> None:
    torch.save({"state_dict": state(), "epoch": 3}, "x.pt")
    done = holdfast_cli("import", "x.pt", "run", "--only", "state_dict", "--as", "model", "--json")
    assert done.status == 0
    assert (done.json["names"], done.json["tensors"]) == (["model"], 4)
    assert holdfast_cli("verify", "run").status == 0
    assert holdfast_cli("diff", "x.pt", "run", "--only", "model").status == 5
    for step in (1, 2):
        words = ("import", "x.pt", "run", "--step", step, "--metric", f"loss={step}")
        assert holdfast_cli(*words, "--keep", "last=1 best=1:loss").status == 0
    listed = holdfast_cli("ls", "run", "--json").json["checkpoints"]
    assert [one["step"] for one in listed] == [2, 1]
    assert failed(holdfast_cli("import", "x.pt", "run@2"), 2)


def test_nothing_is_imported_of_what_would_run(here: Path, holdfast_cli: Command) -> None:
    Path("evil.pkl").write_bytes(hostile.SYSTEM)
    assert "os.system" in failed(holdfast_cli("import", "evil.pkl", "run"), 1)
    assert "os.system" in failed(holdfast_cli("import", "evil.pkl", "run", "--skip-objects"), 1)
    assert sorted(path.name for path in here.iterdir()) == ["evil.pkl"]
    assert same_error_as_json(holdfast_cli, "import", "evil.pkl", "run")["exit_code"] == 1


def test_import_imports_no_framework(here: Path) -> None:
    torch.save({"model": {"w": torch.ones(2, dtype=torch.bfloat16)}}, "x.pt")
    code = (
        "import sys\nfrom holdfast.cli import main\n"
        "assert main(['import', 'x.pt', 'run']) == 0\n"
        "assert main(['diff', 'x.pt', 'run']) == 0\n"
        "assert not {'torch', 'h5py', 'keras', 'xgboost'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_hostile_names_are_escaped(here: Path, holdfast_cli: Command) -> None:
    torch.save({HOSTILE: torch.ones(1), "o": {HOSTILE: Path("x")}}, "x.pt")
    torch.save({}, "y.pt")
    for words in (
        ("import", "x.pt", "run"),
        ("import", "x.pt", "run", "--skip-objects"),
        ("diff", "x.pt", "y.pt"),
        ("show", "run"),
    ):
        for extra in ([], ["--json"]):
            done = holdfast_cli(*words, *extra)
            for line in (done.out + done.err).splitlines():
                assert line.isprintable(), line
