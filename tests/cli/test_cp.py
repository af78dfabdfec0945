"""`holdfast cp`, `holdfast sync` and `holdfast verify --repair-from`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.cli.transfer import report, transfers_text
from holdfast.manager.info import CheckpointInfo, Transfer
from holdfast.repo.repo import Repo
from holdfast.stores.local import LocalStore
from tests.cli.conftest import Command, failed, flip, newest_pack, same_error_as_json, tidy


def listed(address: Path) -> list[int]:
    with holdfast.CheckpointManager(address, keep=None) as manager:
        assert all(found.ok for found in manager.verify())
        return [info.step for info in manager.checkpoints()]


def lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def pack_with(address: Path, step: int, leaf: str) -> Path:
    repo = Repo(LocalStore(address))
    manifest = repo.manifest(next(r for r in repo.records() if r.step == step))
    [chunk] = next(found for found in manifest.leaves if found.path == leaf).chunks
    return address / "packs" / f"{manifest.packs[chunk.pack].name}.safetensors"


# -- cp ----------------------------------------------------------------------------------


def test_cp_of_one_of_some_and_of_all(run: Path, tmp_path: Path, holdfast_cli: Command) -> None:
    to = tmp_path / "to"
    done = holdfast_cli("cp", f"{run}@best:val_loss", to)
    assert (done.status, done.err) == (0, "")
    assert tidy(done.out).splitlines()[0].split() == ["ACTION", "STEP", "ID", "SIZE", "WHY"]
    assert lines(tidy(done.out))[1][:3] == ["copied", "200", "<id>"]
    assert done.out.splitlines()[-1].startswith("Copied 1 checkpoint, ")
    assert listed(to) == [200]
    done = holdfast_cli("cp", f"{run}@300", f"{run}@gold", to)
    assert done.out.splitlines()[-1].endswith("; 1 stays as it is.")
    assert listed(to) == [200, 300]
    assert holdfast_cli("cp", run, to).status == 0
    assert listed(to) == [200, 300, 400]
    assert holdfast_cli("cp", run, "--all", to).status == 0
    assert listed(to) == [100, 200, 300, 400]
    again = holdfast_cli("cp", run, "--all", to)
    assert tidy(again.out, to).split() == ["Nothing", "to", "do:", "A", "has", "all", "of", "it."]
    with holdfast.CheckpointManager(to) as ours, holdfast.CheckpointManager(run) as theirs:
        assert [(c.id, c.tags, c.metrics["acc"]) for c in ours.checkpoints()] == [
            (c.id, c.tags, c.metrics["acc"]) for c in theirs.checkpoints()
        ]


def test_cp_as_json(run: Path, tmp_path: Path, holdfast_cli: Command) -> None:
    to = tmp_path / "to"
    value = holdfast_cli("cp", f"{run}@100", f"{run}@200", to, "--json").json
    assert (value["ok"], value["run"], value["target"]) == (True, str(run), str(to))
    assert [(row["step"], row["action"]) for row in value["checkpoints"]] == [
        (100, "copy"),
        (200, "copy"),
    ]
    sizes = sum(path.stat().st_size for path in (to / "packs").iterdir())
    assert value["copied_bytes"] == sizes == sum(r["transferred"] for r in value["checkpoints"])


def test_cp_refuses(run: Path, tmp_path: Path, holdfast_cli: Command) -> None:
    to = tmp_path / "to"
    assert "name what to copy" in failed(holdfast_cli("cp", run), 2)
    assert "not of one run" in failed(holdfast_cli("cp", f"{run}@100", f"{to}@100", to), 2)
    assert "--all copies every" in failed(holdfast_cli("cp", f"{run}@100", "--all", to), 2)
    assert "a run is wanted" in failed(holdfast_cli("cp", run, f"{to}@100"), 2)
    assert "no checkpoint at step 77" in failed(holdfast_cli("cp", f"{run}@77", to), 1)
    assert "there is no" in failed(holdfast_cli("cp", to, tmp_path / "other"), 10)
    assert "is not a size" in failed(holdfast_cli("cp", run, to, "--bandwidth", "fast"), 2)
    assert "is the source and the target" in failed(holdfast_cli("cp", run, f"{run}/"), 2)
    assert not to.exists()
    with holdfast.CheckpointManager(to) as manager:
        manager.save(1, {"x": 1}).result()
    assert "holds another run" in failed(holdfast_cli("cp", run, to), 1)
    same_error_as_json(holdfast_cli, "cp", run, to)


def test_cp_beside_a_live_writer(run: Path, tmp_path: Path, holdfast_cli: Command) -> None:
    to = tmp_path / "to"
    with holdfast.CheckpointManager(run, keep=None) as source:
        source.save(500, {"x": 1}).result()  # of the source: no matter
        assert holdfast_cli("cp", run, "--all", to).status == 0
        with holdfast.CheckpointManager(to, keep=None) as target:
            target.acquire()
            source.save(600, {"x": 2}).result()
            error = failed(holdfast_cli("cp", run, to), 11)
            assert f"is held by process {os.getpid()} on " in error
            assert holdfast_cli("cp", run, to, "--take-over").status == 0
    assert listed(to)[-1] == 600


def test_damage_stops_one_checkpoint_and_no_other(
    run: Path, tmp_path: Path, holdfast_cli: Command
) -> None:
    to = tmp_path / "to"
    flip(pack_with(run, 300, "model/w"), 4096 + 17)
    done = holdfast_cli("cp", run, "--all", to)
    assert done.status == 4
    assert "1 of 4 checkpoints was not copied" in done.err
    assert [row[:2] for row in lines(done.out) if row[0] in ("copied", "DAMAGED")] == [
        ["copied", "100"],
        ["copied", "200"],
        ["DAMAGED", "300"],
        ["copied", "400"],
    ]
    assert "'model/w' in packs/" in " ".join(done.out.split())
    assert listed(to) == [100, 200, 400]
    value = same_error_as_json(holdfast_cli, "cp", run, "--all", to)
    assert [row["damaged"] for row in value["checkpoints"]] == [False, False, True, False]


KILLED_AT_A_COMMIT = """
import os, signal, sys
from holdfast.cli import main
from holdfast.repo.replicate import Replicator
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
Replicator._list = die
main(sys.argv[1:])
"""


def test_a_killed_cp_goes_on(run: Path, tmp_path: Path, holdfast_cli: Command) -> None:
    to = tmp_path / "to"
    command = [sys.executable, "-c", KILLED_AT_A_COMMIT, "cp", str(run), "--all", str(to)]
    done = subprocess.run(command, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert listed(to) == []
    [pack] = (to / "packs").iterdir()
    made = pack.stat()
    assert holdfast_cli("cp", run, "--all", to).status == 0
    assert listed(to) == [100, 200, 300, 400]
    assert pack.stat().st_ino == made.st_ino, "what was there was used"
    assert "Nothing to remove" in holdfast_cli("gc", to).out


# -- sync --------------------------------------------------------------------------------


def test_sync(run: Path, tmp_path: Path, holdfast_cli: Command) -> None:
    to = tmp_path / "to"
    done = holdfast_cli("sync", run, to, "--dry-run")
    assert done.out.splitlines()[-1].startswith("Would copy 4 checkpoints, ")
    assert not to.exists()
    done = holdfast_cli("sync", run, to, "--bandwidth", "10GB/s")
    assert done.out.splitlines()[-1].startswith("Copied 4 checkpoints, ")
    assert holdfast_cli("tag", f"{run}@300", "silver").status == 0
    assert holdfast_cli("rm", f"{run}@100", "--force").status == 0
    done = holdfast_cli("sync", run, to, "--dry-run")
    # A pin is the copy's own once it is there.
    assert [row[0] for row in lines(done.out)[1:5]] == ["keep", "update", "keep", "keep"]
    assert holdfast_cli("sync", run, to).out.splitlines()[-1] == (
        "Updated 1 checkpoint; 3 stay as they are."
    )
    assert listed(to) == [100, 200, 300, 400]
    assert holdfast_cli("pin", f"{to}@100", "--release").status == 0
    assert "source no longer lists it" in holdfast_cli("sync", run, to, "--delete", "--dry-run").out
    done = holdfast_cli("sync", run, to, "--delete")
    assert done.out.splitlines()[-1].startswith("Removed 1 checkpoint")
    assert listed(to) == [200, 300, 400]
    value = holdfast_cli("sync", run, to, "--delete", "--json").json
    assert {row["action"] for row in value["checkpoints"]} == {"keep"}
    assert (value["copied_bytes"], value["freed_bytes"], value["dry_run"]) == (0, 0, False)


def test_nothing_is_deleted_beside_damage(run: Path, tmp_path: Path, holdfast_cli: Command) -> None:
    to = tmp_path / "to"
    assert holdfast_cli("sync", run, to).status == 0
    assert holdfast_cli("rm", f"{run}@200", "--force").status == 0
    with holdfast.CheckpointManager(run, keep=None) as manager:
        manager.save(500, {"x": np.arange(3000.0)}).result()
    flip(newest_pack(run), 4096 + 17)
    done = holdfast_cli("sync", run, to, "--delete")
    assert done.status == 4
    assert "nothing is removed" in " ".join(done.out.split())
    assert listed(to) == [100, 200, 300, 400]


def test_sync_refuses(run: Path, tmp_path: Path, holdfast_cli: Command) -> None:
    assert "a run is wanted" in failed(holdfast_cli("sync", f"{run}@100", tmp_path / "to"), 2)
    assert "there is no run" in failed(holdfast_cli("sync", tmp_path / "to", run), 10)


# -- verify --repair-from ----------------------------------------------------------------


def test_verify_repairs(run: Path, tmp_path: Path, holdfast_cli: Command) -> None:
    to = tmp_path / "to"
    assert holdfast_cli("sync", run, to).status == 0
    pack = pack_with(run, 300, "model/w")
    whole = pack.read_bytes()
    flip(pack, 4096 + 17)
    assert holdfast_cli("verify", run).status == 4
    done = holdfast_cli("verify", run, "--repair-from", to)
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines()[-3:] == [
        f"Replaced 1 object by those of {to}:",
        f"  packs/{pack.name}",
        "4 checkpoints verified, all intact.",
    ]
    assert pack.read_bytes() == whole
    assert holdfast_cli("verify", run).status == 0


def test_what_cannot_be_repaired_keeps_the_status(
    run: Path, tmp_path: Path, holdfast_cli: Command
) -> None:
    to = tmp_path / "to"
    assert holdfast_cli("cp", f"{run}@100", to).status == 0
    flip(pack_with(run, 300, "model/w"), 4096 + 17)
    flip(pack_with(run, 100, "model/w"), 4096 + 17)
    done = holdfast_cli("verify", run, "--repair-from", to)
    assert done.status == 4
    assert "not repaired: packs/" in done.out
    assert "does not have it" in done.out
    assert "1 of 4 checkpoints in" in done.err
    value = holdfast_cli("verify", f"{run}@300", "--repair-from", to, "--json").json
    [row] = value["checkpoints"]
    assert (row["intact"], row["repaired"], len(row["unrepaired"])) == (False, [], 1)
    assert "there is no run" in failed(
        holdfast_cli("verify", run, "--repair-from", tmp_path / "no"), 10
    )


# -- the page ----------------------------------------------------------------------------


def transfer(step: int, action: Any, *why: str, nbytes: int = 0, **more: Any) -> Transfer:
    info = CheckpointInfo(
        "runs/\x1b[31mx", f"{step:064x}", step, step, 0.0, 1, 1, {}, (), False, "", False
    )
    return Transfer(info, action, why, nbytes, **more)


def test_a_page_fits_and_nothing_on_it_is_obeyed() -> None:
    results = [
        transfer(10**i, action, "because \x1b]0;title\x07 " * 9, nbytes=7**i)
        for i, action in enumerate(("copy", "repair", "update", "remove", "keep"))
    ]
    results.append(transfer(7, "copy", "not there", error="gone\nError: no", damaged=True))
    for dry_run in (True, False):
        text = transfers_text("to/\x1b[31m", results, dry_run=dry_run, width=80)
        assert all(len(line) <= 80 and line.isprintable() for line in text.split("\n"))
        assert "DAMAGED" in text


def test_not_all_is_status_3(capsys: pytest.CaptureFixture[str]) -> None:
    results = [transfer(1, "copy", "not there", error="it was removed")]
    assert report("a", "b", results, as_json=True) == 3
    assert '"exit_code": 3' in capsys.readouterr().out
    with pytest.raises(holdfast.HoldfastError, match="was not copied to b"):
        report("a", "b", results, as_json=False)
    assert "Nothing was copied to b." in capsys.readouterr().out
