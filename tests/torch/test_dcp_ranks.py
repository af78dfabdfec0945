"""DCP's saves and loads of several ranks, through Holdfast's storage."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import holdfast
from holdfast.torch.dcp import StorageReader
from tests.support import dcp_jobs as jobs
from tests.support.forked_ranks import run_ranks, values
from tests.support.servers.service import Place

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def expected(step: int, changed: int = 0) -> dict[str, Any]:
    return {
        "a.weight": jobs.full(1).tolist(),
        "b.weight": (jobs.full(2) + changed).tolist(),
        "plain": [1.0] * 3,
        "step": step,
    }


def test_shards_are_one_checkpoint_for_everybody(tmp_path: Path) -> None:
    address = str(tmp_path / "run")
    values(run_ranks(jobs.save, address, 5, "rows"))

    loaded = holdfast.open(address)
    assert torch.equal(loaded["model"]["a.weight"], jobs.full(1))
    assert loaded["rank1"]["note"].endswith("x1")
    assert loaded["rank0"]["twice"] == ({"n": 0}, {"n": 0})
    for rank in (0, 1):
        first, second = loaded[f"rank{rank}"]["twice"]
        assert first is second
        assert first == {"n": rank}
    with holdfast.CheckpointManager(address) as ckpts:
        assert ckpts.verify()[0].ok
        assert ckpts.manifest().world_size == 2
        ranks = {pack.name.split("-")[2] for pack in ckpts.manifest().packs}
        assert ranks == {"0", "1"}


@pytest.mark.parametrize("saved", ["grid", "hsdp"])
def test_any_layout_loads_as_any_other(tmp_path: Path, saved: str) -> None:
    address = str(tmp_path / "run")
    values(run_ranks(jobs.save, address, 5, saved, size=4))
    for layout, size in [("columns", 2), ("hsdp", 4), ("rows", 3), ("whole", 2)]:
        for found in values(run_ranks(jobs.load, f"{address}@5", layout, size=size)):
            assert found == expected(5)
    alone = {"model": {"a.weight": torch.zeros(7, 5)}}
    jobs.dcp.load(alone, storage_reader=StorageReader(address))
    assert torch.equal(alone["model"]["a.weight"], jobs.full(1))


def test_the_commands_take_shards_for_tensors(tmp_path: Path) -> None:
    address, alone = str(tmp_path / "run"), str(tmp_path / "alone")
    values(run_ranks(jobs.save, address, 5, "columns"))
    model = {"a.weight": jobs.full(1), "b.weight": jobs.full(2), "plain": torch.ones(3)}
    with holdfast.CheckpointManager(alone) as one, holdfast.CheckpointManager(address) as both:
        one.save(5, {"model": model}).result()
        compared = both.compare(None, one, None, values=True)
        state = {item.path for item in compared.differences if item.section == "state"}
        assert {path.split("/")[0] for path in state} == {"step", "rank0", "rank1"}
        both.export_tensors(5, tmp_path / "a.safetensors", only="model")
        live = {name: torch.zeros_like(tensor) for name, tensor in model.items()}
        both.restore(into={"model": live}, only=["model"])
    exported = safetensors.torch.load_file(tmp_path / "a.safetensors")
    for name, tensor in model.items():
        assert torch.equal(exported[name], tensor)
        assert torch.equal(live[name], tensor)


def test_a_folder_that_is_not_shared_is_noticed(tmp_path: Path) -> None:
    told = values(run_ranks(jobs.apart, str(tmp_path / "run")))
    assert told[0] == told[1]
    assert "what rank 1 has written is not in" in told[0]
    with holdfast.CheckpointManager(tmp_path / "run0") as ckpts:
        assert ckpts.checkpoints() == []


def test_what_has_not_changed_is_not_written_again(tmp_path: Path) -> None:
    address = str(tmp_path / "run")
    values(run_ranks(jobs.twice, address, "rows"))
    with holdfast.CheckpointManager(address) as ckpts:
        first, second = ckpts.checkpoints()
        assert second.nbytes == first.nbytes
        base = {pack.name for pack in ckpts.manifest(first.step).packs}
        manifest = ckpts.manifest(second.step)
        new = {
            leaf.path
            for leaf in manifest.leaves
            if any(manifest.packs[chunk.pack].name not in base for chunk in leaf.chunks)
        }
        assert new == {"model/b.weight"}
        assert all(one.ok for one in ckpts.verify())


def test_fsdp_goes_on_as_if_it_had_not_been_stopped(tmp_path: Path) -> None:
    whole = values(run_ranks(jobs.fsdp, str(tmp_path / "whole"), 3, 5))
    values(run_ranks(jobs.fsdp, str(tmp_path / "parts"), 3))
    assert values(run_ranks(jobs.fsdp, str(tmp_path / "parts"), 3, 5)) == whole
    loaded = holdfast.open(tmp_path / "parts")
    assert set(loaded["optim"]["state"]) == set(loaded["model"])


def test_a_save_goes_on_beside_the_training(tmp_path: Path) -> None:
    whole = values(run_ranks(jobs.fsdp, str(tmp_path / "whole"), 3, 5))
    assert values(run_ranks(jobs.fsdp, str(tmp_path / "run"), 3, 5, "THREAD")) == whole
    assert values(run_ranks(jobs.fsdp, str(tmp_path / "run"), 3, 5)) == whole


@pytest.mark.slow
def test_a_save_goes_on_in_another_process(tmp_path: Path) -> None:
    whole = values(run_ranks(jobs.fsdp, str(tmp_path / "whole"), 3, 5))
    assert values(run_ranks(jobs.fsdp, str(tmp_path / "run"), 3, 5, "PROCESS")) == whole
    assert values(run_ranks(jobs.fsdp, str(tmp_path / "run"), 3, 5)) == whole


@pytest.mark.parametrize(
    ("who", "place"),
    [(0, "before writing"), (1, "after writing"), (0, "before the commit")],
)
def test_a_killed_rank_leaves_what_was_there(tmp_path: Path, who: int, place: str) -> None:
    address = str(tmp_path / "run")
    values(run_ranks(jobs.dying, address, 1, 0, "nowhere"))
    ended = run_ranks(jobs.dying, address, 2, who, place)
    assert ended[who].status == -9
    assert ended[1 - who].error  # and it does not hang

    with holdfast.CheckpointManager(address) as ckpts:
        assert [one.step for one in ckpts.checkpoints()] == [1]
    packs = set((tmp_path / "run/packs").iterdir())
    written = place != "before writing"
    assert len(packs) > 2 or not written
    values(run_ranks(jobs.dying, address, 2, 0, "nowhere"))
    with holdfast.CheckpointManager(address) as ckpts:
        assert [one.step for one in ckpts.checkpoints()] == [1, 2]
        assert all(one.ok for one in ckpts.verify())
        needed = {pack.name for ref in (1, 2) for pack in ckpts.manifest(ref).packs}
    left = {file.name.removesuffix(".safetensors") for file in (tmp_path / "run/packs").iterdir()}
    assert left == needed


def test_a_commit_whose_reply_nobody_got_is_there(tmp_path: Path) -> None:
    address = str(tmp_path / "run")
    ended = run_ranks(jobs.dying, address, 1, 0, "after the commit")
    assert (ended[0].status, bool(ended[1].error)) == (-9, True)
    assert torch.equal(holdfast.open(address)["w"], jobs.full(1))


def test_all_ranks_are_told_what_one_cannot_save(tmp_path: Path) -> None:
    told = values(run_ranks(jobs.refused, str(tmp_path / "run")))
    assert told[0] == told[1]
    assert "odd1" in told[0]
    assert "allow_pickle" in told[0]
    with holdfast.CheckpointManager(tmp_path / "run") as ckpts:
        assert [one.step for one in ckpts.checkpoints()] == [2]
        needed = {f"{pack.name}.safetensors" for pack in ckpts.manifest().packs}
    # What rank 0 had written for the first one is gone.
    assert {file.name for file in (tmp_path / "run/packs").iterdir()} == needed


def test_all_ranks_are_told_what_one_cannot_load(tmp_path: Path) -> None:
    address = str(tmp_path / "run")
    values(run_ranks(jobs.save, address, 5, "rows"))
    told = values(run_ranks(jobs.lost, address))
    assert told[0] == told[1]
    assert told[0].startswith("{1: ")
    assert "run-elsewhere" in told[0]


def test_ranks_save_to_a_bucket(s3: Place) -> None:
    environment = {k: v for k, v in os.environ.items() if k.startswith("AWS")}
    for found in values(run_ranks(jobs.over_s3, s3.address, environment)):
        assert found == expected(5)
    with holdfast.CheckpointManager(s3.address) as ckpts:
        assert ckpts.verify()[0].ok
