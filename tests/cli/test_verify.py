"""`holdfast verify` where what lists the checkpoints is damaged, and they are not."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest

import holdfast
from holdfast.repo import keys
from holdfast.stores.base import Store
from holdfast.stores.open import open_store
from tests.cli.conftest import Command, failed_loudly, same_error_as_json
from tests.mirror.support import damage
from tests.support.servers.service import Place


@pytest.fixture(params=["folder", "s3", "gcs"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A run with three checkpoints."""
    if request.param == "folder":
        found = str(tmp_path / "run")
    else:
        place: Place = request.getfixturevalue(request.param)
        found = place.address
    with holdfast.CheckpointManager(found, keep=None) as ckpts:
        for step in (1, 2, 3):
            ckpts.save(step, {"x": np.full(2000, step)}, block=True)
    return found


def entries(store: Store) -> list[str]:
    """Keys of the log's entries, newest first."""
    found = [info.key for info in store.list(keys.LOG) if keys.entry_number(info.key)]
    return sorted(found, reverse=True)


def states(cli: Command, address: str) -> list[bool]:
    value = cli("verify", address, "--json").json
    return [row["intact"] for row in value["checkpoints"]]


@pytest.mark.parametrize("at", [-1, 50, 0], ids=["its end", "its middle", "its start"])
def test_an_altered_entry_is_damage(address: str, holdfast_cli: Command, at: int) -> None:
    assert holdfast_cli("verify", address).status == 0
    newest = entries(open_store(address))[0]
    damage(address, newest, at)
    done = holdfast_cli("verify", address)
    assert f"the list of checkpoints of {address} is damaged\n" in failed_loudly(done, 4)
    assert f"holdfast doctor {shlex.quote(address)} --repair" in done.err
    assert done.out.count(" intact\n") == 3
    assert f"log DAMAGED: readers fall back to entry 4 (save): {newest}: " in done.out
    assert holdfast_cli("doctor", address).status == 4
    same_error_as_json(holdfast_cli, "verify", address)
    value = holdfast_cli("verify", address, "--json").json
    [finding] = value["findings"]
    assert (finding["check"], finding["state"]) == ("log", "damage")
    assert states(holdfast_cli, address) == [True, True, True]
    assert holdfast_cli("doctor", address, "--repair").status == 0
    assert holdfast_cli("verify", address).status == 0
    assert holdfast_cli("verify", address, "--json").json["findings"] == []


def test_it_is_damage_for_one_checkpoint_too(address: str, holdfast_cli: Command) -> None:
    """Which one is the latest, or has a tag, is what the log says."""
    damage(address, entries(open_store(address))[0])
    assert "is damaged" in failed_loudly(holdfast_cli("verify", f"{address}@latest"), 4)


def test_the_entry_before_the_newest(address: str, holdfast_cli: Command) -> None:
    """It proves that the newest one is no late write of a process that was overtaken."""
    damage(address, entries(open_store(address))[1])
    assert "is damaged" in failed_loudly(holdfast_cli("verify", address), 4)
    assert states(holdfast_cli, address) == [True, True, True]


def test_a_commit_that_only_the_damaged_entry_knew(address: str, holdfast_cli: Command) -> None:
    for entry in entries(open_store(address))[:2]:  # that of closing, that of step 3
        damage(address, entry)
    assert holdfast_cli("verify", address).status == 4
    assert states(holdfast_cli, address) == [True, True]
    assert holdfast_cli("doctor", address, "--repair").status == 0
    assert states(holdfast_cli, address) == [True, True, True]


def test_the_only_commits_are_damaged(tmp_path: Path, holdfast_cli: Command) -> None:
    """No checkpoint is listed then, and that is not all there is to say."""
    run = tmp_path / "run"
    with holdfast.CheckpointManager(run) as ckpts:
        ckpts.save(1, {"x": 1}, block=True)
    for entry in entries(open_store(run))[:2]:
        damage(run, entry)
    done = holdfast_cli("verify", run)
    assert f"the list of checkpoints of {run} is damaged" in failed_loudly(done, 4)


def test_no_entry_is_left(address: str, holdfast_cli: Command) -> None:
    for entry in entries(open_store(address)):
        damage(address, entry)
    for words in (["verify", address], ["verify", address, "--json"]):
        assert holdfast_cli(*words).status == 4
    assert "--repair" in holdfast_cli("verify", address, "--json").json["hint"]


def test_a_lost_holdfast_json(address: str, holdfast_cli: Command) -> None:
    open_store(address).delete([keys.RUN_INFO])
    done = holdfast_cli("verify", address)
    assert "is damaged" in failed_loudly(done, 4)
    assert "run DAMAGED: holdfast.json is missing, so that no program finds the run\n" in done.out
    assert holdfast_cli("doctor", address, "--repair").status == 0
    assert holdfast_cli("verify", address).status == 0


def test_repair_from_a_copy_says_that_the_log_is_not_among_it(
    address: str, tmp_path: Path, holdfast_cli: Command
) -> None:
    copy = str(tmp_path / "copy")
    assert holdfast_cli("sync", address, copy).status == 0
    store = open_store(address)
    pack = next(iter(store.list(keys.PACKS))).key
    damage(address, pack)
    newest = entries(store)[0]
    damage(address, newest)
    assert "1 of 3 checkpoints" in holdfast_cli("verify", address).err
    assert "is damaged, and so is their list\n" in holdfast_cli("verify", address).err
    before = store.get(newest, max_bytes=1 << 20)
    done = holdfast_cli("verify", address, "--repair-from", copy)
    assert done.status == 4
    assert f"    not replaced by that of {copy}, which is another: holdfast doctor" in done.out
    assert f"Replaced 1 object by those of {copy}:\n  {pack}\n" in done.out
    assert store.get(newest, max_bytes=1 << 20) == before
    assert states(holdfast_cli, address) == [True, True, True]
    # What it says to do is all that is left.
    assert holdfast_cli("doctor", address, "--repair").status == 0
    assert holdfast_cli("verify", address).status == 0
    assert [row["step"] for row in holdfast_cli("ls", address, "--json").json["checkpoints"]] == [
        3,
        2,
        1,
    ]


def test_a_mirror_is_where_to_repair_from(tmp_path: Path, s3: Place, holdfast_cli: Command) -> None:
    run = tmp_path / "run"
    with holdfast.CheckpointManager(run, mirror=s3.address) as ckpts:
        ckpts.save(1, {"x": np.arange(2000)}, block=True)
        assert ckpts.wait_mirrored(60)
    store = open_store(run)
    store.delete([next(iter(store.list(keys.PACKS))).key])
    words = f"holdfast verify {run} --repair-from {shlex.quote(s3.address)}"
    for command in ("verify", "doctor"):
        done = holdfast_cli(command, run)
        assert done.status == 4
        assert words in done.err
    # As it is printed it can be pasted, whatever the address has in it.
    assert holdfast_cli(*shlex.split(words)[1:]).status == 0
    assert holdfast_cli("verify", run).status == 0
