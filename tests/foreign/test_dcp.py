"""Folders that PyTorch's own torch.distributed.checkpoint wrote."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from holdfast.errors import DamagedObject, UnknownFile
from holdfast.foreign import dcp as ours
from holdfast.foreign import is_foreign, open_foreign
from tests.foreign import hostile
from tests.foreign.values import same, values_in

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def state() -> dict[str, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW(model[0].parameters())
    model[0](torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {
        "model": {**model.state_dict(), "transposed": torch.arange(6.0).reshape(2, 3).T},
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "history": [1, "a", [2.5, None]],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    state_dict_saver.save(state(), checkpoint_id=tmp_path / "dcp")
    return tmp_path / "dcp"


def checked(folder: Path) -> list[str]:
    with open_foreign(str(folder)) as foreign:
        return foreign.check()


def test_values_are_those_that_were_saved(folder: Path) -> None:
    assert is_foreign(str(folder))
    expected = state()
    # DCP itself makes texts of the numbers that the parameters of an optimizer have.
    numbered = expected["optimizer"]["state"]
    expected["optimizer"]["state"] = {str(key): value for key, value in numbered.items()}
    found = values_in(folder)
    assert same(found["model"], expected["model"])
    assert same(
        dict(sorted(found["optimizer"].items())), dict(sorted(expected["optimizer"].items()))
    )
    assert (found["epoch"], found["history"]) == (3, [1, "a", [2.5, None]])


def test_it_is_described(folder: Path) -> None:
    with open_foreign(str(folder)) as foreign:
        file = foreign.file
        assert foreign.check() == []
    assert (file.kind, file.runs, file.problems) == ("PyTorch DCP (folder)", (), ())
    leaves = {leaf.path: (leaf.dtype, leaf.shape) for leaf in file.leaves}
    assert leaves["model/1.weight"] == ("BF16", (1, 4))
    values = dict(file.values)
    assert values["epoch"] == "3"
    assert values["optimizer/param_groups/0/lr"] == "0.001"


def test_code_in_a_value_is_named_and_not_run(tmp_path: Path) -> None:
    """PyTorch loads values of a DCP folder without restrictions."""
    value = {"x": torch.zeros(1), "y": hostile.Calls(os.mkdir, f"{tmp_path}/pwned")}
    state_dict_saver.save({"x": value["x"], "y": [value["y"]]}, checkpoint_id=tmp_path / "dcp")
    with open_foreign(str(tmp_path / "dcp")) as foreign:
        assert foreign.file.runs == ("posix.mkdir",)
        foreign.tree()
    assert not (tmp_path / "pwned").exists()


# -- boxes ------------------------------------------------------------------------

WHOLE = torch.arange(5 * 7 * 2, dtype=torch.int32).reshape(5, 7, 2)


def write_boxes(folder: Path, boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    """A tensor in boxes, as ranks of a mesh would write it."""
    folder.mkdir()
    storage: dict[MetadataIndex, _StorageInfo] = {}
    chunks: list[ChunkStorageMetadata] = []
    for number, (start, shape) in enumerate(boxes):
        place = tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))
        out = io.BytesIO()
        torch.save(WHOLE[place].clone(), out)
        name = f"__{number}_0.distcp"
        (folder / name).write_bytes(out.getvalue())
        index = MetadataIndex("x", torch.Size(start), number)
        storage[index] = _StorageInfo(name, 0, len(out.getvalue()))
        chunks.append(ChunkStorageMetadata(torch.Size(start), torch.Size(shape)))
    properties = TensorProperties.create_from_tensor(WHOLE)
    tensor = TensorStorageMetadata(properties, WHOLE.shape, chunks)
    metadata = Metadata({"x": tensor}, {"x": ("x",)}, storage)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


QUARTERS = [
    ((0, 0, 0), (2, 3, 2)),
    ((0, 3, 0), (2, 4, 2)),
    ((2, 0, 0), (3, 3, 2)),
    ((2, 3, 0), (3, 4, 2)),
]


@pytest.mark.parametrize(
    "boxes",
    [
        QUARTERS,
        [((row, 0, 0), (1, 7, 2)) for row in range(5)],
        [((0, 0, 0), (5, 7, 1)), ((0, 0, 1), (5, 7, 1))],
        [((0, 0, 0), (5, 7, 2))],
        [((0, 0, 0), (3, 7, 2)), ((3, 0, 0), (2, 7, 2)), ((5, 0, 0), (0, 7, 2))],
    ],
    ids=["quarters", "rows", "last", "one", "an empty one"],
)
def test_boxes_are_put_together(tmp_path: Path, boxes: Any) -> None:
    write_boxes(tmp_path / "dcp", boxes)
    assert checked(tmp_path / "dcp") == []
    assert same(values_in(tmp_path / "dcp"), {"x": WHOLE})
    live = {"x": torch.zeros_like(WHOLE)}
    state_dict_loader.load(live, checkpoint_id=tmp_path / "dcp")
    assert torch.equal(live["x"], WHOLE), "PyTorch reads it in the same way"


def test_boxes_that_overlap_and_leave_a_hole(tmp_path: Path) -> None:
    """As many elements as the tensor has, but not all of them."""
    write_boxes(tmp_path / "dcp", [((0, 0, 0), (3, 7, 2)), ((1, 0, 0), (2, 7, 2))])
    assert checked(tmp_path / "dcp") == []
    with pytest.raises(DamagedObject, match="leave holes"):
        values_in(tmp_path / "dcp")


def test_more_files_than_can_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "_OPEN_FILES", 1)
    write_boxes(tmp_path / "dcp", QUARTERS)
    assert same(values_in(tmp_path / "dcp"), {"x": WHOLE})


_RANKS = """
import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor, Replicate
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}.sync", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
whole = torch.arange(35.).reshape(5, 7)
dcp.save({"rows": distribute_tensor(whole, mesh, [Shard(0)]),
          "columns": distribute_tensor(whole, mesh, [Shard(1)]),
          "all": distribute_tensor(whole, mesh, [Replicate()])}, checkpoint_id=folder)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_with_sharded_tensors(tmp_path: Path) -> None:
    folder = tmp_path / "dcp"
    ranks = [
        subprocess.Popen([sys.executable, "-c", _RANKS, str(rank), str(folder)])
        for rank in range(2)
    ]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    whole = torch.arange(35.0).reshape(5, 7)
    assert len(list(folder.glob("*.distcp"))) == 2
    assert checked(folder) == []
    assert same(values_in(folder), {"rows": whole, "columns": whole, "all": whole})


# -- damage ---------------------------------------------------------------------


def test_a_bit_is_found(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    at = data.index(torch.arange(6.0).numpy().tobytes())
    data[at] ^= 1
    path.write_bytes(data)
    [problem] = checked(folder)
    assert "model.transposed: its entry" in problem
    assert "CRC-32" in problem


def test_files_that_are_cut_off_or_missing(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    assert any("beyond the end of __0_0.distcp" in problem for problem in checked(folder))
    path.unlink()
    assert "__0_0.distcp is missing" in checked(folder)
    with open_foreign(str(folder)) as foreign, pytest.raises(DamagedObject):
        foreign.tree()


def changed(folder: Path, change: Any) -> None:
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def test_metadata_that_lies(tmp_path: Path) -> None:
    def swapped(metadata: Metadata) -> None:
        [*_, last] = metadata.storage_data
        metadata.storage_data[last] = metadata.storage_data[next(iter(metadata.storage_data))]

    write_boxes(tmp_path / "a", QUARTERS)
    changed(tmp_path / "a", swapped)
    assert any("is not I32[3, 4, 2] there" in problem for problem in checked(tmp_path / "a"))
    assert "__0_0.distcp: the bytes of x and x overlap" in checked(tmp_path / "a")

    def smaller(metadata: Any) -> None:
        metadata.state_dict_metadata["x"].chunks.pop()

    write_boxes(tmp_path / "b", QUARTERS)
    changed(tmp_path / "b", smaller)
    assert "x: its parts have 46 elements of 70" in checked(tmp_path / "b")

    def outside(metadata: Any) -> None:
        metadata.state_dict_metadata["x"].size = torch.Size([1 << 40, 7, 2])

    write_boxes(tmp_path / "c", QUARTERS)
    changed(tmp_path / "c", outside)
    assert any("its parts have 70 elements" in problem for problem in checked(tmp_path / "c"))


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", ""])
def test_files_elsewhere_are_not_opened(tmp_path: Path, name: str) -> None:
    write_boxes(tmp_path / "dcp", QUARTERS)

    def rename(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = name

    changed(tmp_path / "dcp", rename)
    with pytest.raises(DamagedObject, match="it names a file elsewhere"):
        open_foreign(str(tmp_path / "dcp"))


def test_what_was_transformed_is_refused(tmp_path: Path) -> None:
    write_boxes(tmp_path / "dcp", QUARTERS)

    def compress(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            info.transform_descriptors = ["zstd"]

    changed(tmp_path / "dcp", compress)
    assert all("was transformed" in problem for problem in checked(tmp_path / "dcp"))
    with pytest.raises(UnknownFile, match="was transformed"):
        values_in(tmp_path / "dcp")


@pytest.mark.parametrize(
    "data", [b"", b"\x80\x04N.", hostile.SYSTEM, pickle.dumps([1]), hostile.deep_lists(10_000)]
)
def test_metadata_of_others(tmp_path: Path, data: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(data)
    with pytest.raises(DamagedObject):
        open_foreign(str(tmp_path))
