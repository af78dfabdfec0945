"""Files and folders of a task, there and back, in a folder and in a bucket."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from holdfast.core import file_copies
from holdfast.errors import CheckpointNotFound, SaveFailed, StateError, UsageError
from holdfast.metaflow.checkpoints import Checkpoints
from holdfast.metaflow.current import CurrentCheckpoint
from holdfast.metaflow.reference import Reference
from tests.metaflow.tasks import contents, in_bucket, task, written


@pytest.fixture(params=["folder", "s3"])
def fit(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoints:
    if request.param == "s3":
        return task(in_bucket(request.getfixturevalue("s3")))
    return task(tmp_path / "ds")


def test_a_folder_comes_back_whole_and_is_a_copy(fit: Checkpoints, tmp_path: Path) -> None:
    source = written(tmp_path / "x", **{"a.b-c": "1", "größe": "2", "..x": "3", "none": ""})
    written(source / "deep" / "er", weights="4" * 5000)
    (source / "empty").mkdir(mode=0o750)
    (source / "a.b-c").chmod(0o741)
    (source / "to_file").symlink_to("none")
    (source / "to_folder").symlink_to("deep")
    (source / "out").symlink_to(written(tmp_path / "outside", w="5"))
    saved = fit.save(source)
    assert fit.list() == [saved]
    assert saved.size >= 5004

    loaded = tmp_path / "loaded"
    for _ in range(2):  # the second one finds what was saved, whatever became of the first
        loaded.mkdir()
        fit.load(saved, loaded)
        assert contents(loaded) == {  # what links led to, copied
            "a.b-c": "1",
            "größe": "2",
            "..x": "3",
            "none": "",
            "to_file": "",
            "empty": "/",
            "deep/er/weights": "4" * 5000,
            "to_folder/er/weights": "4" * 5000,
            "out/w": "5",
        }
        assert (loaded / "a.b-c").stat().st_mode & 0o777 == 0o741
        assert (loaded / "empty").stat().st_mode & 0o777 == 0o750
        for name in ("a.b-c", "deep/er/weights", "out/w"):
            with open(loaded / name, "r+") as file:
                file.write("changed")
        loaded.rename(tmp_path / f"loaded{_}")
    fit.close()


def test_a_file_comes_back_under_its_name(fit: Checkpoints, tmp_path: Path) -> None:
    source = written(tmp_path / "x", **{"model.v1.ubj": "booster"})
    (source / "latest").symlink_to("model.v1.ubj")
    first = fit.save(source / "model.v1.ubj")
    second = fit.save(source)
    third = fit.save(str(source / "latest"))
    assert [each.file for each in (first, second, third)] == ["model.v1.ubj", "", "latest"]
    into = written(tmp_path / "into", other="stays")
    fit.load(first, into)
    assert contents(into) == {"model.v1.ubj": "booster", "other": "stays"}
    fit.load(third, into)
    assert contents(into) == {"model.v1.ubj": "booster", "other": "stays", "latest": "booster"}
    fit.load(second, into)
    fit.close()


def test_what_has_the_same_name_is_replaced_and_others_stay(tmp_path: Path) -> None:
    source = written(tmp_path / "x", a="new", link="new", now_folder="")
    (source / "now_folder").unlink()
    written(source / "now_folder", i="new")
    written(source / "both" / "inner", i="new")
    fit = task(tmp_path / "ds")
    saved = fit.save(source)
    fit.close()

    elsewhere = written(tmp_path / "elsewhere", precious="old")
    into = written(tmp_path / "into", a="old and longer", b="old", now_folder="old file")
    written(into / "both", mine="old")
    (into / "both" / "inner").symlink_to(elsewhere)
    (into / "link").symlink_to(elsewhere / "precious")
    identity = into.stat().st_ino
    os.link(into / "a", tmp_path / "other name")
    fit.load(saved, into)
    assert contents(into) == {
        "a": "new",
        "b": "old",
        "link": "new",
        "both/mine": "old",
        "both/inner/i": "new",
        "now_folder/i": "new",
    }
    assert contents(elsewhere) == {"precious": "old"}
    assert (tmp_path / "other name").read_text() == "old and longer"
    assert into.stat().st_ino == identity  # a working directory, or a mounted one, stays what it is


def test_a_file_takes_no_folders_place(tmp_path: Path) -> None:
    fit = task(tmp_path / "ds")
    saved = fit.save(written(tmp_path / "x", a="new", b="new"))
    fit.close()
    into = written(tmp_path / "into", a="old")
    written(into / "b", i="old")
    with pytest.raises(UsageError, match="a folder is there"):
        fit.load(saved, into)
    assert contents(into) == {"a": "old", "b/i": "old"}


def test_loading_into_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = task(tmp_path / "ds")
    saved = fit.save(written(tmp_path / "x", a="1"))
    fit.close()
    monkeypatch.chdir(written(tmp_path / "here", own="2"))
    CurrentCheckpoint(fit).load(saved, ".")
    assert contents(Path.cwd()) == {"a": "1", "own": "2"}


@pytest.mark.parametrize("path", ["", "nothing", "nothing/x", "x/a/b", "dangling", "\0"])
def test_what_is_not_there_is_an_error_and_saves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """The empty path too: it is not the working directory."""
    written(tmp_path / "x", a="1")
    (tmp_path / "dangling").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="nothing to save"):
        task(tmp_path / "ds").save(path)
    assert not (tmp_path / "ds").exists()


def test_what_is_no_file_is_an_error_and_saves_nothing(tmp_path: Path) -> None:
    fit = task(tmp_path / "ds")
    os.mkfifo(written(tmp_path / "x") / "fifo")
    (written(tmp_path / "y") / "around").symlink_to(tmp_path / "y")
    (written(tmp_path / "z") / "dangling").symlink_to("nowhere")
    for path in ("x", "x/fifo", "y", "z"):
        with pytest.raises(StateError, match="cannot save"):
            fit.save(tmp_path / path)
    assert fit.list() == []
    fit.close()
    assert fit.list() == []


def test_a_file_that_changes_while_it_is_saved_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = task(tmp_path / "ds")
    path = tmp_path / "model"
    path.write_bytes(bytes(3 << 20))
    before = fit.save(path)
    read_at, times = file_copies.read_at, itertools.count()

    def reading(fd: int, offset: int, into: memoryview) -> int:
        count = read_at(fd, offset, into)
        with open(path, "r+b") as file:  # as another program does in between
            file.write(os.urandom(1000))
        os.utime(path, ns=(0, next(times)))  # a clock of files may stand still for 4 ms
        return count

    with monkeypatch.context() as patch:
        patch.setattr(file_copies, "read_at", reading)
        with pytest.raises(SaveFailed, match="changed while it was copied"):
            fit.save(path)
    assert fit.list() == [before]
    after = fit.save(path)
    fit.close()
    assert fit.list() == [after, before]


def test_an_unknown_checkpoint_leaves_what_is_there(tmp_path: Path) -> None:
    fit = task(tmp_path / "ds", keep="last=1")
    current = CurrentCheckpoint(fit)
    written(Path(current.directory), a="1")
    gone = current.save()
    current.save()
    before = current.directory
    with pytest.raises(CheckpointNotFound):
        current.load(gone)
    assert current.directory == before
    assert contents(Path(before)) == {"a": "1"}
    assert not current.is_loaded
    current.finish()


def test_a_key_is_a_reference(fit: Checkpoints, tmp_path: Path) -> None:
    current = CurrentCheckpoint(fit)
    for content in ("1", "2"):
        saved = current.save(written(tmp_path / "x", a=content))
    written(tmp_path / "x", a="3")
    current.load(saved["key"])
    assert current.info == Reference.of(saved)
    assert contents(Path(current.directory)) == {"a": "2"}
    run = saved["key"].partition("@")[0]
    for unknown in (f"{run}@7", f"{run}x@1"):
        with pytest.raises(CheckpointNotFound):
            current.load(unknown)
    for wrong in ("", "x", run, f"{run}@", f"{run}@latest", f"mf.holdfast/../{run}@1", f"/{run}@1"):
        with pytest.raises(UsageError, match="no checkpoint"):
            current.load(wrong)
    current.finish()


def test_a_reference_leads_nowhere_else(tmp_path: Path) -> None:
    fit = task(tmp_path / "ds")
    saved = fit.save(written(tmp_path / "x", a="1") / "a").to_dict()
    fit.close()
    with pytest.raises(UsageError, match="not the name of a file"):
        CurrentCheckpoint(fit).load({**saved, "file": "../a"}, tmp_path / "into")
    assert contents(tmp_path / "into") == {}
