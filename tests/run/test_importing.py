"""`holdfast.import_checkpoint`: from files of other makes to runs that go on."""

from __future__ import annotations

import argparse
import contextlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint import state_dict_saver

import holdfast
from holdfast.errors import (
    DamagedObject,
    LoopError,
    StateError,
    StructureMismatch,
    UnknownFile,
    UnsupportedValue,
    UsageError,
)
from holdfast.foreign.data import Span
from tests.support.jobs import Killed, fresh_address

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


class Tied(torch.nn.Module):
    """With a buffer, tied weights, another dtype and a parameter in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        self.out = torch.nn.Linear(4, 4, bias=False)
        self.head = torch.nn.Linear(4, 4)
        self.head.weight = self.out.weight
        self.halved = torch.nn.Parameter(torch.rand(3, dtype=torch.bfloat16))
        self.turned = torch.nn.Parameter(torch.rand(2, 5).T)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.head(self.body(x)).sum() + self.halved.float().sum() + self.turned.sum()
        return y


def model(seed: int) -> Tied:
    torch.manual_seed(seed)
    made = Tied()
    made(torch.rand(8, 3))
    return made


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(
        one.dtype == other.dtype and torch.equal(one, other)
        for one, other in zip(ours.values(), theirs.values(), strict=True)
    )


def as_pt(state: dict[str, Any], folder: Path) -> Path:
    torch.save(state, folder / "x.pt")
    return folder / "x.pt"


def as_old_pt(state: dict[str, Any], folder: Path) -> Path:
    torch.save(state, folder / "x.pt", _use_new_zipfile_serialization=False)
    return folder / "x.pt"


def as_dcp(state: dict[str, Any], folder: Path) -> Path:
    state_dict_saver.save({"model": state}, checkpoint_id=folder / "dcp")
    return folder / "dcp"


def as_safetensors(state: dict[str, Any], folder: Path) -> Path:
    save_file({k: v.clone().contiguous() for k, v in state.items()}, folder / "x.safetensors")
    return folder / "x.safetensors"


def as_shards(state: dict[str, Any], folder: Path) -> Path:
    names = list(state)
    where: dict[str, str] = {}
    (folder / "shards").mkdir()
    for number in range(2):
        part = {k: state[k].clone().contiguous() for k in names[number::2]}
        save_file(part, folder / "shards" / f"model-{number}.safetensors")
        where |= dict.fromkeys(part, f"model-{number}.safetensors")
    index = {"metadata": {}, "weight_map": where}
    (folder / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder / "shards"


WRITERS = [as_pt, as_old_pt, as_dcp, as_safetensors, as_shards]


@pytest.mark.parametrize("write", WRITERS)
def test_a_run_starts_from_what_was_imported(
    write: Callable[[dict[str, Any], Path], Path], tmp_path: Path
) -> None:
    trained, address = model(0), fresh_address()
    done = holdfast.import_checkpoint(write(trained.state_dict(), tmp_path), address, step=40)
    assert done.names == ("model",)
    assert done.info.step == 40

    live = model(1)
    optimizer = torch.optim.SGD(live.parameters(), 0.1, momentum=0.9)
    with holdfast.Run(address, every=1, keep=None, quiet=True) as run:
        run.track(model=live, optimizer=optimizer)
        random = torch.get_rng_state()
        for step in run.range(3):
            if step == 0:
                assert equal(live, trained)
                assert run.step == 40
                assert torch.equal(random, torch.get_rng_state()), "not those of the import"
            live(torch.rand(8, 3)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert run.step == 43
        assert [info.step for info in run.manager.checkpoints()] == [40, 41, 42, 43]
    assert not equal(live, trained)


def train(address: str, *, die_at: int | None = None) -> Tied:
    live = model(1)
    optimizer = torch.optim.Adam(live.parameters(), 0.01)
    torch.manual_seed(7)
    with holdfast.Run(address, every=2, keep="last=1", quiet=True) as run:
        run.track(model=live, optimizer=optimizer)
        for epoch in run.epochs(2):
            for step in run.range(4):
                if die_at == 4 * epoch + step:
                    raise Killed
                live(torch.rand(8, 3)).backward()
                optimizer.step()
                optimizer.zero_grad()
    return live


@pytest.mark.parametrize("die_at", [0, 1, 4, 7])
def test_a_run_that_started_so_resumes_exactly(die_at: int, tmp_path: Path) -> None:
    path = as_pt(model(0).state_dict(), tmp_path)
    whole, address = fresh_address(), fresh_address()
    for one in (whole, address):
        holdfast.import_checkpoint(path, one)
    with contextlib.suppress(Killed):
        train(address, die_at=die_at)
    assert equal(train(address), train(whole))
    with holdfast.CheckpointManager(address, keep=None) as manager:
        assert [info.step for info in manager.checkpoints()] == [8], "keep= retires it as any"


def test_from_another_run(tmp_path: Path) -> None:
    """An imported checkpoint that stays what it is, for many runs."""
    trained, imported = model(0), fresh_address()
    state = {"net": trained.state_dict(), "epoch": 3}
    holdfast.import_checkpoint(as_pt(state, tmp_path), imported)
    live = model(1)
    with holdfast.CheckpointManager(imported) as manager:
        manager.restore({"net": live}, only=["net"], rng=False)
    assert equal(live, trained)
    assert holdfast.open(imported)["epoch"] == 3


def test_arrays_of_keras_into_arrays(tmp_path: Path) -> None:
    path, address = tmp_path / "m.weights.h5", fresh_address()
    weights = {"0": np.random.rand(3, 4).astype("f4"), "1": np.arange(4.0)}
    with h5py.File(path, "w") as file:
        for name, array in weights.items():
            file[f"layers/dense/vars/{name}"] = array
    done = holdfast.import_checkpoint(path, address, name="weights")
    assert (done.kind, done.tensors) == ("Keras weights (HDF5)", 2)
    live = {"0": np.zeros((3, 4), "f4"), "1": np.zeros(4)}
    kept = dict(live)
    with holdfast.Run(address, quiet=True) as run:
        run.track(weights={"layers": {"dense": {"vars": live}}})
        for _ in run.range(1):
            for name, array in weights.items():
                assert live[name] is kept[name]
                assert live[name].tobytes() == array.tobytes()


def test_values_of_a_training_checkpoint(tmp_path: Path) -> None:
    net = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 2)).backward()
    optimizer.step()
    state = {
        "model": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "history": {"loss": [0.5, 0.25], "lr": (0.1, 0.2)},
        "array": np.arange(3),
        "complex": torch.tensor([1 + 2j], dtype=torch.complex128),
    }
    address = fresh_address()
    done = holdfast.import_checkpoint(
        as_pt(state, tmp_path), address, metrics={"acc": 0.9}, tags=["old"]
    )
    assert done.names == tuple(state)
    loaded = holdfast.open(f"{address}@old")
    assert loaded.info.metrics == {"acc": 0.9}
    assert loaded["history"].read() == state["history"]
    assert loaded["array"].tolist() == [0, 1, 2]
    assert torch.equal(loaded["complex"], state["complex"])
    fresh = torch.optim.AdamW(net.parameters(), lr=0.5)
    fresh.load_state_dict(loaded["optimizer"].read())
    assert fresh.state_dict()["param_groups"][0]["lr"] == 0.001
    assert torch.equal(
        fresh.state_dict()["state"][0]["exp_avg"], state["optimizer"]["state"][0]["exp_avg"]
    )
    run = holdfast.Run(address, quiet=True)
    run.track(model=net)
    with pytest.raises(StructureMismatch, match="which nothing tracks here"):
        list(run.range(1))
    with contextlib.suppress(LoopError):
        run.close()


@pytest.mark.parametrize(
    ("only", "name", "names"),
    [
        ("checkpoint/net", "", ("net",)),
        ("checkpoint/net", "model", ("model",)),
        ("checkpoint", "", ("net", "step")),
        ("", "all", ("all",)),
        ("list/1", "", ("1",)),
    ],
)
def test_parts_and_names(tmp_path: Path, only: str, name: str, names: Any) -> None:
    net = {"a/b": torch.ones(2), "c": torch.zeros(1)}
    state = {"checkpoint": {"net": net, "step": 3}, "list": [1, net]}
    path = as_pt(state, tmp_path)
    assert holdfast.import_checkpoint(path, fresh_address(), only=only, name=name).names == names
    with pytest.raises(UsageError, match="has nothing at 'checkpoint/x'") as caught:
        holdfast.import_checkpoint(path, fresh_address(), only="checkpoint/x")
    assert "net" in caught.value.hint


def test_tensors_as_numpy_or_torch(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(2).bfloat16()}, tmp_path / "x.safetensors")
    address = fresh_address()
    holdfast.import_checkpoint(tmp_path / "x.safetensors", address, tensors="numpy")
    loaded = holdfast.open(address)["model"]
    assert isinstance(loaded["a"], np.ndarray)
    assert isinstance(loaded["b"], torch.Tensor), "NumPy has no bfloat16"
    np.savez(tmp_path / "x.npz", a=np.ones(2), text=np.array(["ab"]))
    holdfast.import_checkpoint(tmp_path / "x.npz", address, step=1, tensors="torch")
    loaded = holdfast.open(address)["model"]
    assert torch.equal(loaded["a"], torch.ones(2, dtype=torch.float64))
    assert loaded["text"].tolist() == ["ab"]


# -- what is refused --------------------------------------------------------------


def test_objects_are_refused_or_left_out(tmp_path: Path) -> None:
    state = {
        "model": {"w": torch.ones(2)},
        "args": argparse.Namespace(lr=0.1),
        "list": [1, Path("a")],
        "net": torch.nn.Linear(1, 1),
    }
    path, address = as_pt(state, tmp_path), fresh_address()
    with pytest.raises(UnsupportedValue) as caught:
        holdfast.import_checkpoint(path, address)
    for line in ("args: argparse.Namespace", "list/1: pathlib.PosixPath", "net: torch.nn."):
        assert line in caught.value.message
    assert "--skip-objects" in caught.value.hint
    with holdfast.CheckpointManager(address) as manager:
        assert manager.checkpoints() == []
    done = holdfast.import_checkpoint(path, address, skip_objects=True)
    assert [where for where, _ in done.skipped] == ["args", "list/1", "net"]
    loaded = holdfast.open(address)
    assert set(loaded) == {"model", "list"}
    assert loaded["list"] == [1, None], "the places of the others in a list stay"


def test_damage_is_found_before_anything_is_written(tmp_path: Path) -> None:
    path, address = as_pt({"w": torch.full((50,), 3.0)}, tmp_path), fresh_address()
    data = bytearray(path.read_bytes())
    data[data.index(np.full(50, 3.0, "f4").tobytes()) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedObject, match="does not have its CRC-32"):
        holdfast.import_checkpoint(path, address)
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(UnknownFile):
        holdfast.import_checkpoint(tmp_path / "x.txt", address)
    with pytest.raises(FileNotFoundError):
        holdfast.import_checkpoint(tmp_path / "nothing", address)
    with holdfast.CheckpointManager(address) as manager:
        assert manager.checkpoints() == []


def test_a_file_that_fails_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, address = as_safetensors({"w": torch.ones(50)}, tmp_path), fresh_address()

    def read(self: Span, offset: int, into: memoryview) -> None:
        raise DamagedObject(self.source.name, "it became shorter while it was read")

    monkeypatch.setattr(Span, "read", read)
    with pytest.raises(DamagedObject, match="it became shorter"):
        holdfast.import_checkpoint(path, address)
    with holdfast.CheckpointManager(address) as manager:
        assert manager.checkpoints() == []


def test_a_file_that_would_grow_beyond_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.run.importing._SLACK_BYTES", 0)
    whole = torch.zeros(1000)
    views = {f"{n}": whole[n:] for n in range(900)}
    with pytest.raises(DamagedObject, match="it would become"):
        holdfast.import_checkpoint(as_pt(views, tmp_path), fresh_address())


def test_a_second_import_says_its_step(tmp_path: Path) -> None:
    path, address = as_pt({"w": torch.ones(2)}, tmp_path), fresh_address()
    holdfast.import_checkpoint(path, address)
    with pytest.raises(UsageError, match="has checkpoints already, the newest of step 0"):
        holdfast.import_checkpoint(path, address)
    holdfast.import_checkpoint(path, address, step=5, keep="last=1")
    with holdfast.CheckpointManager(address, keep=None) as manager:
        assert [info.step for info in manager.checkpoints()] == [5]
        assert manager.latest().note == "imported from x.pt"  # type: ignore[union-attr]
        assert manager.verify()[0].ok


def test_large_tensors_pass_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than a chunk of 8 MiB at a time."""
    largest = 0
    real = Span.read

    def read(self: Span, offset: int, into: memoryview) -> None:
        nonlocal largest
        largest = max(largest, len(into))
        real(self, offset, into)

    monkeypatch.setattr(Span, "read", read)
    tensor = torch.arange(5 << 20, dtype=torch.int64)  # 40 MiB
    address = fresh_address()
    holdfast.import_checkpoint(as_safetensors({"w": tensor}, tmp_path), address)
    assert 0 < largest <= 8 << 20
    assert torch.equal(holdfast.open(address)["model"]["w"], tensor)


@pytest.mark.parametrize("hooked", [False, True])
def test_one_name_of_tied_weights_is_enough(tmp_path: Path, hooked: bool) -> None:
    """As Transformers and safetensors.torch.save_model write them."""
    trained, address = model(0), fresh_address()
    state = {key: value.contiguous() for key, value in trained.state_dict().items()}
    del state["head.weight"]
    save_file(state, tmp_path / "x.safetensors")
    holdfast.import_checkpoint(tmp_path / "x.safetensors", address)
    live = model(1)
    if hooked:  # then it is restored through its own load_state_dict
        live.register_load_state_dict_post_hook(lambda module, keys: None)
    with holdfast.CheckpointManager(address) as manager:
        manager.restore({"model": live}, rng=False)
    assert equal(live, trained)
    apart = model(1)
    apart.head.weight = torch.nn.Parameter(torch.rand(4, 4))
    with (
        holdfast.CheckpointManager(address) as manager,
        pytest.raises(StructureMismatch, match=r"missing.*\n.*model/head.weight"),
    ):
        manager.restore({"model": apart}, rng=False)


def test_tied_weights_that_were_saved_apart_and_differ(tmp_path: Path) -> None:
    trained, address = model(0), fresh_address()
    state = {key: value.clone().contiguous() for key, value in trained.state_dict().items()}
    state["head.weight"] += 1
    save_file(state, tmp_path / "x.safetensors")
    holdfast.import_checkpoint(tmp_path / "x.safetensors", address)
    with (
        holdfast.CheckpointManager(address) as manager,
        pytest.raises(StructureMismatch, match="not tied to"),
    ):
        manager.restore({"model": model(1)}, rng=False)


def test_what_is_nested_too_deeply(tmp_path: Path) -> None:
    inner = "{}"
    for _ in range(400):
        inner = f'{{"a":{inner}}}'
    with h5py.File(tmp_path / "model.weights.h5", "w") as file:
        file["layers/x"] = np.ones(1)
    with zipfile.ZipFile(tmp_path / "x.keras", "w") as archive:
        archive.write(tmp_path / "model.weights.h5", "model.weights.h5")
        archive.writestr("config.json", inner)
    with pytest.raises(StateError, match="nested"):
        holdfast.import_checkpoint(tmp_path / "x.keras", fresh_address())
    done = holdfast.import_checkpoint(tmp_path / "x.keras", fresh_address(), only="weights")
    assert done.tensors == 1
