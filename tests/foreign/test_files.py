"""Real files, as PyTorch, safetensors and NumPy write them."""

from __future__ import annotations

import argparse
import collections
import io
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from holdfast.errors import DamagedObject, UnknownFile, UsageError
from holdfast.foreign import FileSource, ForeignFile, describe
from holdfast.foreign.source import BytesSource
from tests.foreign.hostile import torch_zip


def look(data: bytes) -> ForeignFile:
    return describe(BytesSource(data))


def saved(value: Any, **how: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, **how)
    return out.getvalue()


def leaves(file: ForeignFile) -> dict[str, tuple[str, tuple[int, ...], int]]:
    return {leaf.path: (leaf.dtype, leaf.shape, leaf.nbytes) for leaf in file.leaves}


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
        self.head = torch.nn.Linear(3, 2, dtype=torch.bfloat16)


# -- PyTorch ------------------------------------------------------------------

DTYPES = {
    "float32": "F32",
    "float64": "F64",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "bool": "BOOL",
    "complex64": "C64",
    "complex128": "complex128",
    "complex32": "complex32",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}


@pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning")
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(("name", "shown"), DTYPES.items())
def test_every_dtype(name: str, shown: str, zipped: bool) -> None:
    tensor = torch.zeros(2, 3, dtype=getattr(torch, name))
    file = look(saved({"x": tensor}, _use_new_zipfile_serialization=zipped))
    assert leaves(file) == {"x": (shown, (2, 3), 6 * tensor.element_size())}
    assert (file.runs, file.problems, file.notes) == ((), (), ())
    assert file.kind == ("PyTorch (zip)" if zipped else "PyTorch (before 1.6)")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict(zipped: bool) -> None:
    model = Net()
    file = look(saved(model.state_dict(), _use_new_zipfile_serialization=zipped))
    assert list(leaves(file)) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        _, shape, nbytes = leaves(file)[name]
        assert (shape, nbytes) == (tuple(tensor.shape), tensor.nbytes)
    assert leaves(file)["head.weight"][0] == "BF16"
    assert (file.runs, file.values) == ((), ()), "the versions of its modules are no values"


def test_a_training_checkpoint() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    value = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "best": 0.5,
        "args": argparse.Namespace(lr=0.1, name="x"),
        "rng": torch.get_rng_state(),
        "numpy": np.random.RandomState(0).get_state(),
        "counts": collections.Counter("aab"),
        "shape": torch.Size([2, 3]),
        "where": torch.device("cpu"),
        "kinds": {1, 2},
        "score": np.float64(0.25),
        "path": Path("a/b"),
    }
    file = look(saved(value))
    assert file.runs == ()
    found = leaves(file)
    assert found["model/weight"] == ("F32", (2, 3), 24)
    assert found["optimizer/state/[0]/exp_avg"] == ("F32", (2, 3), 24)
    assert found["rng"][0] == "U8"
    assert found["numpy/1"] == ("U32", (624,), 2496)
    said = dict(file.values)
    assert said["epoch"] == "3"
    assert said["best"] == "0.5"
    assert said["args/lr"] == "0.1"
    assert said["optimizer/param_groups/0/betas"] == "(0.9, 0.999)"
    assert said["score"] == "0.25"
    assert said["counts/a"] == "2"
    assert said["kinds"] == "[1, 2]"
    assert said["shape"] == "<torch.Size [2, 3]>"
    assert said["where"] == "<device cpu>"


def test_tensors_that_share_their_storage() -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    file = look(
        saved({"a": whole, "b": whole[1:], "c": whole, "d": whole.view(3, 4), "e": whole.T})
    )
    assert {leaf.path: leaf.note for leaf in file.leaves} == {
        "a": "",
        "b": "shares data with a",
        "c": "the same tensor as a",
        "d": "same data as a",
        "e": "shares data with a",
    }
    assert file.problems == ()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_of_unusual_kinds() -> None:
    dense = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    value = {
        "coo": dense.to_sparse(),
        "csr": dense.to_sparse_csr(),
        "tensorwise": torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8),
        "channelwise": torch.quantize_per_channel(
            dense, torch.ones(2), torch.zeros(2), 0, torch.quint8
        ),
        "meta": torch.zeros(5, device="meta"),
        "nested": torch.nested.nested_tensor([dense, dense[:1]]),
        "parameter": torch.nn.Parameter(dense),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(1.5),
        "conjugate": torch.zeros(2, dtype=torch.complex64).conj(),
        "packed": torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    }
    file = look(saved(value))
    assert file.runs == ()
    assert file.problems == ()
    assert {leaf.path: (leaf.dtype, leaf.shape, leaf.note) for leaf in file.leaves} == {
        "coo": ("F32", (2, 2), "sparse_coo: 2 stored"),
        "csr": ("F32", (2, 2), "sparse_csr: 2 stored"),
        "tensorwise": ("qint8", (2, 2), ""),
        "channelwise": ("quint8", (2, 2), ""),
        "meta": ("F32", (5,), "meta: without data"),
        "nested": ("F32", (6,), "nested: all of its tensors in a row"),
        "parameter": ("F32", (2, 2), ""),
        "empty": ("F32", (0, 4), ""),
        "scalar": ("F32", (), ""),
        "conjugate": ("C64", (2,), ""),
        "packed": ("float4_e2m1fn_x2", (2,), ""),
    }


def test_a_whole_module_needs_its_code() -> None:
    file = look(saved(Net()))
    assert file.runs == (
        "tests.foreign.test_files.Net",
        "torch.nn.modules.container.Sequential",
        "torch.nn.modules.linear.Linear",
        "torch.nn.modules.batchnorm.BatchNorm1d",
    )
    found = leaves(file)
    weight = "_modules/body/_modules/0/_parameters/weight"
    assert found[weight] == ("F32", (3, 4), 48)
    assert dict(file.values)["_modules/body/_modules/0/in_features"] == "4"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    torch.jit.script(torch.nn.Linear(2, 1)).save(str(path))
    file = look(path.read_bytes())
    assert file.kind == "TorchScript (zip)"
    assert file.runs[0] == "TorchScript: a program of its own"


def test_a_storage_of_another_size_is_damage() -> None:
    whole = saved({"x": torch.zeros(4)})
    at = whole.find(b"K\x04tq")  # the storage's number of elements
    file = look(whole[: at + 1] + b"\x05" + whole[at + 2 :])
    assert file.problems == ("storage '0' has 16 bytes instead of 20",)
    size = b"K\x00K\x04\x85"  # offset 0, size (4,)
    assert size in whole
    file = look(whole.replace(size, b"K\x00K\x05\x85"))
    assert file.problems == ("x: it reaches beyond its storage",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_is_cut_off(zipped: bool) -> None:
    whole = saved({"x": torch.zeros(100)}, _use_new_zipfile_serialization=zipped)
    for end in range(1, len(whole) - 1, 7):
        try:
            file = look(whole[:end])
        except (DamagedObject, UnknownFile):
            continue
        assert file.problems, end


def test_a_file_of_the_first_versions() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in {
            "sys_info": pickle.dumps({"protocol_version": 1000}, 2),
            "pickle": b"\x80\x02cos\nsystem\nq\x00.",
            "tensors": b"",
            "storages": b"",
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    file = look(out.getvalue())
    assert file.kind == "PyTorch (tar, of 2016)"
    assert file.runs == ("os.system",)
    assert "not listed" in file.notes[0]


# -- safetensors and NumPy ------------------------------------------------------


def test_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    arrays = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(5, np.int64)}
    save_file(arrays, path, metadata={"format": "np"})
    with FileSource(str(path)) as source:
        file = describe(source)
    assert file.kind == "safetensors"
    assert leaves(file) == {"a": ("F32", (2, 3), 24), "b": ("I64", (5,), 40)}
    assert file.values == (("metadata/format", "np"),)


def npy(value: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, value)
    return out.getvalue()


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (np.zeros((2, 3)), "F64"),
        (np.zeros((2, 3), np.float16, order="F"), "F16"),
        (np.zeros(3, bool), "BOOL"),
        (np.zeros(3, ">i4"), ">i4"),
        (np.zeros(3, complex), "complex128"),
        (np.array(["ab", "c"]), "<U2"),
        (np.array(["2020-01-01"], "M8[D]"), "<M8[D]"),
        (np.float32(1), "F32"),
    ],
)
def test_npy(array: Any, dtype: str) -> None:
    file = look(npy(array))
    assert file.kind == "NumPy array"
    assert leaves(file) == {"": (dtype, np.shape(array), array.nbytes)}
    with pytest.raises(DamagedObject, match="does not fit"):
        look(npy(array) + b"x")


def test_npy_of_records_and_objects() -> None:
    assert leaves(look(npy(np.zeros(2, [("a", "<f4"), ("b", "<i2")])))) == {
        "": ("record", (2,), 12)
    }
    file = look(npy(np.array([Path("x"), 2], dtype=object)))
    assert file.leaves[0].note == "pickled objects"
    assert file.runs == ()
    file = look(npy(np.array([Net], dtype=object)))
    assert file.runs == ("tests.foreign.test_files.Net",)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(save: Any) -> None:
    out = io.BytesIO()
    save(out, a=np.zeros(1000), b=np.ones((2, 2), np.int8), c=np.array([Net], dtype=object))
    file = look(out.getvalue())
    assert file.kind == "NumPy archive"
    assert leaves(file)["a"] == ("F64", (1000,), 8000)
    assert leaves(file)["b"] == ("I8", (2, 2), 4)
    assert file.runs == ("tests.foreign.test_files.Net",)


# -- which kind ------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(6))
def test_a_plain_pickle(protocol: int) -> None:
    value = {"a": [1, 2.5, "x"], "b": None, "c": (True, b"123"), "d": 1 << 200}
    file = look(pickle.dumps(value, protocol))
    assert file.kind == "pickle"
    assert dict(file.values)["b"] == "none"
    assert dict(file.values)["a"] == "[1, 2.5, x]"
    assert dict(file.values)["d"] == "<a whole number of 201 bits>"
    assert file.problems == ()
    assert file.runs == ()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "of an unknown kind"),
        (b"hello, world", "of an unknown kind"),
        (b"(this is text)\nand more of it\n", "of an unknown kind"),
        (b"GGUF\x03\0\0\0", "a GGUF file"),
        (b"\x1f\x8b\x08", "unpack it first"),
    ],
)
def test_other_files(data: bytes, says: str) -> None:
    with pytest.raises(UnknownFile, match=says):
        look(data)


def test_zips_of_others() -> None:
    with pytest.raises(UnknownFile, match="neither PyTorch's nor NumPy's"):
        look(torch_zip(b"").replace(b"data.pkl", b"data.txt"))


def test_only_regular_files(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UsageError, match="not a regular file"):
        FileSource(str(pipe))
    with pytest.raises(UsageError, match="not a regular file"):
        FileSource(str(tmp_path))
