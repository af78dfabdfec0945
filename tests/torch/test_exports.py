"""Exports that torch itself reads: `torch.save` files and folders of DCP."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict_loader import load as load_dcp

from holdfast import Directory
from holdfast.core.types import MiB
from holdfast.errors import PickleRefused, StateError, UsageError
from holdfast.manager import CheckpointManager, Listing
from holdfast.torch import backing
from tests.support.jobs import fresh_address


def build() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model with tied weights that has been trained for two steps."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4)
    )
    model[2].weight = model[0].weight
    model.register_buffer("brain", torch.randn(5).bfloat16())
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        model(torch.randn(6, 4)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def saved(state: dict[str, Any], **options: Any) -> str:
    address = fresh_address()
    with CheckpointManager(address, **options) as manager:
        manager.save(1, state).result()
    return address


def assert_same(found: Any, expected: Any) -> None:
    """Bit for bit, with types."""
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert torch.equal(
            found.contiguous().view(-1).view(torch.uint8),
            expected.detach().contiguous().view(-1).view(torch.uint8),
        )
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


def test_a_training_state_as_pt(tmp_path: Path) -> None:
    model, optimizer = build()
    address = saved({"model": model, "optimizer": optimizer, "epoch": 3, "lrs": [0.1, 0.2]})
    with Listing(address) as run:
        done = run.export_as(None, "pt", tmp_path / "state.pt")
        run.export_as(None, "pt", tmp_path / "model.pt", only="model")
    assert done.left_out == []
    assert {"model/0.weight", "optimizer/state/0/exp_avg"} < set(done.tensors)
    assert sorted(os.listdir(tmp_path)) == ["model.pt", "state.pt"]
    for mmap in (False, True):
        found = torch.load(tmp_path / "state.pt", weights_only=True, mmap=mmap)
        assert_same(found["model"], OrderedDict(model.state_dict()))
        assert_same(found["optimizer"], optimizer.state_dict())
        assert (found["epoch"], found["lrs"]) == (3, [0.1, 0.2])
    weights = torch.load(tmp_path / "model.pt", weights_only=True)
    assert weights["0.weight"].data_ptr() == weights["2.weight"].data_ptr(), "still tied"
    assert weights._metadata == model.state_dict()._metadata  # type: ignore[attr-defined]
    other, _ = build()
    assert not any(other.load_state_dict(weights))


class Scale:
    def state_dict(self) -> dict[str, float]:
        return {"scale": 2.0}

    def load_state_dict(self, state: dict[str, float]) -> None: ...


def odd_state(folder: Path) -> tuple[dict[str, Any], dict[str, Any], set[str]]:
    """(state, what is to come of it, what is left out)."""
    (folder / "file").write_text("x")
    flat = torch.randn(40)
    nan = torch.tensor([0x7FC00001, -0x80000000], dtype=torch.int32).view(torch.float32)
    python, numpy = random.Random(3), np.random.default_rng(4)
    same: dict[str, Any] = {
        "nan": nan,
        "views": {"a": flat[5:15], "b": flat[:20].view(4, 5).t()},
        "last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "tiny": torch.randn(3).to(torch.float8_e4m3fn),
        "pair": torch.zeros(3, dtype=torch.complex128) + 1j,
        "none": torch.empty(0, 3),
        "zero": torch.tensor(3.5, dtype=torch.float64),
        "plain": [None, True, 1 << 70, 1.5, float("inf"), 1 + 2j, "ü" * 9999, b"x" * 9999],
        "tuple": (1, [torch.arange(3)]),
        "keys": {1: "a", (2, "b"): "c", None: "d"},
        "set": {1, "b"},
        "dtype": torch.bfloat16,
        "size": torch.Size([3, 4]),
        "long": list(range(9999)),
    }
    changed: dict[str, tuple[Any, Any]] = {
        "array": (np.arange(6, dtype=">i4").reshape(2, 3), torch.arange(6).int().view(2, 3)),
        "scalar": (np.float32(0.5), 0.5),
        "deque": (deque([1, 2]), [1, 2]),
        "frozen": (frozenset({1}), {1}),
        "path": (Path("a/b"), "a/b"),
        "parameter": (torch.nn.Parameter(flat[:3].clone()), flat[:3].clone()),
        "object": (Scale(), {"scale": 2.0}),
        "generator": (torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)),
        "python": (python, python.getstate()),
        "numpy": (numpy, numpy.bit_generator.state),
    }
    changed["generator"] = (changed["generator"][0], changed["generator"][1].get_state())
    left_out = {"words": np.array(["a"]), "format": torch.channels_last, "files": Directory(folder)}
    state = same | {name: pair[0] for name, pair in changed.items()} | left_out
    return state, same | {name: pair[1] for name, pair in changed.items()}, set(left_out)


def test_every_kind_of_value(tmp_path: Path) -> None:
    tracked = tmp_path / "tracked"
    tracked.mkdir()
    state, expected, left_out = odd_state(tracked)
    with Listing(saved(state)) as run:
        done = run.export_as(None, "pt", tmp_path / "x.pt")
        dcp = run.export_as(None, "dcp", tmp_path / "dcp")
    assert {line.partition(":")[0] for line in done.left_out} == left_out
    assert dcp.left_out == done.left_out
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "y.pt")
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    again = torch.load(tmp_path / "y.pt", weights_only=False)
    for name, value in expected.items():
        assert_same(found[name], value)
        if name != "keys":  # DCP's are text
            assert_same(again[name], value)
    assert again["keys"] == {"1": "a", "(2, 'b')": "c", "None": "d"}
    assert found.keys() == again.keys() == expected.keys()


def test_sparse_tensors(tmp_path: Path) -> None:
    state = {"coo": torch.eye(3).to_sparse(), "dense": torch.ones(2)}
    with Listing(saved(state)) as run:
        run.export_as(None, "pt", tmp_path / "x.pt")
        done = run.export_as(None, "dcp", tmp_path / "dcp")
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert torch.equal(found["coo"].to_dense(), torch.eye(3))
    assert done.left_out == ["coo: a sparse_coo float32[3, 3]"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_program_loads_its_dcp_folder(tmp_path: Path) -> None:
    model, optimizer = build()
    address = saved({"model": model, "optimizer": optimizer, "epoch": 3})
    with Listing(address) as run:
        done = run.export_as(None, "dcp", tmp_path / "out")
        run.export_as(None, "dcp", tmp_path / "model", only="model")
    assert sorted(path.name for path in done.files) == [".metadata", "__0_0.distcp"]
    metadata = FileSystemReader(tmp_path / "out").read_metadata()
    assert set(done.tensors) < metadata.state_dict_metadata.keys()
    assert {"model.0.weight", "optimizer.state.0.exp_avg", "epoch"} < set(
        metadata.state_dict_metadata
    )
    assert metadata.storage_meta is not None
    assert metadata.storage_meta.checkpoint_id == str(tmp_path / "out")
    other, others = build()
    with torch.no_grad():
        for value in [*other.state_dict().values(), *others.state_dict()["state"][0].values()]:
            value.zero_()
    state = {"model": other.state_dict(), "optimizer": others.state_dict(), "epoch": 0}
    load_dcp(state, checkpoint_id=tmp_path / "out", no_dist=True)
    assert_same(state["model"], model.state_dict())
    assert_same(state["optimizer"], optimizer.state_dict())
    assert state["epoch"] == 3
    alone = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    load_dcp(alone, checkpoint_id=tmp_path / "model", no_dist=True)
    assert_same(alone, dict(model.state_dict()))


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    class Odd:
        def __reduce__(self) -> tuple[Any, ...]:
            return (int, ())

    state = {"a": Odd(), "b": torch.ones(2), "f": Directory(tmp_path)}
    address = saved(state, allow_pickle=True)
    with Listing(address) as run:
        with pytest.raises(PickleRefused, match="'a' is stored as a pickle") as caught:
            run.export_as(None, "pt", tmp_path / "x")
        assert "--only NAME" in caught.value.hint
        with pytest.raises(UsageError, match="there is no form for a file"):
            run.export_as(None, "pt", tmp_path / "x", only="f")
        run.export_as(None, "pt", tmp_path / "x", only="b")
        assert torch.equal(torch.load(tmp_path / "x", weights_only=True), torch.ones(2))
        (tmp_path / "x").unlink()
        with pytest.raises(UsageError, match="no state at 'c'"):
            run.export_as(None, "pt", tmp_path / "x", only="c")
    with Listing(saved({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}})) as run:
        with pytest.raises(UsageError, match="two names of the state are one"):
            run.export_as(None, "dcp", tmp_path / "x")
        run.export_as(None, "dcp", tmp_path / "x", only="a")
        with pytest.raises(UsageError, match="not empty"):
            run.export_as(None, "dcp", tmp_path / "x", only="a")
    assert os.listdir(tmp_path) == ["x"]


def test_a_program_without_torch_is_told(tmp_path: Path, monkeypatch: Any) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name="torch")

    address = saved({"a": np.ones(3)})
    monkeypatch.delitem(sys.modules, "holdfast.torch")
    monkeypatch.setattr("holdfast.core.frameworks.importlib.import_module", missing)
    with Listing(address) as run, pytest.raises(StateError, match="needs torch") as caught:
        run.export_as(None, "pt", tmp_path / "x")
    assert caught.value.hint == "pip install 'holdfast[torch]'"


# -- whole or not at all ------------------------------------------------------


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """As a full disk: the kernel says EFBIG of a longer file."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("to", ["pt", "dcp"])
@pytest.mark.parametrize("room", [5 * MiB, 4 * MiB])
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, to: str, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the smaller room the scratch file does not fit; in the other, what torch writes: the
    tied tensor twice, or the list of numbers."""
    monkeypatch.setattr(backing, "_SEGMENT_BYTES", MiB)
    tensor = torch.zeros(5 * MiB // 4 - 5000)
    state = {"a": tensor, "b": tensor, "numbers": list(range(9000))}
    with Listing(saved(state)) as run, largest_file(room), pytest.raises(OSError, match="large"):
        run.export_as(None, to, tmp_path / "deep" / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("to", ["pt", "dcp"])
def test_a_cancelled_export_leaves_what_was_there(
    tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with Listing(saved({"a": torch.ones(9), "b": torch.ones(9)})) as run:
        run.export_as(None, to, out)
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        real: Callable[..., None] = torch.save

        def interrupted(value: object, *args: Any) -> None:
            real(value, *args)
            raise KeyboardInterrupt

        monkeypatch.setattr(torch, "save", interrupted)
        with pytest.raises(BaseException) as caught:
            run.export_as(None, to, out, replace=True)
    assert isinstance(caught.value, KeyboardInterrupt)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def anonymous() -> int:
    """This process's memory that is no file's, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError


@pytest.mark.parametrize("to", ["pt", pytest.param("dcp", marks=pytest.mark.slow)])
def test_the_state_is_never_in_memory(tmp_path: Path, to: str) -> None:
    address = saved({f"w{n}": torch.full((8 * MiB,), n) for n in range(3)})
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous())

    thread = threading.Thread(target=watch)
    with Listing(address) as run:
        before = anonymous()
        thread.start()
        nbytes = run.export_as(None, to, tmp_path / "out").nbytes
    done.set()
    thread.join()
    assert nbytes > 96 * MiB
    assert peak[0] - before < 70 * MiB, "blocks for reading, as in any restore"


@pytest.mark.slow
def test_a_killed_export_is_not_seen(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "run") as manager:
        manager.save(1, {"a": torch.arange(9)}).result()
    code = (
        "import os, signal, sys, torch\n"
        "from holdfast.manager import Listing\n"
        "save = torch.save\n"
        "def killed(*args):\n"
        "    save(*args)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "torch.save = killed\n"
        "Listing(sys.argv[1]).export_as(1, 'pt', sys.argv[2])"
    )
    out = tmp_path / "out.pt"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run"), str(out)])
    assert done.returncode < 0
    assert not out.exists()
    [left] = tmp_path.glob(".holdfast-export-*")
    assert [path.name for path in left.iterdir()] == ["new"], "the scratch file has no name"
    with Listing(tmp_path / "run") as run:
        run.export_as(1, "pt", out)
    assert torch.equal(torch.load(out, weights_only=True)["a"], torch.arange(9))
    assert sorted(os.listdir(tmp_path)) == ["out.pt", "run"]
    assert time.time() - out.stat().st_mtime < 300
