"""Tracked files are stored as they were when the capture ran, or the save fails."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast import CheckpointManager
from holdfast.core import file_copies
from holdfast.core.adapters import LeafSource
from holdfast.core.tree import Directory, File, capture
from holdfast.errors import SaveFailed

CONTENT = os.urandom(3 * 2**20 + 17)


@pytest.fixture(params=["memory", "disk", "disk, without the kernel"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "memory":
        monkeypatch.setattr(file_copies, "MEMORY_BYTES", 0)
    if request.param == "disk, without the kernel":

        def refuse(*args: Any) -> int:
            raise OSError(errno.EXDEV, "between two file systems")

        monkeypatch.setattr(os, "copy_file_range", refuse)


everywhere = pytest.mark.usefixtures("place")


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_copies, "MEMORY_BYTES", 0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "f"
    made.write_bytes(CONTENT)
    return made


def captured(path: Path) -> LeafSource:
    return capture({"f": File(path)}).leaves[0].source


def content(source: LeafSource) -> bytes:
    buffer = bytearray(source.nbytes)
    for offset in range(0, source.nbytes, 1_000_000):
        source.copy_range(offset, memoryview(buffer)[offset : offset + 1_000_000])
    source.close()
    return bytes(buffer)


def append(path: Path) -> None:
    with path.open("ab") as out:
        out.write(b"more")


def rewrite(path: Path) -> None:
    before = path.stat()
    with path.open("r+b") as out:
        out.write(b"x" * 10)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def map_and_write(path: Path) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        view[5:8] = b"new"


def replace(path: Path) -> None:
    path.with_name("new").write_bytes(b"other")
    path.with_name("new").replace(path)


CHANGES: list[Callable[[Path], None]] = [
    append,
    rewrite,
    map_and_write,
    replace,
    lambda path: os.truncate(path, 10),
    Path.unlink,
]


@everywhere
@pytest.mark.parametrize("change", CHANGES)
def test_what_happens_to_a_file_after_the_capture_does_not_matter(
    change: Callable[[Path], None], path: Path
) -> None:
    source = captured(path)
    change(path)
    assert content(source) == CONTENT


@everywhere
def test_a_write_through_a_map_that_moves_no_time_stamp(tmp_path: Path, path: Path) -> None:
    """Once a page is dirty, later writes to it are seen by nobody: not in stat."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        view[0:3] = b"old"
        with CheckpointManager(tmp_path / "run") as ckpts:
            before = path.stat()
            pending = ckpts.save(1, {"f": File(path)})
            view[0:3] = b"new"
            assert path.stat().st_mtime_ns == before.st_mtime_ns
            pending.result()
            assert ckpts.load()["f"].read() == b"old" + CONTENT[3:]


@everywhere
def test_a_log_that_grows_at_every_step_is_saved_at_its_length(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    with CheckpointManager(tmp_path / "run", keep=None) as ckpts, path.open("w") as log:
        for step in range(1, 8):
            log.write(f"{step}\n")
            log.flush()
            ckpts.save(step, {"log": File(path)})
        ckpts.wait()
        for step in range(1, 8):
            expected = "".join(f"{number}\n" for number in range(1, step + 1))
            assert ckpts.load(step)["log"].read() == expected.encode()


# -- somebody writes while the file is copied --------------------------------------------


def meddle(
    monkeypatch: pytest.MonkeyPatch, what: Callable[[], object], times: int = 99
) -> list[int]:
    """Let `what` happen in the middle of copies, `times` of them."""
    done: list[int] = []
    for name in ("preadv", "copy_file_range"):
        real = getattr(os, name)

        def meddling(*args: Any, real: Callable[..., int] = real) -> int:
            count = real(*args)
            if len(done) < times:
                done.append(1)
                what()
            return count

        monkeypatch.setattr(os, name, meddling)
    return done


@everywhere
def test_appends_while_it_is_copied_do_no_harm(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = meddle(monkeypatch, lambda: append(path))
    source = captured(path)
    assert done
    assert content(source) == CONTENT


@everywhere
@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(os.urandom(len(CONTENT))),
        lambda path: os.truncate(path, path.stat().st_size // 2),
    ],
    ids=["rewritten", "cut"],
)
def test_a_file_that_changes_once_while_it_is_copied_is_copied_again(
    change: Callable[[Path], None], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meddle(monkeypatch, lambda: change(path), times=1)
    source = captured(path)
    monkeypatch.undo()
    assert content(source) == path.read_bytes()


@everywhere
def test_a_file_that_never_stands_still_fails_the_save(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meddle(monkeypatch, lambda: path.write_bytes(os.urandom(len(CONTENT))))
    source = captured(path)
    with pytest.raises(SaveFailed, match=r"f' changed while it was copied"):
        content(source)
    source.close()


# -- copies that fail: so does the save, and the training goes on -------------------------


@pytest.mark.usefixtures("on_disk")
def test_no_space_for_the_copy(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with CheckpointManager(tmp_path / "run") as ckpts:
        with monkeypatch.context() as patch:
            patch.setattr(os, "copy_file_range", full)
            patch.setattr(os, "pwrite", full)
            pending = ckpts.save(1, {"f": File(path)})
            with pytest.raises(SaveFailed, match=r"could not be copied: No space left") as caught:
                pending.result()
        assert "space for a copy" in caught.value.hint
        assert "the save of step 1 failed" in caplog.text
        ckpts.save(2, {"f": File(path)}).result()
        assert ckpts.load()["f"].read() == CONTENT


@pytest.mark.usefixtures("on_disk")
def test_a_folder_that_cannot_be_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tempfile.TemporaryFile

    def refuse(**named: Any) -> Any:
        if named.get("dir") == str(path.parent):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(**named)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)  # root may write anywhere
    source = captured(path)
    append(path)
    assert content(source) == CONTENT


# -- what is held ---------------------------------------------------------------------------


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_many_files_take_one_descriptor_and_leave_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_copies, "MEMORY_BYTES", 5000)
    root = tmp_path / "many"
    root.mkdir()
    contents = [os.urandom(1000 + index) for index in range(50)]
    for index, data in enumerate(contents):
        (root / f"{index:03}").write_bytes(data)
    before = descriptors()
    leaves = capture({"d": Directory(root)}).leaves
    assert descriptors() == before + 1
    assert sum(not leaf.source.streamed for leaf in leaves) == 4
    assert len(os.listdir(root)) == 50
    assert os.listdir(tmp_path) == ["many"]
    assert [content(leaf.source) for leaf in leaves] == contents
    assert descriptors() == before


@pytest.mark.usefixtures("on_disk")
@pytest.mark.parametrize("fails", [False, True])
def test_a_save_lets_go_of_its_copies(
    fails: bool, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CheckpointManager(tmp_path / "run") as ckpts:
        ckpts.save(1, {"f": File(path)}).result()
        ckpts._saver.stop()  # type: ignore[union-attr]
        before = descriptors()
        if fails:

            def refuse(*args: Any) -> None:
                raise SaveFailed("no")

            monkeypatch.setattr("holdfast.manager.saver.Packer", refuse)
            with pytest.raises(SaveFailed):
                ckpts.save(2, {"f": File(path)}).result()
            monkeypatch.undo()
        else:
            ckpts.save(2, {"f": File(path)}).result()
        ckpts._saver.stop()  # type: ignore[union-attr]
        assert descriptors() == before
        ckpts.save(3, {}).result()


@pytest.mark.usefixtures("on_disk")
def test_the_space_of_a_copy_is_free_although_a_forked_child_holds_it(path: Path) -> None:
    source: Any = captured(path)
    child = os.dup(source._spill._file.fileno())  # what a fork does
    content(source)
    assert os.fstat(child).st_blocks == 0
    os.close(child)
