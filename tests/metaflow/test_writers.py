"""Who saves: threads, processes and attempts of a task, and what the end of it waits for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import Fenced, SaveFailed, StoreError
from holdfast.metaflow.checkpoints import Checkpoints
from holdfast.metaflow.current import CurrentCheckpoint
from holdfast.metaflow.places import Root
from holdfast.metaflow.reference import Reference
from holdfast.metaflow.task import VARIABLE
from tests.metaflow.tasks import contents, in_bucket, task, written
from tests.support.servers.service import Place


@pytest.fixture(params=["folder", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Root:
    if request.param == "s3":
        return in_bucket(request.getfixturevalue("s3"))
    return Root(str(tmp_path / "ds"))


def check(fit: Checkpoints, saved: list[dict[str, Any]], into: Path) -> None:
    """Each of the saves is listed once, and loads what its metadata says."""
    assert len({each["key"] for each in saved}) == len(saved)
    listed = fit.list()
    assert sorted(each.key for each in listed) == sorted(each["key"] for each in saved)
    for number, reference in enumerate(saved):
        folder = written(into / str(number))
        fit.load(Reference.of(reference), folder)
        assert contents(folder) == {"content": reference["metadata"]["content"]}


def test_threads_save_at_once(root: Root, tmp_path: Path) -> None:
    fit = task(root)

    def save(number: int) -> list[dict[str, Any]]:
        saved: list[dict[str, Any]] = []
        for time in range(3):
            content = f"{number}.{time}"
            folder = written(tmp_path / f"thread{number}", content=content)
            metadata = {"content": content}
            saved.append(fit.save(folder, metadata=metadata, block=time != 1).to_dict())
        return saved

    with ThreadPoolExecutor(8) as threads:
        saved = [each for some in threads.map(save, range(8)) for each in some]
    fit.close()
    check(fit, saved, tmp_path / "loaded")


SAVES = """
import json, os, sys
from pathlib import Path
from holdfast.metaflow.outside import Checkpoint
current = Checkpoint(init_dir=True)
for time in range(2):
    content = f"{sys.argv[1]}.{time}"
    Path(current.directory, "content").write_text(content)
    print(json.dumps(current.save(metadata={"content": content}, block=time == 0)), flush=True)
# What is not durable yet is when the process has ended.
"""


def told(fit: Checkpoints, root: Root) -> str:
    about = {"pathspec": "Train/7/fit/2", "attempt": 0, "namespace": "", "rank": None, "keep": None}
    return json.dumps({"root": asdict(root), "place": asdict(fit.place), **about})


def test_processes_that_a_task_has_started_save_at_once(root: Root, tmp_path: Path) -> None:
    fit = task(root)
    folder = written(tmp_path / "x", content="own")
    saved = [fit.save(folder, metadata={"content": "own"}).to_dict()]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SAVES, str(number)],
            env={**os.environ, VARIABLE: told(fit, root)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        saved += map(json.loads, output.splitlines())
    saved.append(fit.save(folder, metadata={"content": "own"}).to_dict())
    fit.close()
    assert len(saved) == 10
    check(fit, saved, tmp_path / "loaded")


def test_a_process_that_ends_and_can_start_no_thread_finishes_its_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Python 3.12 has it."""

    def ending(*_: object) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    fit = task(tmp_path / "ds")
    fit.save(written(tmp_path / "x", a="1"), block=False)
    with monkeypatch.context() as patch:
        patch.setattr("_thread.start_new_thread", ending)
        fit.close()
    assert len(fit.list()) == 1


def in_child(work: Any) -> dict[str, Any]:
    """What `work` returns in a forked child."""
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        signal.alarm(60)  # ends a child that waits for a lock for ever
        try:
            os.write(writing, json.dumps(work()).encode())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    assert os.waitpid(pid, 0)[1] == 0
    return json.loads(text)


def test_forked_children_save_on_their_own(tmp_path: Path) -> None:
    """Though a thread of the parent, which they have not, is in the middle of a save."""
    fit = task(tmp_path / "ds")
    current = CurrentCheckpoint(fit)
    directory = Path(current.directory)

    def save(content: str) -> dict[str, Any]:
        folder = written(tmp_path / content, content=content)
        return current.save(folder, metadata={"content": content})

    def child(number: int) -> dict[str, Any]:
        saved = save(f"child{number}")
        current.finish()  # the folder is the parent's
        return saved

    saved = [save("parent")]
    begun, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with fit._lock:  # pyright: ignore[reportPrivateUsage]
            begun.set()
            go_on.wait(60)

    holding = threading.Thread(target=hold)
    holding.start()
    begun.wait(10)
    saved += [in_child(lambda number=number: child(number)) for number in range(2)]
    go_on.set()
    holding.join()
    saved.append(save("parent again"))
    assert directory.is_dir()
    current.finish()
    assert not directory.exists()
    check(fit, saved, tmp_path / "loaded")


def test_a_forked_child_cannot_use_a_bucket_and_is_told_so(s3: Place, tmp_path: Path) -> None:
    fit = task(in_bucket(s3))
    folder = written(tmp_path / "x", content="1")
    before = fit.save(folder)

    def child() -> dict[str, Any]:
        try:
            fit.save(folder)
        except StoreError as error:
            return {"message": error.message, "hint": error.hint}
        return {}

    error = in_child(child)
    assert "forked" in error["message"]
    assert "spawn" in error["hint"]
    after = fit.save(folder)
    fit.close()
    assert fit.list() == [after, before]


# -- attempts ------------------------------------------------------------------------------


def test_a_later_attempt_takes_the_run_over(root: Root, tmp_path: Path) -> None:
    """The earlier one, still alive, saves no more, and what it has saved stays."""
    folder = written(tmp_path / "x", content="1")
    first, second = task(root), task(root, attempt=1)
    saved = [first.save(folder), second.save(folder)]
    for block in (True, False):
        with pytest.raises(Fenced):
            first.save(folder, block=block)
    first.close()
    with pytest.raises(Fenced):  # nor does it begin anew
        first.save(folder)
    saved.append(second.save(folder))
    second.close()
    assert second.list() == saved[::-1]
    assert [each.version_id for each in saved] == [1, 2, 3]


def test_a_later_attempt_that_goes_on_has_taken_over(root: Root, tmp_path: Path) -> None:
    folder = written(tmp_path / "x", content="1")
    first, second = task(root), CurrentCheckpoint(task(root, attempt=1))
    saved = first.save(folder)
    second.go_on("fresh")
    assert second.info == saved
    with pytest.raises(Fenced):
        first.save(folder)
    second.save(folder)
    second.finish()
    first.close()
    assert [each.attempt for each in task(root).list()] == [1, 0]


def test_an_earlier_attempt_that_begins_to_save_late_does_not(root: Root, tmp_path: Path) -> None:
    folder = written(tmp_path / "x", content="1")
    first, second = task(root), task(root, attempt=1)
    saved = second.save(folder)
    with pytest.raises(Fenced, match="attempt 1 of Train/7/fit/2 has begun"):
        first.save(folder)
    again = second.save(folder)
    second.close()
    assert second.list() == [again, saved]


def test_a_save_in_the_background_that_is_fenced_is_told_at_the_end(tmp_path: Path) -> None:
    folder = written(tmp_path / "x", content="1")
    first, second = task(tmp_path / "ds"), task(tmp_path / "ds", attempt=1)
    first.save(folder)
    second.save(folder)
    first.save(folder, block=False)
    with pytest.raises(Fenced):
        first.close()
    first.close()
    second.close()


def test_the_newest_is_that_of_the_last_attempt_whatever_clocks_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written(tmp_path / "x", content="1")
    for attempt in (0, 1):
        fit = task(tmp_path / "ds", attempt=attempt)
        fit.save(folder)
        fit.close()
    plain = CheckpointsOfTheFuture(fit)
    monkeypatch.setattr("holdfast.metaflow.checkpoints.read_note", plain)
    assert [each.version_id for each in fit.list()] == [2, 1]


class CheckpointsOfTheFuture:
    """Reads notes as if the first save had come from a machine an hour ahead."""

    def __init__(self, fit: Checkpoints) -> None:
        from holdfast.metaflow.reference import read_note

        self._read = read_note

    def __call__(self, info: Any, key: str) -> Reference | None:
        from dataclasses import replace

        ahead = replace(info, time_s=info.time_s + (3600 if info.step == 1 else 0))
        return self._read(ahead, key)


# -- what stays ----------------------------------------------------------------------------


def test_what_a_process_of_an_attempt_that_was_given_up_saves_is_older(tmp_path: Path) -> None:
    """It may live on, and nothing tells it: what the next attempt has saved comes first."""

    def save(fit: Checkpoints, content: str) -> None:
        fit.save(written(tmp_path / "x", content=content), metadata={"content": content})

    def found() -> list[str]:
        later = task(tmp_path / "ds", attempt=2)
        contents = [each.metadata["content"] for each in later.to_go_on_from("fresh")]
        assert [each.metadata["content"] for each in later.list()] == contents
        later.close()
        return contents

    orphan = task(tmp_path / "ds", writer="at-1")
    save(orphan, "first")
    second = task(tmp_path / "ds", attempt=1)
    save(orphan, "second")
    assert found() == ["second", "first"]  # it is still all that there is
    save(second, "third")
    second.close()
    save(orphan, "late")
    assert found() == ["third", "late", "second", "first"]
    orphan.close()


def test_unchanged_files_are_stored_once(tmp_path: Path) -> None:
    fit = task(tmp_path / "ds")
    (written(tmp_path / "x") / "weights").write_bytes(os.urandom(8 << 20))
    for _ in range(5):
        fit.save(tmp_path / "x")
    fit.close()
    assert len(fit.list()) == 5
    stored = sum(path.stat().st_size for path in (tmp_path / "ds").rglob("*") if path.is_file())
    assert 8 << 20 < stored < 9 << 20


@pytest.mark.parametrize(
    ("keep", "left"), [(None, [1, 2, 3, 4]), ("last=2", [3, 4]), ("best=1:val_loss", [2, 4])]
)
def test_what_is_kept_follows_the_metadata(tmp_path: Path, keep: str, left: list[int]) -> None:
    fit = task(tmp_path / "ds", keep=keep)
    for loss in (0.5, 0.1, 0.3, 0.4):
        fit.save(written(tmp_path / "x", content=str(loss)), metadata={"val_loss": loss})
    fit.close()
    assert sorted(each.version_id for each in fit.list()) == left


# -- the end -------------------------------------------------------------------------------


def test_the_end_waits_for_saves_in_the_background(root: Root, tmp_path: Path) -> None:
    fit = task(root)
    current = CurrentCheckpoint(fit, temp_dir_root=str(tmp_path / "scratch" / "here"))
    saved: list[dict[str, Any]] = []
    for content in ("a", "b", "c"):
        written(Path(current.directory), content=content)
        saved.append(current.save(metadata={"content": content}, block=False))
    current.finish()
    current.finish()
    assert list((tmp_path / "scratch" / "here").iterdir()) == []
    check(fit, saved, tmp_path / "loaded")
    later = current.save(written(tmp_path / "x", content="d"), metadata={"content": "d"})
    current.finish()
    check(fit, [*saved, later], tmp_path / "loaded again")


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, packs cannot be written."""
    from holdfast.manager.packer import Packer

    def write(self: Packer, snapshot: object) -> Iterator[None]:
        raise OSError(28, "no space")
        yield

    with monkeypatch.context() as patch:
        patch.setattr(Packer, "write", write)
        yield


def test_a_save_in_the_background_that_fails_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though another one succeeds after it: its reference was handed out."""
    fit = task(tmp_path / "ds")
    current = CurrentCheckpoint(fit, temp_dir_root=str(tmp_path / "scratch"))
    folder = written(Path(current.directory), content="1")
    with failing(monkeypatch):
        current.save(block=False)
        with pytest.raises(SaveFailed):
            current.save()
    saved = fit.save(folder)
    with pytest.raises(SaveFailed, match="step 1 failed"):
        current.finish()
    assert list((tmp_path / "scratch").iterdir()) == []
    current.finish()
    assert fit.list() == [saved]


def test_a_save_that_failed_while_it_was_waited_for_is_told_then_and_not_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    current = CurrentCheckpoint(task(tmp_path / "ds"))
    with failing(monkeypatch), pytest.raises(SaveFailed):
        current.save()
    current.finish()


class TimeoutException(Exception):
    """As Metaflow's @timeout raises it: in the main thread, wherever that is."""


def test_a_timeout_in_the_wait_is_raised_when_the_save_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from holdfast.manager.packer import Packer
    from holdfast.manager.pending import Pending

    fit = task(tmp_path / "ds")
    current = CurrentCheckpoint(fit, temp_dir_root=str(tmp_path / "scratch"))
    write, go_on = Packer.write, threading.Event()
    result, rung = Pending.result, list[int]()

    def slowly(self: Packer, snapshot: Any) -> Any:
        go_on.wait(60)
        return (yield from write(self, snapshot))

    def waiting(self: Pending, timeout_s: float | None = None) -> Any:
        if not rung:  # from here on: a slow machine comes here when it comes
            signal.setitimer(signal.ITIMER_REAL, 0.2)
        return result(self, timeout_s)

    def alarm(number: int, frame: object) -> None:
        rung.append(number)
        assert fit.list() == []
        go_on.set()
        raise TimeoutException

    monkeypatch.setattr(Packer, "write", slowly)
    monkeypatch.setattr(Pending, "result", waiting)
    written(Path(current.directory), content="1")
    saved = current.save(metadata={"content": "1"}, block=False)
    before = signal.signal(signal.SIGALRM, alarm)
    try:
        with pytest.raises(TimeoutException):
            current.finish()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert list((tmp_path / "scratch").iterdir()) == []
    check(fit, [saved], tmp_path / "loaded")
    current.finish()


def test_a_signals_handler_saves_in_the_middle_of_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one for SIGTERM does on a machine that is about to go."""
    from holdfast.manager.pending import Pending

    fit = task(tmp_path / "ds")
    folder = written(tmp_path / "x", content="1")
    result, saved = Pending.result, list[Reference]()

    def waiting(self: Pending, timeout_s: float | None = None) -> Any:
        if self.step == 1 and not saved:
            signal.raise_signal(signal.SIGUSR1)
        return result(self, timeout_s)

    monkeypatch.setattr(Pending, "result", waiting)
    before = signal.signal(signal.SIGUSR1, lambda *_: saved.append(fit.save(folder)))
    try:
        saved.append(fit.save(folder))
    finally:
        signal.signal(signal.SIGUSR1, before)
    fit.close()
    assert [each.version_id for each in saved] == [2, 1]
    assert fit.list() == saved
