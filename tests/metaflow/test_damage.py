"""What a task that begins does about damage, and about a datastore that does not answer."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import StoreError, StoreUnavailable
from holdfast.metaflow.checkpoints import new_writer
from holdfast.metaflow.current import CurrentCheckpoint
from tests.metaflow.tasks import contents, in_bucket, task, written
from tests.support.servers import faults
from tests.support.servers.proxy import FaultProxy
from tests.support.servers.service import Place


def flip(path: Path) -> None:
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    # In the middle and at the end: what is between leaves of a pack is nobody's.
    for at in (len(data) // 2, len(data) - 1):
        data[at] ^= 1
    path.write_bytes(data)


def garble(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(b"garbage")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def three(folder: Path, **options: Any) -> list[set[Path]]:
    """The run of a task that has saved three times; the files that each save has brought."""
    fit = task(folder / "ds", **options)
    before: set[Path] = set()
    brought: list[set[Path]] = []
    for number in range(3):
        fit.save(written(folder / "x", content=str(number) * 100), metadata={"n": number})
        now = {path for path in (folder / "ds").rglob("*") if path.is_file()}
        brought.append(now - before)
        before = now
    fit.close()
    return brought


class Attempt:
    """The next one, and what it has told."""

    def __init__(self, folder: Path, run: str = "7", origin: str = "") -> None:
        self.told: list[str] = []
        attempt = 0 if origin else 1
        self.checkpoints = task(folder / "ds", attempt=attempt, run=run, origin=origin)
        self.current = CurrentCheckpoint(
            self.checkpoints, temp_dir_root=str(folder / "scratch"), tell=self.told.append
        )
        self.current.go_on("fresh")

    @property
    def loaded(self) -> object:
        """What `n` was; the bytes are those that were saved with it."""
        if self.current.info is None:
            assert not self.current.is_loaded
            return None
        number = self.current.info.metadata["n"]
        assert contents(Path(self.current.directory)) == {"content": str(number) * 100}
        return number

    def goes_on(self, folder: Path) -> None:
        """It saves, what it has saved is seen, and nothing is left behind."""
        saved = self.current.save(written(folder / "x", content="next"), metadata={"n": 9})
        self.current.finish()
        assert list((folder / "scratch").glob("*")) == []
        assert self.checkpoints.list()[0].key == saved["key"]


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink], ids=["flipped", "cut", "deleted"])
@pytest.mark.parametrize("kind", ["packs", "manifests"])
def test_what_is_damaged_is_told_and_the_one_before_it_taken(
    tmp_path: Path, kind: str, damage: Callable[[Path], None]
) -> None:
    brought = three(tmp_path)
    for path in brought[2]:
        if path.parent.name == kind:
            damage(path)
    attempt = Attempt(tmp_path)
    assert attempt.loaded == 1
    passed_over, goes_on = attempt.told
    assert "main@3 is damaged and was passed over: " in passed_over
    assert kind in passed_over
    assert "goes on from" in goes_on
    assert "main@2" in goes_on
    attempt.goes_on(tmp_path)


@pytest.mark.parametrize("run", ["7", "8"], ids=["the next attempt", "a run that resumes"])
def test_where_all_is_damaged_each_is_told_and_the_task_begins_anew(
    tmp_path: Path, run: str
) -> None:
    for path in set[Path]().union(*three(tmp_path)):
        if path.parent.name == "packs":
            path.unlink()
    attempt = Attempt(tmp_path, run, "" if run == "7" else "7")
    assert attempt.loaded is None
    assert [line.split(" is damaged")[0][-1] for line in attempt.told] == ["3", "2", "1"]
    attempt.goes_on(tmp_path)


@pytest.mark.parametrize("damage", [garble, cut, Path.unlink], ids=["garbled", "cut", "deleted"])
@pytest.mark.parametrize("which", ["its own", "all"])
def test_a_damaged_list_hides_no_checkpoint_that_is_whole(
    tmp_path: Path, which: str, damage: Callable[[Path], None]
) -> None:
    """The next attempt rebuilds it; name and metadata are in the checkpoints, too."""
    brought = three(tmp_path)
    for path in set[Path]().union(*(brought if which == "all" else brought[2:])):
        if path.parent.name == "log":
            damage(path)
    if which == "all":
        for path in (tmp_path / "ds").rglob("log/*"):
            path.unlink()
    attempt = Attempt(tmp_path)
    assert attempt.loaded == 2
    attempt.goes_on(tmp_path)
    assert [each.metadata["n"] for each in task(tmp_path / "ds").list()] == [9, 2, 1, 0]


def test_a_run_that_cannot_be_mended_stops_no_task(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    three(tmp_path)
    for path in (tmp_path / "ds").rglob("*.json"):
        garble(path)
    with caplog.at_level(logging.ERROR, "holdfast"):
        attempt = Attempt(tmp_path)
    assert attempt.loaded is None
    assert "is passed over" in caplog.text
    assert "saved beside others" in caplog.text
    attempt.goes_on(tmp_path)
    third = CurrentCheckpoint(task(tmp_path / "ds", attempt=2))
    third.go_on("fresh")
    assert third.info is not None
    assert third.info.metadata == {"n": 9}
    third.finish()


@pytest.mark.parametrize("run", ["7", "8"], ids=["the next attempt", "a run that resumes"])
def test_a_writer_that_is_wholly_damaged_hides_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, run: str
) -> None:
    three(tmp_path, writer=new_writer())
    three(tmp_path)
    for path in (tmp_path / "ds").rglob("main/**/*.json"):
        garble(path)
    attempt = Attempt(tmp_path, run, "" if run == "7" else "7")
    assert attempt.loaded == 2
    assert "is passed over" in caplog.text
    attempt.goes_on(tmp_path)


# -- no answer is not "nothing there" ------------------------------------------------------


@pytest.mark.parametrize("run", ["7", "8"], ids=["the next attempt", "a run that resumes"])
@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_folder_that_does_not_answer_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str, error: int
) -> None:
    three(tmp_path)
    scandir = os.scandir

    def refuse(path: str) -> object:
        if "mf.holdfast" in str(path):
            raise OSError(error, os.strerror(error))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # permissions say nothing to root
    with pytest.raises(StoreUnavailable, match="cannot list"):
        Attempt(tmp_path, run, "" if run == "7" else "7")


@pytest.mark.parametrize("number", range(4))
def test_a_bucket_that_does_not_answer_is_an_error(
    s3: Place, faulty: Callable[[Place], tuple[Place, FaultProxy]], tmp_path: Path, number: int
) -> None:
    """Whichever of the requests it is."""
    place, proxy = faulty(s3)
    root = in_bucket(place)
    fit = task(root)
    fit.save(written(tmp_path / "x", content="1"))
    fit.close()
    rule = proxy.fail(faults.expired_token(), skip=3 * number, times=1000)
    current = CurrentCheckpoint(task(root, run="8", origin="7"))
    with pytest.raises(StoreError):
        current.go_on("fresh")
    assert rule.met
    proxy.heal()
    assert not current.is_loaded
    current.go_on("fresh")
    assert current.is_loaded
    current.finish()


def test_folders_of_others_are_no_runs(tmp_path: Path) -> None:
    three(tmp_path)
    runs = tmp_path.joinpath("ds", *task(tmp_path / "ds").place.task_parts)
    for name in (".cache", ".de", "a..", "..b", "x y", "7.zz"):
        (runs / name).mkdir()
    (runs / "7" / "empty").mkdir()
    assert Attempt(tmp_path, "8", "7").loaded == 2
    assert len(task(tmp_path / "ds").list(every_run=True)) == 3
