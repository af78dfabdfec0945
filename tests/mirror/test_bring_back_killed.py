"""Bringing a run back is stopped in the middle: the next start goes on with it."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast import CheckpointManager
from holdfast.errors import StoreUnavailable
from holdfast.manager import mirror_status, recovery
from holdfast.repo import keys
from holdfast.stores.open import open_store
from tests.mirror.support import WAIT_S, Line, same, state, steps, warnings
from tests.support.servers.service import Place

Lines = Callable[[str], Line]

KEEP = "last=2 best=1:loss"

# Opens the run, and dies before it changes anything in its folder for the n-th time.
DYING = """
import os, signal, sys
import holdfast
from holdfast.stores.local import LocalStore

run, mirror, left = sys.argv[1], sys.argv[2], int(sys.argv[3])

def dying(method):
    def call(self, *args, **named):
        global left
        if self.address == run:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return method(self, *args, **named)
    return call

for name in ("put_new", "create", "delete"):
    setattr(LocalStore, name, dying(getattr(LocalStore, name)))
with holdfast.CheckpointManager(run, keep="last=2 best=1:loss", mirror=mirror, mirror_keep="") as m:
    assert m.latest().step == 5
    os._exit(0)  # the end of a run is not what is looked at
"""


def lost(folder: Path, there: str) -> tuple[Path, dict[int, str]]:
    """(a run that lost its disk, step -> id). Step 2 is the best one, step 3 is tagged."""
    run = folder / "run"
    with CheckpointManager(run, keep=KEEP, mirror=there, mirror_keep="") as ckpts:
        for step in (1, 2, 3, 4, 5):
            loss = {"loss": 0.1 if step == 2 else 0.5}
            tags = ["gold"] if step == 3 else []
            ckpts.save(step, state(step), metrics=loss, tags=tags).result()
            assert ckpts.wait_mirrored(WAIT_S)
        ids = {info.step: info.id for info in ckpts.checkpoints()}
    shutil.rmtree(run)
    return run, ids


def brought(run: Path) -> dict[int, str]:
    with CheckpointManager(run) as ckpts:
        return {info.step: info.id for info in ckpts.checkpoints()}


def coming(run: Path) -> list[str]:
    found = (info.key for info in open_store(str(run)).list(keys.MIRRORS))
    return [key for key in found if keys.coming_epoch(key) is not None]


def start(run: Path, there: str) -> None:
    with CheckpointManager(run, keep=KEEP, mirror=there, mirror_keep="") as ckpts:
        assert same(ckpts.load(), 5)


@pytest.mark.parametrize("place", ["folder", "s3"])
def test_killed_before_each_change(
    tmp_path: Path, place: str, request: pytest.FixtureRequest
) -> None:
    bucket: Place | None = request.getfixturevalue("s3") if place == "s3" else None
    there = bucket.address if bucket else str(tmp_path / "mirror")
    run, ids = lost(tmp_path, there)
    wanted = {step: ids[step] for step in (2, 3, 5)}
    halves = 0
    for number in range(1, 100, 1 if place == "folder" else 3):
        shutil.rmtree(run, ignore_errors=True)
        command = [sys.executable, "-c", DYING, run, there, str(number)]
        done = subprocess.run(command, timeout=WAIT_S, check=False)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
        if run.exists():
            left = brought(run)
            assert left.items() <= wanted.items()
            halves += 0 < len(left) < 3
        start(run, there)
        assert brought(run) == wanted, f"killed at {number}"
        assert coming(run) == []
    assert halves >= (4 if place == "folder" else 1), "it was never stopped in the middle"
    assert number > 10
    assert steps(run) == [2, 3, 5]


@pytest.fixture
def half(tmp_path: Path) -> tuple[Path, str, dict[int, str]]:
    """A run that was killed when the newest checkpoint was there."""
    there = str(tmp_path / "mirror")
    run, ids = lost(tmp_path, there)
    for number in range(5, 100):
        shutil.rmtree(run, ignore_errors=True)
        command = [sys.executable, "-c", DYING, run, there, str(number)]
        assert subprocess.run(command, timeout=WAIT_S, check=False).returncode == -signal.SIGKILL
        if brought(run):
            break
    assert brought(run) == {5: ids[5]}
    return run, there, ids


def test_a_mirror_that_does_not_answer_now_is_asked_at_a_later_start(
    half: tuple[Path, str, dict[int, str]],
    lines: Lines,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run, there, ids = half
    line = lines(there)
    for module in (recovery, mirror_status):
        monkeypatch.setattr(module, "open_store", lambda address: line)
    line.down = True
    start(run, there)
    assert brought(run) == {5: ids[5]}
    assert "does not answer; the next start tries again" in warnings(caplog)[0]
    line.down = False
    start(run, there)
    assert set(brought(run)) == {2, 3, 5}
    assert coming(run) == []


def test_a_mirror_that_goes_away_meanwhile_is_asked_at_a_later_start(
    half: tuple[Path, str, dict[int, str]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run, there, ids = half
    line = Line(open_store(there))

    def fail(name: str, args: tuple[object, ...]) -> None:
        if name == "read_into":
            raise StoreUnavailable("the mirror does not answer")

    line.before = fail
    with monkeypatch.context() as patch:
        patch.setattr(recovery, "open_store", lambda address: line)
        start(run, there)
    assert brought(run) == {5: ids[5]}
    assert "not all is brought back" in warnings(caplog)[0]
    start(run, there)
    assert set(brought(run)) == {2, 3, 5}


def test_a_run_that_went_on_meanwhile_gets_the_rest(
    half: tuple[Path, str, dict[int, str]], lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, there, _ = half
    with CheckpointManager(run, keep=KEEP) as ckpts:  # without its mirror
        ckpts.save(6, state(6), metrics={"loss": 0.4}).result()
    with CheckpointManager(run, keep=KEEP, mirror=there, mirror_keep="") as ckpts:
        assert same(ckpts.load(), 6)
        ckpts.acquire()
        assert ckpts.wait_mirrored(WAIT_S)
    with CheckpointManager(run, keep=KEEP, mirror=there, mirror_keep="") as ckpts:
        assert same(ckpts.load(), 6)
        assert ckpts.info("best").step == 2
        assert ckpts.info("gold").step == 3
    assert set(brought(run)) == {2, 3, 5, 6}
    assert steps(there) == [1, 2, 3, 4, 5, 6]


def test_what_was_removed_from_the_mirror_meanwhile_is_not_waited_for(
    half: tuple[Path, str, dict[int, str]],
) -> None:
    run, there, _ = half
    with CheckpointManager(there) as copy:
        copy.remove([2], force=True)
    start(run, there)
    assert set(brought(run)) == {3, 5}
    assert coming(run) == []
