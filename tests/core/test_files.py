from __future__ import annotations

import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from holdfast.core import file_copies, stored
from holdfast.core.files import link_stays_inside
from holdfast.core.tree import Directory, File, StoredDirectory, StoredFile, capture
from holdfast.errors import StateError, StructureMismatch, UnsupportedValue
from tests.core.tree_harness import save

BIG = os.urandom(100_000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "tokenizer"
    (root / "sub" / "empty").mkdir(parents=True)
    (root / "vocab.txt").write_bytes(b"a\nb")
    (root / "big.bin").write_bytes(BIG)
    (root / "sub" / "é ü.json").write_bytes(b"")
    (root / "sub" / "link").symlink_to("../vocab.txt")
    (root / "run.sh").write_bytes(b"#!")
    (root / "run.sh").chmod(0o755)
    (root / "sub").chmod(0o750)
    return root


def listing(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        mode = stat.S_IMODE(path.lstat().st_mode)
        if path.is_symlink():
            found[str(path.relative_to(root))] = ("link", os.readlink(path))
        elif path.is_dir():
            found[str(path.relative_to(root))] = ("dir", mode)
        else:
            found[str(path.relative_to(root))] = (path.read_bytes(), mode)
    return found


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(".holdfast")]


# -- one file -------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"small", BIG], ids=["empty", "small", "big"])
def test_a_file_comes_back_as_a_copy(content: bytes, tmp_path: Path) -> None:
    source = tmp_path / "model.ubj"
    source.write_bytes(content)
    source.chmod(0o640)
    saved = save({"model": File(source)})
    target = File(tmp_path / "out" / "copy.ubj")
    assert saved.restore({"model": target})["model"] is target
    copy = tmp_path / "out" / "copy.ubj"
    assert copy.read_bytes() == content
    assert stat.S_IMODE(copy.stat().st_mode) == 0o640
    copy.write_bytes(b"overwritten")  # a copy: what was saved stays
    saved.restore({"model": target})
    assert copy.read_bytes() == content
    assert leftovers(copy.parent) == []


def test_a_failed_capture_closes_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_copies, "MEMORY_BYTES", 0)
    (tmp_path / "f").write_bytes(BIG)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(UnsupportedValue):
        capture({"f": File(tmp_path / "f"), "bad": object()})
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, words in (("none", "No such file"), ("fifo", "FIFO"), (".", "folder")):
        with pytest.raises(StateError, match=words) as caught:
            capture({"f": File(tmp_path / name)})
        assert "'f'" in str(caught.value)
    with pytest.raises(StateError, match="no folder"):
        capture({"d": Directory(tmp_path / "fifo")})
    with pytest.raises(UnsupportedValue, match="FIFO"):
        capture({"d": Directory(tmp_path)})


def test_a_link_to_a_file_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    stored_file = save({"f": File(tmp_path / "link")}).restore()["f"]
    assert (stored_file.name, stored_file.read()) == ("link", b"x")


def test_restoring_never_writes_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"new")
    (tmp_path / "precious").write_bytes(b"keep")
    (tmp_path / "target").symlink_to(tmp_path / "precious")
    save({"f": File(tmp_path / "source")}).restore({"f": File(tmp_path / "target")})
    assert (tmp_path / "precious").read_bytes() == b"keep"
    assert (tmp_path / "target").read_bytes() == b"new"


# -- a file that has grown since -----------------------------------------------------------


def restored_log(tmp_path: Path, saved: bytes, live: bytes) -> tuple[Path, bool]:
    """A log that was saved and then changed, restored; and whether it is the same file."""
    path = tmp_path / "metrics.csv"
    path.write_bytes(saved)
    path.chmod(0o640)
    kept = save({"log": File(path)})
    path.write_bytes(live)
    inode = path.stat().st_ino
    kept.restore({"log": File(path)})
    assert path.read_bytes() == saved
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert leftovers(tmp_path) == []
    return path, path.stat().st_ino == inode


@pytest.mark.parametrize(
    ("saved", "live", "in_place"),
    [
        (b"1\n", b"1\n2\n", True),
        (b"", b"1\n", True),
        (b"1\n", b"1\n", True),
        (b"1\n2\n", b"1\n", False),
        (b"1\n", b"2\n2\n", False),
        (BIG, BIG + b"!", True),
        (BIG, BIG[:-1] + bytes([BIG[-1] ^ 1]) + b"!", False),
    ],
    ids=["grown", "from nothing", "unchanged", "shorter", "rewritten", "big", "big rewritten"],
)
def test_a_file_that_has_only_grown_is_cut_back_in_place(
    saved: bytes, live: bytes, in_place: bool, tmp_path: Path
) -> None:
    assert restored_log(tmp_path, saved, live)[1] is in_place


def test_a_program_that_appends_goes_on_in_the_restored_file(tmp_path: Path) -> None:
    """It opens its log first, as scripts do, and restores afterwards."""
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"1\n2\n")
    saved = save({"log": File(path)})
    path.write_bytes(b"1\n2\n3\n")
    with path.open("a") as log:
        for _ in range(2):  # a resume in mid-epoch restores twice
            saved.restore({"log": File(path)})
            log.write("3, again\n")
            log.flush()
    assert path.read_bytes() == b"1\n2\n3, again\n"


def test_other_names_of_a_file_keep_what_they_had(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"1")
    saved = save({"log": File(path)})
    path.write_bytes(b"12")
    os.link(path, tmp_path / "kept")
    saved.restore({"log": File(path)})
    assert (path.read_bytes(), (tmp_path / "kept").read_bytes()) == (b"1", b"12")


def test_a_file_that_cannot_be_written_is_replaced(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"1")
    saved = save({"log": File(path)})
    path.write_bytes(b"12")
    real = os.open

    def refuse(name: Any, flags: int, *rest: Any, **named: Any) -> int:
        if name == str(path) and flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied")
        return real(name, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refuse)  # root, who runs some tests, may write anything
    saved.restore({"log": File(path)})
    assert path.read_bytes() == b"1"


# -- folders -----------------------------------------------------------------------------


def test_a_folder_comes_back_as_it_was(folder: Path, tmp_path: Path) -> None:
    saved = save({"tok": Directory(folder)})
    target = tmp_path / "restored"
    saved.restore({"tok": Directory(target)})
    assert listing(target) == listing(folder)
    (target / "vocab.txt").write_bytes(b"changed")
    (target / "extra").write_bytes(b"gone after the restore")
    saved.restore({"tok": Directory(target)})
    assert listing(target) == listing(folder)
    assert leftovers(tmp_path) == []


def test_read_only_folders_can_be_replaced(folder: Path, tmp_path: Path) -> None:
    (folder / "sub").chmod(0o555)
    saved = save({"tok": Directory(folder)})
    target = tmp_path / "restored"
    for _ in range(2):
        saved.restore({"tok": Directory(target)})
    assert stat.S_IMODE((target / "sub").stat().st_mode) == 0o755  # its owner may write
    (folder / "sub").chmod(0o755)


def test_the_tree_of_a_folder_is_in_order(tmp_path: Path) -> None:
    trees = []
    for names in (["b", "a", "c"], ["c", "b", "a"]):
        root = tmp_path / names[0] / "x"
        root.mkdir(parents=True)
        for name in names:
            (root / name).write_bytes(name.encode())
        root.chmod(0o755)
        trees.append(capture({"d": Directory(root)}).tree)
    assert trees[0] == trees[1]


@pytest.mark.parametrize("target", ["/etc/hostname", "../..", "sub/../../x"])
def test_links_that_leave_are_refused_or_followed(target: str, tmp_path: Path) -> None:
    root = tmp_path / "d"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "x").write_bytes(b"outside")
    (root / "sub" / "l").symlink_to(target)
    with pytest.raises(UnsupportedValue, match=r"'t/sub/l'.*symbolic link") as caught:
        capture({"t": Directory(root)})
    assert "follow_links=True" in caught.value.hint


def test_followed_links_are_stored_as_copies(tmp_path: Path) -> None:
    root = tmp_path / "d"
    root.mkdir()
    (tmp_path / "blob").write_bytes(b"outside")
    (root / "l").symlink_to(tmp_path / "blob")
    saved = save({"t": Directory(root, follow_links=True)})
    saved.restore({"t": Directory(tmp_path / "out")})
    assert not (tmp_path / "out" / "l").is_symlink()
    assert (tmp_path / "out" / "l").read_bytes() == b"outside"
    (root / "loop").symlink_to(root)
    with pytest.raises(StateError, match="a folder around it"):
        capture({"t": Directory(root, follow_links=True)})


@pytest.mark.parametrize(
    ("target", "level", "inside"),
    [
        ("a", 0, True),
        ("a/b", 0, True),
        ("../a", 1, True),
        ("..", 1, True),
        ("../../a", 2, True),
        ("..", 0, False),
        ("../../a", 1, False),
        ("a/..", 5, False),
        ("/a", 5, False),
        ("", 5, False),
        ("a\0", 0, False),
        ("\udc80", 0, False),
        ("a" * 5000, 0, False),
    ],
)
def test_which_links_stay_inside(target: str, level: int, inside: bool) -> None:
    assert link_stays_inside(target, level) is inside


def test_names_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "d"
    root.mkdir()
    (Path(os.fsdecode(os.fsencode(root) + b"/\xff"))).write_bytes(b"")
    with pytest.raises(StateError, match="not valid UTF-8"):
        capture({"d": Directory(root)})


# -- failures while restoring ----------------------------------------------------------------


def test_a_refused_restore_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    saved = save({"tok": Directory(folder), "f": File(folder / "big.bin"), "n": 1})
    box = tmp_path / "box"
    live: Any = {"tok": Directory(box / "d"), "f": File(box / "f"), "m": 1}
    decoder = saved.decoder()
    decoder.apply(saved.tree, live)
    with pytest.raises(StructureMismatch):
        decoder.report()
    decoder.discard()
    assert not box.exists()


def test_a_restore_that_fails_midway_keeps_the_old_files(folder: Path, tmp_path: Path) -> None:
    saved = save({"tok": Directory(folder), "f": File(folder / "big.bin")})
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "old").write_bytes(b"old")
    (tmp_path / "f").write_bytes(b"old")
    decoder = saved.decoder()
    decoder.apply(saved.tree, {"tok": Directory(tmp_path / "d"), "f": File(tmp_path / "f")})
    saved.fetch(decoder.requests[1:])
    assert len(leftovers(tmp_path)) == 2
    decoder.discard()
    assert leftovers(tmp_path) == []
    assert (tmp_path / "d" / "old").read_bytes() == b"old"
    assert (tmp_path / "f").read_bytes() == b"old"


def test_leftovers_of_dead_processes_are_removed(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x")
    dead = tmp_path / f".f.{stored._HOST}-{2**22 + 7}-0123abcd.holdfast"
    alive = tmp_path / f".f.{stored._HOST}-{os.getpid()}-0123abcd.holdfast"
    elsewhere = tmp_path / ".f.00000000-4194311-0123abcd.holdfast"
    for path in (dead, alive, elsewhere):
        path.write_bytes(b"half")
    save({"f": File(tmp_path / "source")}).restore({"f": File(tmp_path / "f")})
    assert [path.exists() for path in (dead, alive, elsewhere)] == [False, True, True]


def test_targets_of_another_kind(folder: Path, tmp_path: Path) -> None:
    saved = save({"a": Directory(folder), "b": File(folder / "vocab.txt")})
    live: Any = {"a": File(tmp_path / "x"), "b": Directory(tmp_path / "y")}
    with pytest.raises(StructureMismatch, match=r"a: saved as a Directory, live is File"):
        saved.restore(live)
    (tmp_path / "x").write_bytes(b"")
    (tmp_path / "y").mkdir()
    with pytest.raises(StateError, match="something else is there"):
        saved.restore({"a": Directory(tmp_path / "x")}, only=["a"])
    with pytest.raises(StateError, match="it is a folder"):
        saved.restore({"b": File(tmp_path / "y")}, only=["b"])


def test_a_live_file_where_something_else_was_saved(tmp_path: Path) -> None:
    live: Any = {"a": File(tmp_path / "x"), "b": {"f": Directory(tmp_path / "y")}, "c": [1]}
    live["c"].append(File(tmp_path / "z"))
    with pytest.raises(StructureMismatch) as caught:
        save({"a": 5, "b": {}, "c": [1, {"k": 2}]}).restore(live)
    assert caught.value.missing == ("b/f",)
    assert [line.partition(":")[0] for line in caught.value.changed] == ["a", "c/1"]


# -- without a target ------------------------------------------------------------------------


def test_stored_files_are_read_when_asked(folder: Path, tmp_path: Path) -> None:
    values = save({"tok": Directory(folder), "f": File(folder / "big.bin")}).restore()
    file, tokenizer = values["f"], values["tok"]
    assert isinstance(file, StoredFile)
    assert isinstance(tokenizer, StoredDirectory)
    assert (file.name, file.nbytes, file.read()) == ("big.bin", len(BIG), BIG)
    assert [name for name, _ in tokenizer.files()] == [
        "big.bin",
        "run.sh",
        "sub/é ü.json",
        "vocab.txt",
    ]
    vocabulary = tokenizer["vocab.txt"]
    assert isinstance(vocabulary, StoredFile)
    assert vocabulary.read() == b"a\nb"
    assert isinstance(tokenizer["sub/empty"], StoredDirectory)
    for name in ("none", "sub/link", "vocab.txt/x", ""):
        with pytest.raises(KeyError):
            tokenizer[name]
    file.copy_to(tmp_path / "copy" / "f")
    tokenizer.copy_to(tmp_path / "copy" / "tok")
    assert (tmp_path / "copy" / "f").read_bytes() == BIG
    assert listing(tmp_path / "copy" / "tok") == listing(folder)
    with pytest.raises(UnsupportedValue, match="StoredFile") as caught:
        capture({"f": file})
    assert "copy_to" in caught.value.hint


def test_stored_files_without_a_reader_say_what_to_do(folder: Path) -> None:
    saved = save({"f": File(folder / "vocab.txt")})
    decoder = saved.decoder()
    decoder.fetch = None
    file = decoder.apply(saved.tree)["f"]
    with pytest.raises(StateError, match="not read") as caught:
        file.read()
    assert "load()" in caught.value.hint


def test_a_copy_that_fails_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    saved = save({"tok": Directory(folder)})

    def failing(requests: Any) -> None:
        saved.fetch(requests[:2])
        raise StateError("the store is gone")

    decoder = saved.decoder()
    decoder.fetch = failing
    tokenizer = decoder.apply(saved.tree)["tok"]
    with pytest.raises(StateError, match="gone"):
        tokenizer.copy_to(tmp_path / "out" / "t")
    assert os.listdir(tmp_path / "out") == []


def test_boxes_may_come_from_many_threads(folder: Path, tmp_path: Path) -> None:
    saved = save({"tok": Directory(folder)})
    decoder = saved.decoder()
    decoder.apply(saved.tree, {"tok": Directory(tmp_path / "t")})
    threads = [
        threading.Thread(target=saved.fetch, args=([request],)) for request in decoder.requests
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    decoder.run()
    assert listing(tmp_path / "t") == listing(folder)
