"""The program's side: what a run tells `holdfast run` as it goes on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

import holdfast
from holdfast.manager import heartbeat
from holdfast.manager.heartbeat import RECORD_BYTES, Beat
from holdfast.manager.progress import counted
from holdfast.supervise.beats import Beats
from tests.supervise.programs import wait_for


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """As `holdfast run` makes it, for this process."""
    folder = tmp_path / "beats"
    folder.mkdir()
    heart = heartbeat._Heart(str(folder))
    monkeypatch.setattr(heartbeat, "_heart", heart)
    yield folder
    heart.close()


def told(folder: Path) -> Beat:
    text = (folder / f"{os.getpid()}.beat").read_bytes()
    assert len(text) == RECORD_BYTES
    return msgspec.json.decode(text, type=Beat)


def test_a_run_tells_where_it_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "EVERY_S", 0.0)
    monkeypatch.chdir(tmp_path)
    seen: list[tuple[str, int, int | None]] = []

    def look() -> None:
        beat = told(folder)
        assert beat.pid == os.getpid()
        assert beat.address == str(tmp_path / "run")
        seen.append((beat.phase, beat.step, beat.checkpoint_step))

    state = [0]
    with holdfast.Run("run", every=2, keep=None, quiet=True) as run:
        run.track(state=state)
        for step in run.range(4):
            run.manager.wait()
            look()
            if step == 1:
                next(iter(run.guard([1])))
                look()
    look()
    assert seen == [
        *[("training", 0, None), ("training", 1, None), ("guard", 1, None)],
        *[("training", 2, 2), ("training", 3, 2), ("ended", 4, 4)],
    ]
    count = told(folder).count
    with holdfast.Run("run", quiet=True) as run:
        run.track(state=state)
        for _ in run.range(6):
            beat = told(folder)
            assert beat.checkpoint_step == 4
            assert beat.count > count
            break


def test_a_manager_alone_beats_with_its_commits(folder: Path, tmp_path: Path) -> None:
    with holdfast.CheckpointManager(tmp_path / "run") as ckpts:
        ckpts.save(7, {"a": 1}).result()
        life = Beats(folder).read()
        assert life.in_loop
        assert life.checkpoints == ((str(tmp_path / "run"), 7),)
    assert not Beats(folder).read().in_loop


def test_most_beats_cost_no_write(folder: Path) -> None:
    for step in range(10_000):
        heartbeat.beat("run", "training", step)
    assert 0 < told(folder).count < 10_000
    heartbeat.beat("run", "saving", 10_000)  # a change is told at once
    assert told(folder).count == 10_001


def test_long_work_that_makes_progress_is_life_and_such_that_makes_none_is_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "FOLLOW_S", 0.02)
    monkeypatch.setattr(heartbeat, "EVERY_S", 0.0)
    heartbeat.beat("run", "saving", 1)
    with counted() as work:
        for _ in range(3):
            before = told(folder).count
            work.done_nbytes += 1
            wait_for(lambda before=before: told(folder).count > before)  # type: ignore[misc]
        before = told(folder).count
        time.sleep(0.2)
        assert told(folder).count == before


def test_a_forked_child_does_not_beat(folder: Path) -> None:
    heartbeat.beat("run", "training", 1)
    heartbeat._stop()  # what runs in it
    heartbeat.beat("run", "training", 2)
    heartbeat.checkpoint("run", 2, "id")
    assert told(folder).step == 1


def test_a_run_that_is_told_to_stop_says_so(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit), holdfast.Run(tmp_path / "run", quiet=True) as run:
        run.track(state=[0])
        for _ in run.range(4):
            os.kill(os.getpid(), signal.SIGTERM)
    assert Beats(folder).read().left == 75


def test_a_full_disk_ends_no_job(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    heartbeat.beat("run", "training", 1)
    monkeypatch.undo()
    heartbeat.beat("run", "saving", 2)


def test_records_that_are_not_whole_are_read_the_next_time(folder: Path) -> None:
    beats = Beats(folder)
    assert beats.read().beats == 0
    heartbeat.beat("run", "training", 3)
    assert beats.read().step == 3
    path = folder / f"{os.getpid()}.beat"
    path.write_bytes(path.read_bytes()[:20])
    assert beats.read().step == 3
    heartbeat.beat("run", "saving", 4)
    assert beats.read().step == 4


def test_the_loop_of_a_process_that_has_died_is_not_waited_for(folder: Path) -> None:
    record = msgspec.json.encode(Beat(2**22 + 1, count=5, phase="training", step=9))
    (folder / "4194305.beat").write_bytes(record.ljust(RECORD_BYTES))
    life = Beats(folder).read()
    assert (life.beats, life.step, life.in_loop) == (5, 9, False)


@pytest.mark.parametrize(("next_began_s", "left"), [(9.0, 75), (11.0, 0)])
def test_a_stop_of_processes_that_others_have_followed_is_over(
    tmp_path: Path, next_began_s: float, left: int
) -> None:
    """As where torchrun has started its workers again: what these end with is another matter."""
    before = Beat(2**22 + 1, began_s=1.0, count=5, left=75, left_s=10.0, notice="AWS spot")
    after = Beat(2**22 + 2, began_s=next_began_s, count=5, phase="training")
    for beat in (before, after):
        (tmp_path / f"{beat.pid}.beat").write_bytes(msgspec.json.encode(beat))
    life = Beats(tmp_path).read()
    assert (life.left, life.notice) == (left, "AWS spot" if left else "")


def test_a_process_tells_when_it_began_and_when_it_leaves(folder: Path) -> None:
    heartbeat.leaving(75)
    beat = told(folder)
    assert time.time() - 60 < beat.began_s <= beat.left_s <= time.time()
    assert Beats(folder).read().left == 75
