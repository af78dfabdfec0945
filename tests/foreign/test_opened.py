"""The values of foreign files, beside what their own libraries wrote."""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file as save_torch

from holdfast.errors import DamagedObject, UnknownFile
from holdfast.foreign import open_foreign
from holdfast.foreign.data import ForeignObject, ForeignTensor
from holdfast.foreign.opened import objects_in
from tests.foreign import hostile
from tests.foreign.test_files import DTYPES
from tests.foreign.values import made, same, values_in


def torch_file(path: Path, value: Any, zipped: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning")
@pytest.mark.parametrize("zipped", [True, False])
def test_every_dtype(tmp_path: Path, zipped: bool) -> None:
    value = {}
    for name in DTYPES:
        size = torch.zeros(1, dtype=getattr(torch, name)).element_size()
        bits = torch.arange(6 * size, dtype=torch.uint8).reshape(2, 3 * size)
        value[name] = (
            bits.remainder(2).bool() if name == "bool" else bits.view(getattr(torch, name))
        )
    assert same(values_in(torch_file(tmp_path / "x.pt", value, zipped)), value)


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_in_every_layout(tmp_path: Path, zipped: bool) -> None:
    whole = torch.arange(60.0).reshape(3, 4, 5)
    value = {
        "whole": whole,
        "transposed": whole.permute(2, 0, 1),
        "rows": whole[1:],
        "columns": whole[:, 1:3, ::2],
        "expanded": torch.arange(3.0).expand(4, 3),
        "diagonal": torch.arange(16).reshape(4, 4).diagonal(),
        "windows": torch.arange(9).unfold(0, 4, 2),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "ones": torch.ones(1, 3, 1)[:, ::2],
    }
    assert same(values_in(torch_file(tmp_path / "x.pt", value, zipped)), value)


def test_tied_tensors_are_one(tmp_path: Path) -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    path = torch_file(tmp_path / "x.pt", {"a": weight, "b": weight.view(2, 3), "c": weight.T})
    with open_foreign(str(path)) as foreign:
        tree = foreign.tree()
    assert tree["a"] is tree["b"]
    assert tree["a"] is not tree["c"]


@pytest.mark.parametrize("zipped", [True, False])
def test_a_training_checkpoint(tmp_path: Path, zipped: bool) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    value = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "best": 0.5,
        "score": np.float64(0.25),
        "counts": collections.Counter("aab"),
        "sets": [{1, 2}, frozenset({3})],
        "numpy": np.random.RandomState(0).get_state(),
        "fortran": np.arange(6, dtype="<i2").reshape(2, 3).T,
        "big": np.arange(3, dtype=">f4"),
        "names": np.array(["ab", "c"]),
        "complex": 1 + 2j,
        "long": 1 << 200,
        "bytes": b"123",
        (1, "a"): None,
    }
    found = values_in(torch_file(tmp_path / "x.pt", value, zipped))
    value["score"], value["counts"] = 0.25, {"a": 2, "b": 1}
    value["big"] = np.arange(3, dtype="<f4")
    value["fortran"] = np.ascontiguousarray(value["fortran"])
    assert same(found, value)


def test_versions_of_modules_are_kept(tmp_path: Path) -> None:
    state = torch.nn.BatchNorm1d(2).state_dict()
    with open_foreign(str(torch_file(tmp_path / "x.pt", state))) as foreign:
        tree = foreign.tree()
    assert isinstance(tree, collections.OrderedDict)
    assert tree._metadata == {"": {"version": 2}}  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_no_plain_value_is_named(tmp_path: Path) -> None:
    dense = torch.ones(2, 2)
    value = {
        "module": torch.nn.Linear(1, 1),
        "path": Path("a"),
        "sparse": dense.to_sparse(),
        "quantized": torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8),
        "conjugate": torch.zeros(2, dtype=torch.complex64).conj(),
        "dtype": torch.float32,
        "objects": np.array([Path("a")], dtype=object),
        "call": hostile.Calls(eval, "open('pwned', 'w')"),
        "plain": 1,
    }
    path = torch_file(tmp_path / "x.pt", value)
    with open_foreign(str(path)) as foreign:
        tree = foreign.tree()
    assert dict(objects_in(tree)) == {
        "module": "torch.nn.modules.linear.Linear",
        "path": "pathlib.PosixPath",
        "sparse": "a tensor that is sparse_coo: 4 stored",
        "quantized": "a tensor that is qint8",
        "conjugate": "a tensor that is C64",
        "dtype": "torch.float32",
        "objects": "a NumPy array of objects",
        "call": "builtins.eval",
    }
    assert tree["plain"] == 1
    assert not (tmp_path / "pwned").exists()


def test_a_list_that_holds_itself(tmp_path: Path) -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"loop": loop}))
    with open_foreign(str(path)) as foreign:
        tree = foreign.tree()
    assert tree["loop"][0] == 1
    assert isinstance(tree["loop"][1], ForeignObject)


@pytest.mark.parametrize("protocol", range(5))
def test_arrays_in_a_pickle(tmp_path: Path, protocol: int) -> None:
    value = {"a": np.arange(6.0).reshape(2, 3), "b": [np.bool_(True), np.int16(-3)]}
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(value, protocol))
    assert same(values_in(path), {"a": value["a"], "b": [True, -3]})


# -- arrays ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.arange(24, dtype=np.int16).reshape(2, 3, 4)),
        np.arange(5, dtype=">i4"),
        np.array([1 + 2j, 3]),
        np.array(["ab", "c"]),
        np.array([True, False]),
        np.zeros((0, 3)),
        np.float32(1.5),
    ],
)
def test_npy(tmp_path: Path, array: Any) -> None:
    np.save(tmp_path / "x.npy", array)
    expected = np.ascontiguousarray(array).reshape(np.shape(array))
    if expected.dtype.byteorder == ">":
        expected = expected.astype("<i4")
    assert same(values_in(tmp_path / "x.npy"), {"array": expected})


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path: Path, save: Any) -> None:
    arrays = {"a": np.arange(300_000) % 7, "b": np.asfortranarray(np.eye(3, 2)), "c": np.ones(0)}
    save(tmp_path / "x.npz", **arrays)
    with open_foreign(str(tmp_path / "x.npz")) as foreign:
        assert foreign.check() == []
        found = made(foreign.tree(), piece=100_001)
        again = made(foreign.tree()["b"])  # backwards in the same entry
    arrays["b"] = np.ascontiguousarray(arrays["b"])
    assert same(found, arrays)
    assert same(again, arrays["b"])


def test_reading_backwards_in_a_packed_entry(tmp_path: Path) -> None:
    array = np.arange(200_000)
    np.savez_compressed(tmp_path / "x.npz", a=array)
    with open_foreign(str(tmp_path / "x.npz")) as foreign:
        tensor = foreign.tree()["a"]
        for at in (1_500_000, 0, 800_000, 799_992):
            piece = bytearray(8)
            tensor.data.read(at, memoryview(piece))
            assert int.from_bytes(piece, "little") == at // 8


def test_safetensors(tmp_path: Path) -> None:
    value = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(3, dtype=torch.bfloat16)}
    save_torch(value, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert same(values_in(tmp_path / "x.safetensors"), value)
    arrays = {"a": np.arange(6.0).reshape(2, 3)}
    save_numpy(arrays, tmp_path / "y.safetensors", metadata={"format": "np"})
    assert same(values_in(tmp_path / "y.safetensors"), arrays)


# -- what can be checked ----------------------------------------------------------


def checked(path: Path) -> list[str]:
    with open_foreign(str(path)) as foreign:
        return foreign.check()


def test_a_bit_in_a_tensor_is_found_by_the_crc(tmp_path: Path) -> None:
    path = torch_file(tmp_path / "x.pt", {"w": torch.full((100,), 3.0)})
    assert checked(path) == []
    data = bytearray(path.read_bytes())
    at = data.index(np.full(100, 3.0, np.float32).tobytes())
    data[at + 17] ^= 1
    path.write_bytes(data)
    assert checked(path) == ["its entry 'x/data/0' does not have its CRC-32"]
    assert values_in(path)["w"][4] != 3.0, "nothing but the CRC tells"


def test_a_file_without_crcs_says_so(tmp_path: Path) -> None:
    options = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = torch_file(tmp_path / "x.pt", {"w": torch.ones(3)})
    finally:
        torch.serialization.set_crc32_options(options)
    with zipfile.ZipFile(path) as archive, pytest.raises(zipfile.BadZipFile):
        archive.read("x/data/0")
    [problem] = checked(path)
    assert "CRC" in problem


def test_nothing_can_be_checked_of_tensors_in_old_files(tmp_path: Path) -> None:
    path = torch_file(tmp_path / "x.pt", {"w": torch.ones(3)}, zipped=False)
    with open_foreign(str(path)) as foreign:
        assert foreign.check() == []
        assert "no checksum at all" in foreign.proof.unchecked[0]
    path.write_bytes(path.read_bytes()[:-4])
    assert checked(path) == ["the bytes of its tensors are cut off"]
    with open_foreign(str(path)) as foreign, pytest.raises(DamagedObject, match="cut off"):
        foreign.tree()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_can_be_checked_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    torch.jit.script(torch.nn.Linear(2, 1)).save(str(path))
    with open_foreign(str(path)) as foreign:
        assert foreign.check() == []
        with pytest.raises(UnknownFile, match="it can be shown, and not more"):
            foreign.tree()


def test_a_tensor_of_any_size_made_of_one_element(tmp_path: Path) -> None:
    value = {"x": torch.zeros(1).expand(1 << 40), "y": torch.ones(1).expand(1000)}
    with open_foreign(str(torch_file(tmp_path / "x.pt", value))) as foreign:
        tree = foreign.tree()
    assert isinstance(tree["x"], ForeignObject)
    assert isinstance(tree["y"], ForeignTensor)


def test_one_list_a_billion_times(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(hostile.many_names_for_one(90))
    with open_foreign(str(path)) as foreign:
        assert isinstance(foreign.tree(), list)
        assert len(objects_in(foreign.tree())) == 0
    path.write_bytes(hostile.deep_lists(20_000))
    with open_foreign(str(path)) as foreign:
        [(_, name)] = objects_in(foreign.tree())
    assert "nested deeper than" in name


def test_an_entry_that_holds_less_than_it_says(tmp_path: Path) -> None:
    out = io.BytesIO()
    np.savez_compressed(out, a=np.arange(1000))
    data = bytearray(out.getvalue())
    for magic, at in ((b"PK\3\4", 22), (b"PK\1\2", 24)):
        where = data.find(magic) + at
        size = int.from_bytes(data[where : where + 4], "little")
        if size != 0xFFFFFFFF:
            data[where : where + 4] = (size + 8).to_bytes(4, "little")
    (tmp_path / "x.npz").write_bytes(data)
    try:
        problems = checked(tmp_path / "x.npz")
    except DamagedObject:
        return
    assert problems
