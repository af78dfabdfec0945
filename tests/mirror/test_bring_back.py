"""A new machine, or a disk that was wiped: the run goes on from its mirror."""

from __future__ import annotations

import logging
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast import CheckpointManager
from holdfast.errors import NoIntactCheckpoint, StoreUnavailable
from holdfast.manager import recovery
from holdfast.repo import keys
from holdfast.repo.repo import Repo
from holdfast.stores.open import open_store
from tests.kill.driver import Script, choose, differing, reference
from tests.mirror.support import WAIT_S, Line, damage, same, state, steps
from tests.support.servers.service import Place
from tests.support.waiting import within

Lines = Callable[[str], Line]


def mirrored(folder: Path, *at: int, keep: str | None = "last=3") -> tuple[Path, str]:
    """A run with these steps and its mirror."""
    run, there = folder / "run", str(folder / "mirror")
    with CheckpointManager(run, keep=keep, mirror=there, mirror_keep="") as ckpts:
        for step in at:
            ckpts.save(step, state(step), metrics={"loss": 1 / step}, tags=[f"t{step}"]).result()
            assert ckpts.wait_mirrored(WAIT_S)
    return run, there


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# -- what is brought back ------------------------------------------------------------------


def test_a_wiped_run_is_the_same_run_again(tmp_path: Path) -> None:
    run, there = tmp_path / "run", str(tmp_path / "mirror")
    with CheckpointManager(run, keep="last=2 best=1:loss", mirror=there, mirror_keep="") as ckpts:
        for step in (1, 2, 3, 4, 5):
            loss = {"loss": 0.1 if step == 2 else 0.5}
            ckpts.save(step, state(step), metrics=loss).result()
            assert ckpts.wait_mirrored(WAIT_S)
        known = {info.step: info.id for info in ckpts.checkpoints()}
    shutil.rmtree(run)
    with CheckpointManager(run, keep="last=2 best=1:loss", mirror=there, mirror_keep="") as ckpts:
        restored = ckpts.restore()
        assert restored is not None
        assert same(restored.values, 5)
        assert (restored.info.id, ckpts.brought_back(restored.info.id)) == (known[5], True)
        # The newest, and what the local rule wants for another reason than its age.
        assert {info.step: info.id for info in ckpts.checkpoints()} == {2: known[2], 5: known[5]}
        assert ckpts.info("best").step == 2
        saved = ckpts.save(6, state(6), metrics={"loss": 0.4}).result()
        assert ckpts.wait_mirrored(WAIT_S)
        assert not ckpts.brought_back(saved.id)
    assert steps(run) == [2, 5, 6]
    assert steps(there) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("look", ["latest", "checkpoints", "load", "acquire", "save", "read_loop"])
def test_whatever_is_asked_first_finds_what_the_mirror_has(tmp_path: Path, look: str) -> None:
    run, there = mirrored(tmp_path, 1, 2)
    shutil.rmtree(run)
    with CheckpointManager(run, mirror=there) as ckpts:
        if look == "save":
            ckpts.save(3, state(3)).result()
        else:
            getattr(ckpts, look)()
        assert [info.step for info in ckpts.checkpoints()][:2] == [1, 2]


def test_what_is_wiped_but_for_some_packs_is_brought_back_whole(tmp_path: Path) -> None:
    run, there = mirrored(tmp_path, 1, 2)
    shutil.rmtree(run / "log")
    shutil.rmtree(run / "manifests")
    (run / "holdfast.json").unlink()
    for info in list(open_store(str(run)).list(keys.PACKS)):
        damage(run, info.key)
    with CheckpointManager(run, mirror=there) as ckpts:
        assert same(ckpts.load(), 2)
    assert steps(run) == [1, 2]


def test_a_run_whose_only_checkpoints_were_removed_goes_on_from_its_mirror(tmp_path: Path) -> None:
    run, there = mirrored(tmp_path, 1, 2)
    with CheckpointManager(run) as ckpts:
        ckpts.remove([1, 2], force=True)
    with CheckpointManager(run, mirror=there) as ckpts:
        assert same(ckpts.load(), 2)


def test_of_a_damaged_mirror_the_newest_intact_one_is_taken_and_the_run_goes_on_above_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, there = mirrored(tmp_path, 1, 2, 3)
    newest = Repo(open_store(there)).records()[-1]
    own = set(newest.packs) - set(Repo(open_store(there)).records()[-2].packs)
    damage(there, keys.pack_key(own.pop()))
    shutil.rmtree(run)
    with CheckpointManager(run, mirror=there, mirror_keep="") as ckpts:
        assert same(ckpts.load(), 2)
        ckpts.save(3, state(3)).result()
        assert ckpts.wait_mirrored(WAIT_S)  # the two are one line still
    assert f"checkpoint {there}@3" in errors(caplog)[0]
    ordinals = [record.ordinal for record in Repo(open_store(there)).records()]
    assert ordinals == [1, 2, 3, 4]


def test_where_nothing_of_the_mirror_is_intact_nothing_starts_from_zero(tmp_path: Path) -> None:
    run, there = mirrored(tmp_path, 1)
    for info in list(open_store(there).list(keys.PACKS)):
        damage(there, info.key)
    shutil.rmtree(run)
    with (
        CheckpointManager(run, mirror=there) as ckpts,
        pytest.raises(NoIntactCheckpoint, match="none of the 1 checkpoint"),
    ):
        ckpts.restore()


def test_an_empty_run_does_not_start_while_its_mirror_cannot_be_asked(
    tmp_path: Path, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, there = mirrored(tmp_path, 1)
    shutil.rmtree(run)
    line = lines(there)
    monkeypatch.setattr(recovery, "open_store", lambda address: line)
    line.down = True
    with CheckpointManager(run, mirror=there) as ckpts:
        with pytest.raises(StoreUnavailable, match="cannot be known") as refused:
            ckpts.acquire()
        assert "leave mirror= out" in refused.value.hint
        assert not run.exists()
        line.down = False
        assert same(ckpts.load(), 1)


def test_what_was_interrupted_goes_on(
    tmp_path: Path, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every read of the mirror the link breaks once."""
    run, there = mirrored(tmp_path, 1, 2)
    line, reads = lines(there), 0
    monkeypatch.setattr(recovery, "open_store", lambda address: line)

    def fail_at(number: int) -> None:
        left = [number]

        def count(name: str, args: object) -> None:
            left[0] -= 1
            line.down = left[0] == 0

        line.before = count

    while True:
        reads += 1
        shutil.rmtree(run, ignore_errors=True)
        fail_at(reads)
        with CheckpointManager(run, mirror=there) as ckpts:
            try:
                ckpts.latest()
            except StoreUnavailable:
                pass
            else:
                break
        line.before, line.down = lambda name, args: None, False
        with CheckpointManager(run, mirror=there) as ckpts:
            assert same(ckpts.load(), 2)
            ckpts.acquire()
            assert ckpts.wait_mirrored(WAIT_S)
    assert reads > 8


@pytest.mark.parametrize("log", [True, False], ids=["opened", "half made"])
def test_a_mirror_that_was_made_and_never_filled_stays_the_mirror_of_the_run(
    tmp_path: Path, log: bool
) -> None:
    run, there = tmp_path / "run", tmp_path / "mirror"
    with CheckpointManager(run, mirror=there) as ckpts:
        ckpts.acquire()
        assert ckpts.wait_mirrored(WAIT_S)
    shutil.rmtree(run)
    if not log:
        shutil.rmtree(there / "log")
    with CheckpointManager(run, mirror=there) as ckpts:
        assert ckpts.restore() is None
        ckpts.save(1, state(1)).result()
    assert steps(there) == [1]


def test_a_mirror_that_is_empty_is_no_trouble(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "run", mirror=tmp_path / "mirror") as ckpts:
        assert ckpts.restore() is None
        ckpts.save(1, state(1)).result()
    assert steps(tmp_path / "mirror") == [1]


def test_a_run_that_went_on_elsewhere_is_not_mixed_with_this_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Machine A is lost, B goes on from the mirror, and A comes back with its old disk."""
    a, there = mirrored(tmp_path, 1)
    with CheckpointManager(tmp_path / "b", mirror=there, mirror_keep="") as b:
        b.restore()
        b.save(2, state(2)).result()
    before = [record.id for record in Repo(open_store(there)).records()]
    with CheckpointManager(a, mirror=there, mirror_keep="") as ckpts:
        ckpts.save(2, state(2)).result()
        assert not ckpts.wait_mirrored(WAIT_S)
    assert [record.id for record in Repo(open_store(there)).records()] == before
    refused = errors(caplog)[0]
    assert "went on by itself" in refused
    assert f"start again without {a}" in refused
    assert len(refused.splitlines()) == 2


def test_two_live_processes_with_one_mirror(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The second one begins from the mirror, trains, and is told who has it."""
    a, there = mirrored(tmp_path, 1)
    program = (
        "import sys, holdfast\n"
        "run = holdfast.CheckpointManager(sys.argv[1], mirror=sys.argv[2])\n"
        "run.acquire()\n"
        "assert run.wait_mirrored(60)\n"
        "print('open', flush=True)\n"
        "sys.stdin.read()\n"
        "run.close()\n"
    )
    command = [sys.executable, "-c", program, a, there]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"open\n"
        with CheckpointManager(tmp_path / "b", mirror=there, mirror_wait=0.1) as second:
            assert same(second.load(), 1)
            second.save(2, state(2)).result()
            assert within(WAIT_S, lambda: bool(errors(caplog)))
            assert not second.wait_mirrored(0)
        first.communicate()
        assert first.returncode == 0
    assert steps(there) == [1]
    assert f"is held by process {first.pid}" in errors(caplog)[0]
    with CheckpointManager(tmp_path / "b", mirror=there) as second:
        second.acquire()
    assert steps(there) == [1, 2]


# -- whole programs ------------------------------------------------------------------------

TRAINING = """
import os, signal, sys
import torch
import holdfast

run_dir, mirror, stop = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.manual_seed(1)
model = torch.nn.Linear(4, 2)
optimizer = torch.optim.AdamW(model.parameters())
with holdfast.Run(run_dir, every=1, keep="last=1", mirror=mirror) as run:
    run.track(model=model, optimizer=optimizer)
    for step in run.range(6):
        if step == stop:
            run.manager.wait()
            assert run.manager.wait_mirrored(60)
            os.kill(os.getpid(), signal.SIGKILL)
        loss = model(torch.randn(3, 4)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
print([v.hex() for v in torch.cat([p.flatten() for p in model.parameters()]).tolist()])
"""


def train(folder: Path, mirror: str, stop: int = -1) -> tuple[int, str, str]:
    """(status, what the program says at its end, its stderr)."""
    done = subprocess.run(
        [sys.executable, "-c", TRAINING, folder, mirror, str(stop)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return done.returncode, done.stdout, done.stderr


def test_training_on_a_new_machine_ends_with_the_same_bits(tmp_path: Path, s3: Place) -> None:
    status, wanted, _ = train(tmp_path / "whole", str(tmp_path / "its-mirror"))
    assert status == 0
    address = s3.address
    status, _, said = train(tmp_path / "machine1", address, stop=4)
    assert status == -9
    assert f"no checkpoint in {tmp_path}/machine1 nor in {address}: starting at step 0" in said
    status, found, said = train(tmp_path / "machine2", address)
    assert status == 0, said
    assert found == wanted
    line = re.escape(f"resumed {tmp_path}/machine2 at step 4 (from {address}, verified, saved")
    assert re.search(line, said), said


def test_a_training_that_is_killed_anywhere_and_loses_its_disk_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIRROR", str(tmp_path / "mirror-of-whole"))
    wanted, counts = reference("torch_train", tmp_path, "0")
    assert steps_of(tmp_path / "mirror-of-whole") == steps_of(tmp_path / "whole" / "run")
    chance = random.Random(5)
    mirror = tmp_path / "mirror"
    monkeypatch.setenv("MIRROR", str(mirror))
    script = Script("torch_train", tmp_path / "killed", ("0",))
    points = ("pack", "log", "manifest", "fsync", "body", "tail", "pack", "log", "fsync")
    for number, point in enumerate(points):
        script.run(choose(counts, point, chance, share=len(points)))
        if number % 2:
            shutil.rmtree(script.where, ignore_errors=True)
    assert script.kills.total() >= 5, script.kills
    assert differing(script.finish(), wanted) == []
    # Whatever was lost on the way: in the end both have the end, whole.
    here, there = steps_of(script.where), steps_of(mirror)
    assert set(here) <= set(there)
    assert here[-1] == there[-1] == 24


def test_a_training_with_a_bucket_that_is_killed_at_any_moment(
    tmp_path: Path, s3: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MIRROR", raising=False)
    wanted, _ = reference("torch_train", tmp_path, "0")
    monkeypatch.setenv("MIRROR", s3.address)
    script = Script("torch_train", tmp_path / "killed", ("0",))
    chance = random.Random(11)
    for lost in (False, True, True, False):
        script.run(kill_after_s=chance.uniform(1.8, 3.0))
        if lost:
            shutil.rmtree(script.where, ignore_errors=True)
    assert differing(script.finish(), wanted) == []
    here, there = steps_of(script.where), steps_of(s3.address)
    assert set(here) <= set(there)
    assert here[-1] == there[-1] == 24


def steps_of(run: Path | str) -> list[int]:
    with CheckpointManager(run) as ckpts:
        for found in ckpts.verify():
            assert found.ok, found.problems
        assert ckpts.finished
        return [info.step for info in ckpts.checkpoints()]
