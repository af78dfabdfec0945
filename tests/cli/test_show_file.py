"""`holdfast show FILE`: pages about files of other makes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from holdfast.cli.foreign import file_text
from holdfast.foreign import ForeignFile, ForeignLeaf
from tests.cli.conftest import Command, failed, same_error_as_json
from tests.cli.test_render import HOSTILE
from tests.foreign import hostile


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_safetensors(here: Path, holdfast_cli: Command) -> None:
    arrays = {"w": np.zeros((2, 3), np.float32), "b": np.zeros(5, np.int64)}
    save_file(arrays, "x.safetensors", metadata={"format": "np"})
    nbytes = (here / "x.safetensors").stat().st_size
    done = holdfast_cli("show", "x.safetensors")
    assert (done.status, done.err) == (0, "")
    assert done.out == (
        f"x.safetensors: safetensors, {nbytes} B\n"
        "\n"
        "TENSOR  TYPE  SHAPE   SIZE\n"
        "b       I64   [5]     40 B\n"
        "w       F32   [2, 3]  24 B\n"
        "\n"
        "2 tensors, 64 B.\n"
        "\n"
        "values\n"
        "  metadata/format: np\n"
    )
    assert holdfast_cli("show", "x.safetensors", "--json", "--leaves").json == {
        "ok": True,
        "file": "x.safetensors",
        "kind": "safetensors",
        "nbytes": nbytes,
        "runs_code": [],
        "notes": [],
        "problems": [],
        "tensors": 2,
        "tensor_bytes": 64,
        "values": [{"path": "metadata/format", "value": "np"}],
        "leaves": [
            {"path": "b", "dtype": "I64", "shape": [5], "nbytes": 40, "note": ""},
            {"path": "w", "dtype": "F32", "shape": [2, 3], "nbytes": 24, "note": ""},
        ],
    }


def test_a_file_that_runs_code(here: Path, holdfast_cli: Command) -> None:
    value = {"model": torch.nn.Linear(2, 1), "x": hostile.Calls(os.system, "touch pwned")}
    torch.save(value, "model.pt")
    done = holdfast_cli("show", "model.pt")
    assert (done.status, done.err) == (0, "")
    title, _, warning, *_ = done.out.splitlines()
    assert title.startswith("model.pt: PyTorch (zip), ")
    assert warning == (
        "THIS FILE RUNS CODE WHEN LOADED: torch.nn.modules.linear.Linear, posix.system"
    )
    assert "model/_parameters/weight  F32   [1, 2]   8 B\n" in done.out
    assert os.listdir() == ["model.pt"]
    value = holdfast_cli("show", "model.pt", "--json").json
    assert value["runs_code"] == ["torch.nn.modules.linear.Linear", "posix.system"]
    assert "leaves" not in value


def test_a_damaged_file(here: Path, holdfast_cli: Command) -> None:
    Path("x.pkl").write_bytes(hostile.SYSTEM[:-1])
    done = holdfast_cli("show", "x.pkl")
    assert "x.pkl is damaged: its pickle is malformed" in failed(done, 4)
    assert "THIS FILE RUNS CODE WHEN LOADED: os.system" in done.out
    error = same_error_as_json(holdfast_cli, "show", "x.pkl")
    assert error["runs_code"] == ["os.system"]
    Path("x.pt").write_bytes(hostile.torch_zip(b"N.")[:-30])
    assert "it is cut off" in failed(holdfast_cli("show", "x.pt"), 4)
    Path("x.txt").write_text("hello")
    assert "of an unknown kind" in failed(holdfast_cli("show", "x.txt"), 1)
    assert same_error_as_json(holdfast_cli, "show", "x.txt")["exit_code"] == 1


def test_many_tensors_and_values(here: Path, holdfast_cli: Command) -> None:
    value = {
        "t": {f"layer.{i}": torch.zeros(1) for i in range(30)},
        "v": {str(i): i for i in range(30)},
    }
    torch.save(value, "x.pt")
    page = holdfast_cli("show", "x.pt").out
    assert "t/layer.23" in page
    assert "t/layer.24" not in page
    assert "… 6 tensors more (--leaves shows all)\n" in page
    assert page.endswith("  v/23: 23\n  … 6 lines more (--json shows all)\n")
    assert "t/layer.29" in holdfast_cli("show", "x.pt", "--leaves").out


def test_hostile_names_are_escaped(here: Path, holdfast_cli: Command) -> None:
    name = f"{HOSTILE.replace('/', '')}.pt"
    program = f"\x80\x02c{HOSTILE.splitlines()[0]}\nx\n.".encode("latin1")
    for content in (
        hostile.torch_zip(hostile.pickled({HOSTILE: [HOSTILE], "\ud800": 1})),
        hostile.torch_zip(program),
        program[:-1],
        b"PK\3\4" + HOSTILE.encode(),
    ):
        Path(name).write_bytes(content)
        for extra in ([], ["--json"], ["--leaves"]):
            done = holdfast_cli("show", name, *extra)
            for line in (done.out + done.err).splitlines():
                assert line.isprintable(), line
    leaf = ForeignLeaf(HOSTILE, HOSTILE, (1,), 1, HOSTILE)
    page = file_text(
        HOSTILE,
        ForeignFile(HOSTILE, 1, (leaf,), ((HOSTILE, HOSTILE),), (HOSTILE,) * 20, (HOSTILE,)),
        width=80,
    )
    assert all(line.isprintable() for line in page.split("\n"))
    assert "and 12 more (--json shows all)" in page.replace("\n  ", " ")


def test_a_page_fits_80_columns() -> None:
    leaf = ForeignLeaf("a/" * 60, "complicated_dtype", (1,) * 30, 1 << 50, "shares data with " * 9)
    file = ForeignFile("pickle", 1, (leaf,), runs=tuple(f"module_{i}.function" for i in range(8)))
    assert all(len(line) <= 80 for line in file_text("x", file, width=80).split("\n"))


def test_a_run_wins_over_nothing_and_a_folder_is_no_file(run: Path, holdfast_cli: Command) -> None:
    assert holdfast_cli("show", run, "--json").json["checkpoint"]["step"] == 400
    (run.parent / "mnist@200").write_text("a file of that name")
    assert "of an unknown kind" in failed(holdfast_cli("show", f"{run}@200"), 1)
