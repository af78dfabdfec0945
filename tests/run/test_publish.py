from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from holdfast.errors import StoreUnavailable, UsageError
from holdfast.run.publish import Publisher, parse_publish, swap


class Exports:
    """A manager that exports its chosen checkpoint as one file."""

    def __init__(self) -> None:
        self.chosen: Any = None
        self.exported: list[str] = []
        self.fail = False

    def choose(self) -> Any:
        return self.chosen

    def show(self, number: int) -> None:
        self.chosen = SimpleNamespace(id=f"{number:064x}"[::-1])

    def export(self, ref: str, folder: Path) -> None:
        Path(folder).mkdir()
        if self.fail:
            raise StoreUnavailable("gone")
        Path(folder, "state.json").write_text(ref)
        self.exported.append(ref)


def test_parse() -> None:
    assert parse_publish("latest:a:b").path == Path("a:b")
    for wrong in ("best", "best:", "newest:x", ":x", ""):
        with pytest.raises(UsageError, match="publish="):
            parse_publish(wrong)


def test_the_newest_is_shown(tmp_path: Path) -> None:
    exports = Exports()
    path = tmp_path / "deep" / "best"
    publisher = Publisher(path, exports, exports.choose)
    publisher.refresh()
    publisher.wait()
    assert not path.exists()  # nothing to show yet
    for number in (1, 2):
        exports.show(number)
        publisher.refresh()
        publisher.wait()
        assert (path / "state.json").read_text() == exports.chosen.id
    publisher.refresh()
    publisher.wait()
    assert len(exports.exported) == 2
    assert len(list(path.parent.iterdir())) == 2  # the link and one folder


def test_a_failed_export_leaves_the_one_before(tmp_path: Path, caplog) -> None:
    exports = Exports()
    publisher = Publisher(tmp_path / "best", exports, exports.choose)
    exports.show(1)
    publisher.refresh()
    publisher.wait()
    exports.fail = True
    exports.show(2)
    publisher.refresh()
    publisher.wait()
    assert "could not publish" in caplog.text
    assert (tmp_path / "best" / "state.json").read_text() == exports.exported[0]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_of_the_user_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a link"):
        Publisher(tmp_path, Exports(), lambda: None)


def test_there_is_a_whole_export_at_every_moment(tmp_path: Path) -> None:
    path = tmp_path / "best"

    def fill(folder: Path) -> None:
        folder.mkdir()
        for name in "abc":
            (folder / name).write_text(folder.name)

    swap(path, f"{0:016x}", fill)
    missing: list[str] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            shown = os.readlink(path)  # raises, and the thread dies, if there is no link
            try:
                names = set(os.listdir(tmp_path / shown))
            except FileNotFoundError:
                names = None
            # It was whole, unless it is no longer the one that is shown.
            if names != {"a", "b", "c"} and os.readlink(path) == shown:
                missing.append(shown)

    thread = threading.Thread(target=read)
    thread.start()
    for version in range(1, 20):
        swap(path, f"{version:016x}", fill)
    assert thread.is_alive()
    stop.set()
    thread.join()
    assert missing == []
    assert len(list(tmp_path.iterdir())) == 2


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "best"
    (tmp_path / f".best.{7:016x}").mkdir()
    (tmp_path / ".best.link").symlink_to("nowhere")
    (tmp_path / ".best.mine").mkdir()
    swap(path, f"{8:016x}", lambda folder: folder.mkdir())
    assert sorted(p.name for p in tmp_path.iterdir()) == [f".best.{8:016x}", ".best.mine", "best"]


def test_the_program_may_change_its_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    exports = Exports()
    publisher = Publisher(Path("out/best"), exports, exports.choose)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    exports.show(1)
    publisher.refresh()
    publisher.wait()
    assert (tmp_path / "out/best/state.json").exists()
