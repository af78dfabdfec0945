"""Training with a mirror: preempted, cut off, on S3."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import holdfast
from holdfast import CheckpointManager
from holdfast.manager import mirror, packer
from holdfast.repo import keys
from tests.mirror.support import WAIT_S, Line, state, steps
from tests.support.servers.faults import delayed
from tests.support.servers.proxy import FaultProxy
from tests.support.servers.service import Place

Lines = Callable[[str], Line]

TRAINING = """
import sys, time
import holdfast

with holdfast.Run(sys.argv[1], every=1000, mirror=sys.argv[2], mirror_wait="1min") as run:
    box = run.box(total=0)
    for step in run.range(100_000):
        box.total += step
        if step == 5:
            print("under way", flush=True)
        time.sleep(0.01)
"""


def test_a_preempted_run_is_in_the_mirror_when_its_process_ends(tmp_path: Path) -> None:
    run, there = tmp_path / "run", tmp_path / "mirror"
    with subprocess.Popen(
        [sys.executable, "-c", TRAINING, run, there],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "under way\n"
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=WAIT_S)
    assert process.returncode == 75, said
    with CheckpointManager(run) as here, CheckpointManager(there) as copy:
        assert (newest := here.latest()) is not None
        assert newest.note == "preempted"
        assert [info.id for info in copy.checkpoints()] == [newest.id]
        assert copy.verify()[0].ok
    if "copying" in said:  # unless it was there at once
        assert f"copying step {newest.step} to {there} before this process ends" in said


def train(run: Path, there: str, *, upto: int, **settings: object) -> list[int]:
    done: list[int] = []
    with holdfast.Run(run, every=1, keep=None, mirror=there, **settings) as training:  # pyright: ignore[reportArgumentType]
        box = training.box(total=0)
        for step in training.range(upto):
            box.total += step
            done.append(step)
        assert box.total == sum(range(upto))
    return done


def test_of_a_mirror_that_was_given_up_nothing_is_promised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    there = str(tmp_path / "mirror")
    with CheckpointManager(there) as other:
        other.save(7, state(7)).result()
    train(tmp_path / "first", str(tmp_path / "its-mirror"), upto=3)
    capsys.readouterr()  # this one may be copying when it ends, and says so
    assert train(tmp_path / "first", there, upto=3) == []
    assert "copying" not in capsys.readouterr().err
    assert "start again" not in caplog.messages[-1]
    assert caplog.messages[-1].endswith("is not used any more")


def test_a_finished_run_whose_mirror_lacks_the_end_is_completed_by_the_next_start(
    tmp_path: Path, lines: Lines, capsys: pytest.CaptureFixture[str]
) -> None:
    run, there = tmp_path / "run", str(tmp_path / "mirror")
    lines(there).down = True
    assert train(run, there, upto=3, mirror_wait=0) == [0, 1, 2]
    lines(there).down = False
    assert train(run, there, upto=3) == []
    assert "is finished at step 3: nothing to train" in capsys.readouterr().err
    with CheckpointManager(there) as copy:
        assert copy.finished
        assert [info.step for info in copy.checkpoints()] == [1, 2, 3]


def test_a_finished_run_that_is_lost_is_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = str(tmp_path / "mirror")
    train(tmp_path / "run", there, upto=3)
    assert train(tmp_path / "elsewhere", there, upto=3) == []
    said = capsys.readouterr().err
    assert f"resumed {tmp_path}/elsewhere at step 3 (from {there}, verified" in said


def test_the_loop_is_not_held_up_by_a_bucket_that_is_away(
    tmp_path: Path,
    s3: Place,
    faulty: Callable[[Place], tuple[Place, FaultProxy]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nothing of a training waits: all of it is over before the bucket comes back."""
    place, proxy = faulty(s3)
    there = place.address
    with CheckpointManager(tmp_path / "run", keep=None, mirror=there) as ckpts:
        ckpts.save(1, state(1)).result()
        assert ckpts.wait_mirrored(WAIT_S)
        with proxy.outage():
            for step in (2, 3, 4):
                ckpts.save(step, state(step)).result()
            assert ckpts.not_mirrored() == [4, 3, 2]
        assert ckpts.wait_mirrored(WAIT_S)
    assert steps(tmp_path / "run") == steps(there) == [1, 2, 3, 4]


def test_nothing_secret_is_written_or_told(
    tmp_path: Path, s3: Place, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    with CheckpointManager(tmp_path / "run", mirror=s3.address) as ckpts:
        ckpts.save(1, state(1)).result()
    secrets = [
        value for name, value in os.environ.items() if name.startswith("AWS_") and "KEY" in name
    ]
    assert secrets
    kept = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    for secret in secrets:
        assert secret not in caplog.text
        assert not any(secret.encode() in data for data in kept)


def test_packs_of_a_mirrored_run_are_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket takes each in one request, from memory."""
    monkeypatch.setattr(packer, "MIRRORED_PACK_BYTES", 100_000)
    values = {str(n): np.full(5000, n) for n in range(20)}
    with CheckpointManager(tmp_path / "run", mirror=tmp_path / "mirror") as ckpts:
        ckpts.save(1, values, block=True)
        assert ckpts.wait_mirrored(WAIT_S)
        largest = max(info.size_bytes for info in ckpts._repo.store.list(keys.PACKS))
        assert 40_000 < largest < 100_000 + 8192
    with CheckpointManager(tmp_path / "alone") as ckpts:
        ckpts.save(1, values, block=True)
        assert len(list(ckpts._repo.store.list(keys.PACKS))) == 1


PREEMPTED = """
import sys, time
import holdfast

settings = {"keep": None, "mirror": sys.argv[2], "mirror_wait": float(sys.argv[3])}
with holdfast.Run(sys.argv[1], every=1, **settings) as run:
    box = run.box(data=b"")
    for step in run.range(100_000):
        box.data = bytes([step % 256]) * 10_000
        if step == 20:
            print("under way", flush=True)
        time.sleep(0.01)
"""


def test_a_notice_is_used_for_the_newest_first(
    tmp_path: Path, s3: Place, faulty: Callable[[Place], tuple[Place, FaultProxy]]
) -> None:
    """A slow server, and a long backlog: what the notice is enough for is the newest."""
    place, proxy = faulty(s3)
    run, wait_s = tmp_path / "run", 3.0
    proxy.fail(delayed(0.4), method="PUT", target="packs/", times=None)
    with subprocess.Popen(
        [sys.executable, "-c", PREEMPTED, run, place.address, str(wait_s)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "under way\n"
        before = len(copied_there(proxy))
        process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        _, said = process.communicate(timeout=WAIT_S)
        took_s = time.monotonic() - begun
    assert process.returncode == 75, said
    assert took_s < wait_s + mirror.GRACE_S, said
    with CheckpointManager(run) as here, CheckpointManager(s3.address) as there:
        listed = {info.id: info for info in here.checkpoints()}
        mirrored = {info.id for info in there.checkpoints()}
        assert all(found.ok for found in there.verify())
    newest = max(listed.values(), key=lambda info: info.ordinal)
    assert newest.note == "preempted"
    assert newest.id in mirrored
    assert len(mirrored) < len(listed), "the backlog was too short"
    order = [listed[id].ordinal for id in copied_there(proxy)]
    # One may have been begun just before the signal was seen, or the last save was over.
    last = order.index(newest.ordinal)
    assert last <= before + 2, order
    assert order[last:] == sorted(order[last:], reverse=True)
    assert len(order) > last + 1, "and then the others"
    assert f" more to {place.address} before this process ends" in said
    assert f"only here, not in {place.address}" in said


def copied_there(proxy: FaultProxy) -> list[str]:
    """Ids of the checkpoints of which a copy was begun, in this order."""
    puts = proxy.exchanges(method="PUT", target="manifests/")
    found = (re.search(r"manifests/([0-9a-f]{64})\.json", put.target) for put in puts)
    return [match[1] for match in found if match]
