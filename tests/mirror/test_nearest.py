"""What is damaged or missing here is read from the mirror, byte for byte, and repaired."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from holdfast import CheckpointManager
from holdfast.errors import CorruptionError
from holdfast.manager import mirror
from holdfast.repo import keys
from holdfast.repo.repo import Repo
from holdfast.stores.open import open_store
from tests.mirror.support import WAIT_S, Line, damage, same, state, steps

Lines = Callable[[str], Line]


def made(folder: Path, *at: int) -> tuple[Path, Path]:
    """A run and its mirror, closed."""
    run, there = folder / "run", folder / "mirror"
    with CheckpointManager(run, keep=None, mirror=there) as ckpts:
        for step in at:
            ckpts.save(step, state(step)).result()
            assert ckpts.wait_mirrored(WAIT_S)
    return run, there


def objects(run: Path, number: int = -1) -> list[str]:
    """Keys of a checkpoint's manifest and packs."""
    record = Repo(open_store(str(run))).records()[number]
    return [keys.manifest_key(record.id), *map(keys.pack_key, record.packs)]


def spoil(run: Path, key: str, how: str) -> None:
    path = run / key
    data = path.read_bytes()
    if how == "a bit":
        # Of an array, where there is one: what a pack ends with (random states of frameworks
        # that other tests have imported) is not read by a load of arrays.
        damage(run, key, max(data.find(state(2)[name].tobytes()) for name in ("w", "frozen")))
        return
    path.unlink()
    if how == "the end":
        path.write_bytes(data[:-1])
    elif how == "a link":
        path.symlink_to(run / "holdfast.json")
    else:
        assert how == "all"


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("how", ["a bit", "the end", "a link", "all"])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["manifest", "first pack", "second pack"])
@pytest.mark.parametrize("way", ["restore", "load"])
def test_whatever_is_wrong_here_is_read_there_and_repaired(
    tmp_path: Path, which: int, how: str, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    run, there = made(tmp_path, 1, 2)
    key = objects(run)[which]
    whole = (run / key).read_bytes()
    spoil(run, key, how)
    with CheckpointManager(run, keep=None, mirror=there) as ckpts:
        if way == "load":
            loaded = ckpts.load()
            assert loaded.info.step == 2
            assert same({name: loaded[name] for name in ("w", "frozen", "step")}, 2)
        else:
            restored = ckpts.restore()
            assert restored is not None
            assert (restored.info.step, restored.skipped) == (2, ())
            assert same(restored.values, 2)
        ckpts.save(3, state(3)).result()
        assert ckpts.wait_mirrored(WAIT_S)
    assert (run / key).read_bytes() == whole
    assert steps(run) == steps(there) == [1, 2, 3]
    also = ("not a regular file", "nothing is reused")
    read, replaced = [line for line in told(caplog) if not any(word in line for word in also)]
    assert f"{key} of {run} is damaged: read from {there}" in read
    assert f"{key} was replaced by that of {there}" in replaced


def test_each_chunk_comes_from_where_it_is_right(tmp_path: Path) -> None:
    """The same pack is damaged in both places, at other bytes."""
    run, there = tmp_path / "run", tmp_path / "mirror"
    values = {name: np.random.default_rng(i).normal(size=500) for i, name in enumerate("abcd")}
    with CheckpointManager(run, keep=None, mirror=there) as ckpts:
        ckpts.save(1, values).result()
    [key] = objects(run)[1:]
    damage(run, key, -1)
    damage(there, key, -4 * 500 * 8)  # the first chunk
    with CheckpointManager(run, keep=None, mirror=there) as ckpts:
        restored = ckpts.restore()
        assert restored is not None
        for name, value in values.items():
            np.testing.assert_array_equal(restored.values[name], value)


def test_a_pack_that_was_damaged_is_no_source_for_a_save(tmp_path: Path, lines: Lines) -> None:
    run, there = made(tmp_path, 1)
    [key] = objects(run)[1:]
    damage(run, key)
    with CheckpointManager(run, keep=None, mirror=there, mirror_wait=0) as ckpts:
        assert ckpts.restore() is not None
        lines(str(there)).down = True
        info = ckpts.save(2, state(2)).result()
        [record] = [r for r in Repo(open_store(str(run))).records() if r.id == info.id]
        assert keys.pack_of(key) not in record.packs


def test_where_both_are_damaged_the_checkpoint_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, there = made(tmp_path, 1, 2)
    new = set(objects(run)[1:]) - set(objects(run, 0)[1:])
    for place in (run, there):
        damage(place, min(new))
    with CheckpointManager(run, keep=None, mirror=there) as ckpts:
        restored = ckpts.restore()
        assert restored is not None
        assert restored.info.step == 1
        assert len(restored.skipped) == 1
    assert any("trying the one before it" in line for line in told(caplog))


def test_a_mirror_that_does_not_answer_is_asked_once_and_the_run_falls_back(
    tmp_path: Path, lines: Lines
) -> None:
    run, there = made(tmp_path, 1, 2, 3)
    line = lines(str(there))
    line.down = True
    for number in (1, 2):
        new = set(objects(run, number)[1:]) - set(objects(run, 0)[1:])
        damage(run, min(new))
    with CheckpointManager(run, keep=None, mirror=there) as ckpts:
        restored = ckpts.restore()
        assert restored is not None
        assert same(restored.values, 1)
    assert line.refused == 1
    with CheckpointManager(run, keep=None, mirror=there) as ckpts, pytest.raises(CorruptionError):
        ckpts.restore(ref=3)


def test_verify_says_what_is_wrong_here(tmp_path: Path) -> None:
    run, there = made(tmp_path, 1)
    damage(run, objects(run)[1])
    with CheckpointManager(run, keep=None, mirror=there) as ckpts:
        assert not ckpts.verify()[0].ok


def test_a_repair_waits_for_a_mirror_that_went_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: Lines
) -> None:
    run, there = made(tmp_path, 1)
    key = objects(run)[1]
    damage(run, key)
    line = lines(str(there))
    with CheckpointManager(run, keep=None, mirror=there) as ckpts:
        assert ckpts.restore() is not None
        line.down = True
        ckpts.acquire()
        while line.refused < 3:
            assert not ckpts.wait_mirrored(0.01)
        assert not ckpts.verify()[0].ok
        line.down = False
        assert ckpts.wait_mirrored(WAIT_S)
        assert ckpts.verify()[0].ok
    assert os.path.exists(run / key)
    assert mirror.FIRST_RETRY_S < 1
