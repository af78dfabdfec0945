"""The commands on runs in a bucket: the same as on those in a folder."""

from __future__ import annotations

import errno
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

import holdfast
from holdfast.manager.history import EndEvent, StartEvent, append_outside
from holdfast.stores import object_blocks
from holdfast.stores.filesystem import OsFileSystem
from holdfast.stores.open import open_store
from tests.cli.conftest import Command, failed
from tests.support.servers.service import Place


def at(place: Place, path: str) -> str:
    return place.address.replace(place.prefix, f"{place.prefix}/{path}".rstrip("/"), 1)


def save(address: str, *steps: int) -> None:
    with holdfast.CheckpointManager(address, keep=None) as ckpts:
        for step in steps:
            values = {"x": np.full(2000, step)}
            ckpts.save(step, values, metrics={"loss": 1 / step}, block=True)


@pytest.fixture(params=["s3", "gcs"])
def bucket(request: pytest.FixtureRequest) -> Place:
    return request.getfixturevalue(request.param)


def test_the_runs_below_a_prefix(bucket: Place, holdfast_cli: Command) -> None:
    task = "metaflow/mf.holdfast/Train/fit/task-3/7/main"
    for path in ["mnist", "2026/gpt/seed-1", "2026/gpt/seed-2", "too/deep/to/be/found", task]:
        save(at(bucket, path), 1, 2)
    found = holdfast_cli("ls", bucket.address, "--json").json
    expected = ["2026/gpt/seed-1", "2026/gpt/seed-2", task, "mnist"]
    assert [run["run"] for run in found["runs"]] == [at(bucket, path) for path in expected]
    lines = holdfast_cli("ls", at(bucket, "2026")).out.splitlines()
    assert len(lines) >= 3
    assert "no checkpoint" in failed(holdfast_cli("ls", at(bucket, "nothing")), 10)


def test_every_command(bucket: Place, holdfast_cli: Command, tmp_path: Path) -> None:
    run = at(bucket, "run")
    save(run, 1, 2, 3)
    assert holdfast_cli("ls", run).out.count("\n") == 5
    assert holdfast_cli("verify", run).out.endswith("3 checkpoints verified, all intact.\n")
    assert "x" in holdfast_cli("show", f"{run}@2").out
    assert holdfast_cli("diff", f"{run}@1", f"{run}@2").status == 5
    assert holdfast_cli("diff", f"{run}@2", f"{run}@2").status == 0
    assert holdfast_cli("tag", f"{run}@2", "good").status == 0
    assert holdfast_cli("pin", f"{run}@1").status == 0
    assert holdfast_cli("doctor", run).status == 0
    assert holdfast_cli("stats", run).out.count("\n") > 3
    assert holdfast_cli("export", f"{run}@good", tmp_path / "good.safetensors").status == 0
    assert holdfast_cli("restore", f"{run}@good", tmp_path / "files").status == 0
    assert holdfast_cli("prune", run, "--keep", "last=1").status == 0
    steps = [row["step"] for row in holdfast_cli("ls", run, "--json").json["checkpoints"]]
    assert steps == [3, 2, 1]  # the newest, the tagged one, the pinned one
    assert holdfast_cli("gc", run).status == 0
    assert holdfast_cli("rm", f"{run}@2", "--force").status == 0
    loaded = holdfast.open(f"{run}@latest")
    assert np.array_equal(loaded["x"], np.full(2000, 3))


def test_a_bucket_that_is_not_there(s3: Place, holdfast_cli: Command) -> None:
    address = s3.address.replace("s3://bucket/", "s3://nobucket/")
    for command in ("ls", "verify", "doctor"):
        assert "does not exist" in failed(holdfast_cli(command, address), 1)


def test_a_copy_that_has_no_room_for_its_packs_changes_nothing(
    s3: Place, holdfast_cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packs of a run in a folder can be large: each is put together in TMPDIR first."""
    monkeypatch.setattr(object_blocks, "IN_MEMORY_BYTES", 1000)
    save(str(tmp_path / "run"), 1, 2)
    room = OsFileSystem.allocate

    def full(fs: OsFileSystem, fd: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(OsFileSystem, "allocate", full)
    done = holdfast_cli("cp", tmp_path / "run", s3.address)
    assert f"written in {tempfile.gettempdir()}: No space left on device" in failed(done, 1)
    assert "Hint: Set TMPDIR to a folder with room for several files of" in done.err
    assert list(open_store(s3.address).list("")) == []
    monkeypatch.setattr(OsFileSystem, "allocate", room)
    assert holdfast_cli("cp", tmp_path / "run", s3.address).status == 0
    assert holdfast_cli("verify", s3.address).status == 0


def test_where_the_time_went(bucket: Place, holdfast_cli: Command) -> None:
    """A run in a bucket sends no beats; who watched over its process adds how it ended."""
    address = at(bucket, "trained")
    run = holdfast.Run(address, every=5, quiet=True)
    for step in run.range(20):
        if step == 12:
            break
    run.close()
    assert append_outside(address, [EndEvent(time_s=time.time(), why="hang", signal=9)])
    value = holdfast_cli("stats", address, "--json").json
    [start] = value["starts"]
    assert (start["from_step"], start["to_step"], start["end"]) == (0, 12, "hang")
    assert value["goodput"]["failures"] == {"hang": 1}
    with holdfast.CheckpointManager(address) as manager:
        [begun] = [event for event in manager.events() if isinstance(event, StartEvent)]
    assert begun.beat_s == 0
