"""Exports appear whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import holdfast
from holdfast.errors import DamagedObject, UsageError
from holdfast.manager import CheckpointManager, Listing
from holdfast.run.publish import swap


@pytest.fixture
def run(tmp_path: Path) -> Path:
    tracked = tmp_path / "tracked"
    tracked.mkdir()
    (tracked / "vocab.txt").write_text("a b c")
    with CheckpointManager(tmp_path / "run", keep=None) as ckpts:
        for step in (1, 2):
            state = {"w": np.full(50_000, step), "files": holdfast.Directory(tracked)}
            ckpts.save(step, state).result()
    return tmp_path / "run"


def exported(folder: Path) -> int:
    """Which step `folder` holds, after its files were looked at."""
    assert sorted(p.name for p in folder.iterdir()) == ["files", "state.json", "state.safetensors"]
    assert (folder / "files" / "files" / "vocab.txt").read_text() == "a b c"
    return int(load_file(folder / "state.safetensors")["w"][0])


def beside(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.parent.iterdir() if p.name.startswith("."))


def test_a_new_and_an_empty_folder(run: Path, tmp_path: Path) -> None:
    empty, new = tmp_path / "empty", tmp_path / "a" / "b" / "new"
    empty.mkdir(mode=0o750)
    link = tmp_path / "link"
    (tmp_path / "behind").mkdir()
    link.symlink_to("behind")
    with Listing(run) as ckpts:
        for folder in (empty, new, link):
            written = ckpts.export(2, folder)
            assert written == [
                folder / "state.safetensors",
                folder / "state.json",
                folder / "files" / "files",
            ]
            assert all(path.exists() for path in written)
            assert exported(folder) == 2
            assert beside(folder) == []
    assert link.is_symlink()
    assert empty.stat().st_mode & 0o777 == 0o750, "as it was"
    assert new.stat().st_mode & 0o777 == new.parent.stat().st_mode & 0o777, "the usual ones"


def test_a_folder_in_use_is_refused_or_written_into(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Listing(run) as ckpts:
        ckpts.export(1, out)
        (out / "mine").write_text("mine")
        with pytest.raises(UsageError, match="not empty") as caught:
            ckpts.export(2, out)
        assert "--force" in caught.value.hint
        with pytest.raises(UsageError, match="not a folder"):
            ckpts.export(2, out / "mine", replace=True)
        ckpts.export(2, out, replace=True)
    assert (out / "mine").read_text() == "mine"
    (out / "mine").unlink()
    assert exported(out) == 2


@pytest.mark.parametrize("kind", ["new", "deep", "empty", "in use"])
def test_damage_leaves_nothing_behind(run: Path, tmp_path: Path, kind: str) -> None:
    with Listing(run) as ckpts:
        manifest = ckpts.manifest(2)
        # The tracked file: the tensor was written when it is noticed.
        chunk = next(x for x in manifest.leaves if "vocab.txt" in x.path).chunks[0]
    pack = run / "packs" / f"{manifest.packs[chunk.pack].name}.safetensors"
    data = bytearray(pack.read_bytes())
    data[chunk.offset] ^= 1
    pack.chmod(0o644)
    pack.write_bytes(data)
    out = tmp_path / "place" / "deep" / "out" if kind == "deep" else tmp_path / "out"
    if kind in ("empty", "in use"):
        out.mkdir()
    if kind == "in use":
        (out / "state.json").write_text("old")
    before = sorted(tmp_path.rglob("*"))
    with Listing(run) as ckpts, pytest.raises(DamagedObject):
        ckpts.export(2, out, replace=True)
    assert sorted(tmp_path.rglob("*")) == before
    if kind == "in use":
        assert (out / "state.json").read_text() == "old"


def test_a_killed_export_is_never_seen_and_its_leftovers_go(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = (
        "import os, signal, sys\n"
        "from holdfast.manager import Listing\n"
        "import holdfast.manager.scratch as scratch\n"
        "scratch._sync_folder = lambda folder: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Listing(sys.argv[1]).export(2, sys.argv[2])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run), str(out)], check=False)
    assert done.returncode < 0
    assert not out.exists()
    [left] = beside(out)
    assert (tmp_path / left / "new" / "state.safetensors").exists()
    with Listing(run) as ckpts:
        ckpts.export(2, out)
    assert beside(out) == []
    assert exported(out) == 2


def test_an_export_in_progress_is_left_alone(run: Path, tmp_path: Path) -> None:
    from holdfast.core.process import current
    from holdfast.stores.unfinished import temporary_name

    busy = tmp_path / f".holdfast-export-{temporary_name(current())}"
    busy.mkdir()
    with Listing(run) as ckpts:
        ckpts.export(2, tmp_path / "out")
    assert beside(tmp_path / "out") == [busy.name]


def test_everything_is_synced_before_it_is_shown_and_no_file_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is published: that adds the folder with the link, and nothing twice."""
    tracked = tmp_path / "tok"
    (tracked / "sub").mkdir(parents=True)
    (tracked / "sub" / "vocab").write_bytes(b"words")
    (tmp_path / "log").write_bytes(b"1")
    with CheckpointManager(tmp_path / "run") as ckpts:
        state = {
            "w": np.ones(9),
            "tok": holdfast.Directory(tracked),
            "log": holdfast.File(tmp_path / "log"),
        }
        ckpts.save(1, state, block=True)
    synced: Counter[int] = Counter()
    holding: dict[int, list[str]] = {}
    shown: list[str] = []

    def sync(fd: int) -> None:
        inode = os.fstat(fd).st_ino
        synced[inode] += 1
        path = os.readlink(f"/proc/self/fd/{fd}")
        if os.path.isdir(path):
            holding[inode] = sorted(os.listdir(path))

    def check(folder: Path) -> None:
        for path in [folder, *folder.rglob("*")]:
            inode = path.stat().st_ino
            if path.is_dir():
                assert holding[inode] == sorted(os.listdir(path)), path
            else:
                assert synced[inode] == 1, path
            shown.append(path.name)

    rename, replace = os.rename, os.replace

    def renaming(source: Path, target: Path) -> None:
        if Path(source).name == "new":
            check(Path(source))
        rename(source, target)

    def replacing(source: Path, target: Path) -> None:
        if Path(source).is_symlink():
            check(Path(source).resolve())
        replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", renaming)
    monkeypatch.setattr(os, "replace", replacing)
    with Listing(tmp_path / "run") as ckpts:
        swap(tmp_path / "shown" / "best", "0" * 16, lambda folder: ckpts.export(1, folder))
    assert len([name for name in shown if name == "vocab"]) == 2
    assert (tmp_path / "shown" / "best" / "files" / "tok" / "sub" / "vocab").exists()
