"""Stores made by an adversary: clear errors, bounded memory, nothing executed."""

from __future__ import annotations

import math
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from holdfast import CheckpointManager
from holdfast.core.digest import digest
from holdfast.errors import CorruptionError, FormatTooNew, HoldfastError, PickleRefused


def make_run(folder: Path) -> None:
    with CheckpointManager(folder) as ckpts:
        ckpts.save(1, {"a": np.arange(1000.0), "n": [1, 2]}, tags=["t"]).result()


def forge(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the newest manifest and the log as somebody with write access could."""
    old = next((folder / "manifests").iterdir())
    manifest = msgspec.json.decode(old.read_bytes())["value"]
    change(manifest)
    id = write_sealed(folder / "manifests", manifest, by_id=True)
    old_id = old.stem
    if id != old_id:
        old.unlink()
    rewrite_log(folder, lambda entry: replace_ids(entry, old_id, id))


def replace_ids(entry: dict[str, Any], old: str, new: str) -> None:
    for record in entry["records"]:
        if record["id"] == old:
            record["id"] = new


def rewrite_log(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the newest entry and seal the whole chain anew."""
    entries = sorted((folder / "log").iterdir())
    newest = entries[-1]
    value = msgspec.json.decode(newest.read_bytes())["value"]
    change(value)
    body = msgspec.json.encode(value)
    newest.write_bytes(b'{"digest":"' + digest(body).encode() + b'","value":' + body + b"}")


def write_sealed(folder: Path, value: Any, *, by_id: bool = False, name: str = "") -> str:
    body = msgspec.json.encode(value)
    id = digest(body)
    sealed = b'{"digest":"' + id.encode() + b'","value":' + body + b"}"
    (folder / (f"{id}.json" if by_id else name)).write_bytes(sealed)
    return id


def refused(folder: Path) -> str:
    """The message with which a restore is refused. An export, which only copies the tree
    as JSON, is refused too or harmless."""
    with CheckpointManager(folder) as ckpts:
        with pytest.raises(HoldfastError) as caught:
            ckpts.restore()
        with suppress(HoldfastError):
            ckpts.export(None, folder.parent / "out")
    assert not (folder.parent / "outside").exists()
    return str(caught.value)


def set_in(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        *parents, last = [int(p) if p.isdigit() else p for p in path.split("/")]
        found: Any = manifest
        for part in parents:
            found = found[part]
        found[last] = value

    return change


HUGE = 1 << 60
# A chunk is [start, shape, pack, offset, nbytes, digest, codec].
FORGERIES: dict[str, Callable[[dict[str, Any]], None]] = {
    "a pack outside the store": set_in("packs/0/name", "../../../etc/passwd"),
    "an absolute pack": set_in("packs/0/name", "/etc/passwd"),
    "a pack with a NUL": set_in("packs/0/name", "000001-0000000000000000-0-0\0"),
    "a huge leaf": set_in("leaves/0/shape", [HUGE]),
    "a leaf that overflows": set_in("leaves/0/shape", [HUGE, HUGE]),
    "a negative shape": set_in("leaves/0/shape", [-1]),
    "a huge chunk": set_in("leaves/0/chunks/0/4", HUGE),
    "a chunk past its pack": set_in("leaves/0/chunks/0/3", HUGE),
    "a chunk before its pack": set_in("leaves/0/chunks/0/3", -8),
    "a pack that does not exist": set_in("leaves/0/chunks/0/2", 7),
    "an unknown dtype": set_in("leaves/0/dtype", "OBJ"),
    "an unknown codec": set_in("leaves/0/chunks/0/6", "exec"),
    "a wrong digest": set_in("leaves/0/chunks/0/5", "0" * 64),
    "a pack that claims more than it has": set_in("packs/0/nbytes", HUGE),
    "no leaves": set_in("leaves", []),
    "an unknown tag": set_in("tree", {"!": "os.system", "v": "touch outside"}),
    "a tree that is no dict": set_in("tree", [1, 2]),
    "a tree without tags": set_in("tree", {"v": 1}),
    "a leaf index out of range": set_in("tree/v/0/1/leaf", 99),
    "a negative leaf index": set_in("tree/v/0/1/leaf", -1),
    "an object dtype": set_in("tree/v/0/1/dtype", "|O"),
    "a code dtype": set_in("tree/v/0/1/dtype", "__import__('os').system('touch outside')"),
    "a missing file": set_in("tree/v/1/1", {"!": "file", "leaf": 0, "mode": "rwx"}),
    "a folder that climbs": set_in(
        "tree/v/1/1", {"!": "dir", "v": [["../outside", {"!": "dir", "v": []}]], "mode": 0o755}
    ),
    "a pickle that was not declared": set_in(
        "tree/v/1/1", {"!": "pickle", "b64": "gASVAAAAAAAAAAA=", "type": "a:B"}
    ),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_manifests_are_refused(tmp_path: Path, forgery: str) -> None:
    make_run(tmp_path / "run")
    forge(tmp_path / "run", FORGERIES[forgery])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(tmp_path / "run")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def cut_in(*boxes: tuple[list[int], list[int]]) -> Callable[[dict[str, Any]], None]:
    """The 1,000 elements of "a" as ten rows of a hundred, in these boxes, whose bytes follow
    each other in the pack, with their right digests."""

    def change(manifest: dict[str, Any]) -> None:
        leaf = manifest["leaves"][0]
        _, _, pack, offset, nbytes, _ = leaf["chunks"][0][:6]
        assert nbytes == 8000
        content = np.arange(1000.0).tobytes()
        leaf["shape"], leaf["chunks"] = [10, 100], []
        at = 0
        for start, shape in boxes:
            count = 8 * math.prod(shape)
            part = digest(content[at : at + count])
            leaf["chunks"].append([start, shape, pack, offset + at, count, part])
            at += count

    return change


LEFT, RIGHT = ([0, 0], [10, 50]), ([0, 50], [10, 50])
TILINGS = {
    "overlap and a hole": cut_in(LEFT, ([0, 49], [10, 50])),
    "one box twice": cut_in(LEFT, LEFT),
    "a hole": cut_in(LEFT, ([0, 50], [9, 50])),
    "a corner twice, another not": cut_in(
        ([0, 0], [5, 50]), ([5, 0], [5, 50]), ([0, 50], [5, 50]), ([4, 50], [5, 50])
    ),
    "outside": cut_in(LEFT, ([0, 51], [10, 50])),
    "before the leaf": cut_in(LEFT, ([-1, 50], [10, 50])),
    "empty": cut_in(LEFT, RIGHT, ([0, 0], [0, 5])),
    "negative": cut_in(LEFT, RIGHT, ([0, 0], [-1, -1])),
    "fewer dimensions": cut_in(LEFT, ([50], [500])),
    "more dimensions": cut_in(LEFT, ([0, 50, 0], [10, 50, 1])),
}


@pytest.mark.parametrize("tiling", TILINGS)
def test_boxes_that_do_not_tile_their_leaf_are_refused(tmp_path: Path, tiling: str) -> None:
    """Each of them has its bytes, with the right digest."""
    make_run(tmp_path / "run")
    forge(tmp_path / "run", TILINGS[tiling])
    assert "'a' in manifests/" in refused(tmp_path / "run")


def test_chunks_that_share_bytes_of_a_pack_are_refused(tmp_path: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        cut_in(LEFT, RIGHT)(manifest)
        first, second = manifest["leaves"][0]["chunks"]
        second[3:6] = first[3:6]

    make_run(tmp_path / "run")
    forge(tmp_path / "run", change)
    assert "overlap in pack" in refused(tmp_path / "run")


def test_boxes_that_tile_their_leaf_are_read(tmp_path: Path) -> None:
    """That the others are refused for what they are."""
    make_run(tmp_path / "run")

    def change(manifest: dict[str, Any]) -> None:
        cut_in(RIGHT, LEFT)(manifest)
        manifest["tree"]["v"][0][1]["shape"] = [10, 100]

    forge(tmp_path / "run", change)
    content = np.arange(1000.0).reshape(2, 10, 50)
    with CheckpointManager(tmp_path / "run") as ckpts:
        np.testing.assert_array_equal(ckpts.load()["a"], np.hstack([content[1], content[0]]))


@pytest.mark.parametrize("tag", ["enum", "dataclass", "namedtuple"])
@pytest.mark.parametrize("kind", ["os:system", "builtins:eval", "subprocess:Popen", "no.such:Name"])
def test_what_is_not_such_a_class_stays_data(tmp_path: Path, tag: str, kind: str) -> None:
    make_run(tmp_path / "run")
    node = {"!": tag, "type": kind, "v": ["touch outside"], "fields": ["x"]}
    forge(tmp_path / "run", set_in("tree/v/1/1", node))
    with CheckpointManager(tmp_path / "run") as ckpts, suppress(CorruptionError):
        assert type(ckpts.load()["n"]).__name__ == "Record"
    assert not (tmp_path / "outside").exists()


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    deep: Any = []
    for _ in range(400):
        deep = [deep]
    forge(tmp_path / "run", set_in("tree/v/1/1", deep))
    refused(tmp_path / "run")


def test_nesting_beyond_any_parser_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    old = next((tmp_path / "run" / "manifests").iterdir())
    body = b'{"format":1,"tree":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    id = digest(body)
    sealed = b'{"digest":"' + id.encode() + b'","value":' + body + b"}"
    (old.parent / f"{id}.json").write_bytes(sealed)
    rewrite_log(tmp_path / "run", lambda entry: replace_ids(entry, old.stem, id))
    refused(tmp_path / "run")


def test_duplicate_leaf_paths_are_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    forge(tmp_path / "run", lambda m: m["leaves"].append(m["leaves"][0]))
    assert "two leaves have this path" in refused(tmp_path / "run")


def test_one_small_pack_cannot_pose_as_a_large_state(tmp_path: Path) -> None:
    """A thousand leaves that all claim the same bytes."""
    make_run(tmp_path / "run")

    def multiply(manifest: dict[str, Any]) -> None:
        leaf = manifest["leaves"][0]
        for number in range(1000):
            manifest["leaves"].append({**leaf, "path": f"copy{number}"})

    forge(tmp_path / "run", multiply)
    assert "overlap" in refused(tmp_path / "run")


def test_a_manifest_under_another_name_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    file = next((tmp_path / "run" / "manifests").iterdir())
    renamed = file.with_name("0" * 64 + ".json")
    file.rename(renamed)
    rewrite_log(tmp_path / "run", lambda entry: replace_ids(entry, file.stem, "0" * 64))
    assert "not the manifest that the log names" in refused(tmp_path / "run")


@pytest.mark.parametrize("id", ["../../outside", "/etc/passwd", "x" * 64, ""])
def test_an_unsafe_manifest_id_is_refused(tmp_path: Path, id: str) -> None:
    make_run(tmp_path / "run")
    old = next((tmp_path / "run" / "manifests").iterdir()).stem
    rewrite_log(tmp_path / "run", lambda entry: replace_ids(entry, old, id))
    refused(tmp_path / "run")


def test_symbolic_links_in_a_store_are_not_followed(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    file = next((tmp_path / "run" / "manifests").iterdir())
    elsewhere = tmp_path / "elsewhere.json"
    file.rename(elsewhere)
    os.symlink(elsewhere, file)
    refused(tmp_path / "run")


def test_a_newer_format_says_what_to_do(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    forge(tmp_path / "run", set_in("format", 2))
    with CheckpointManager(tmp_path / "run") as ckpts, pytest.raises(FormatTooNew) as caught:
        ckpts.restore()
    assert "pip install -U holdfast" in caught.value.hint


class Bomb:
    """Unpickling it creates a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch outside",)


def test_a_pickle_runs_only_when_asked_for_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with CheckpointManager(tmp_path / "run", allow_pickle=True) as ckpts:
        assert ckpts.save(1, {"x": Bomb(), "y": 1}).result().pickled
    with CheckpointManager(tmp_path / "run") as ckpts:
        assert ckpts.latest().pickled  # type: ignore[union-attr]
        with pytest.raises(PickleRefused, match="run code"):
            ckpts.restore()
        with pytest.raises(PickleRefused):
            ckpts.load()["x"]
        assert ckpts.verify()[0].ok
        assert not (tmp_path / "outside").exists()
        ckpts.restore(allow_pickle=True)
        assert (tmp_path / "outside").exists()


def test_a_store_full_of_rubbish_is_no_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "log").mkdir(parents=True)
    (run / "log" / "000000000001.json").write_bytes(pickle.dumps(Bomb()))
    (run / "holdfast.json").write_bytes(b"{" * 100_000)
    with CheckpointManager(run) as ckpts, pytest.raises(CorruptionError):
        ckpts.checkpoints()


def test_reading_a_run_imports_nothing_new(tmp_path: Path) -> None:
    """A checkpoint that names classes of modules that were never imported."""
    (tmp_path / "evil.py").write_text(
        "import pathlib, collections\n"
        "pathlib.Path('outside').touch()\n"
        "Point = collections.namedtuple('Point', 'x y')\n"
    )
    write = (
        "import sys; sys.path.insert(0, '.')\n"
        "import evil, holdfast\n"
        "with holdfast.CheckpointManager('run') as c: c.save(1, {'p': evil.Point(1, 2)}).result()\n"
        "import os; os.unlink('outside')\n"
    )
    read = (
        "import sys; sys.path.insert(0, '.')\n"
        "import holdfast\n"
        "p = holdfast.open('run')['p']\n"
        "assert 'evil' not in sys.modules, p\n"
        "assert type(p).__name__ == 'Record', type(p)\n"
    )
    for code in (write, read):
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert not (tmp_path / "outside").exists()
