"""`python flow.py checkpoint …`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.metaflow.support import Metaflow


@pytest.fixture(params=["folder", "s3"])
def flows(request: pytest.FixtureRequest, tmp_path: Path) -> Metaflow:
    """With another datastore than the settings say."""
    if request.param == "s3":
        return request.getfixturevalue("metaflow_on_s3")
    return Metaflow(tmp_path, datastore=("--datastore-root", str(tmp_path / "elsewhere")))


def test_every_command(flows: Metaflow) -> None:
    flows.run("counting", DIES_AT="4")
    assert [line.get("loaded") for line in flows.told] == [0, 4, None]
    assert not list(flows.folder.glob(".metaflow/mf.holdfast"))
    run = flows.told[0]["run"]
    listed = flows.run("counting", "checkpoint", "ls", "--json").output
    (found,) = json.loads(listed[listed.index("{\n") :])["runs"]
    assert (found["checkpoints"], f"/start/task/{run}/main" in found["run"]) == (10, True)
    page = flows.run("counting", "checkpoint", "ls", "--run-id", run).output
    assert f"start/task of run {run}, main" in page
    assert "(mfchckpt, attempt 0)" in page
    shown = flows.run("counting", "checkpoint", "show", f"{found['run']}@7").output
    assert re.search(r"metrics +count 7", shown)
    verified = flows.run("counting", "checkpoint", "verify", "--step", "start").output
    assert "10 checkpoints verified, all intact." in verified
    pruned = flows.run("counting", "checkpoint", "prune", "--keep", "last=2").output
    assert "Removed 8 checkpoints, kept 2" in pruned
    assert "Nothing to remove" in flows.run("counting", "checkpoint", "gc").output
    for other in (["--run-id", "1"], ["--step", "end"]):
        none = flows.run("counting", "checkpoint", "verify", *other, status=10).output
        assert "has no such checkpoints" in none
    as_json = flows.run("counting", "checkpoint", "ls", "--json", "--step", "end", status=10).output
    assert json.loads(as_json[as_json.index("{") :])["exit_code"] == 10


def test_damage_is_told_by_the_exit_status(metaflow: Metaflow) -> None:
    metaflow.run("counting")
    pack = next(metaflow.folder.glob(".metaflow/mf.holdfast/Counting/**/*.safetensors"))
    data = bytearray(pack.read_bytes())
    data[-1] ^= 1
    pack.write_bytes(data)
    assert "damaged" in metaflow.run("counting", "checkpoint", "verify", status=4).output
