"""Which packs a checkpoint keeps: what is stored is not written again, and a pack is not
kept for a small part of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import holdfast
from holdfast.manager import packer

KB = 1000


def block(kilobytes: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, kilobytes * KB, np.uint8)


def save(ckpts: holdfast.CheckpointManager, step: int, **state: Any) -> holdfast.CheckpointInfo:
    info = ckpts.save(step, state).result()
    ckpts.wait()  # until what it has retired is deleted
    return info


def stored(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("packs/*"))


def test_what_does_not_change_is_not_written_again(tmp_path: Path) -> None:
    with holdfast.CheckpointManager(tmp_path, keep="last=1") as ckpts:
        frozen = block(900, 0)
        for step in range(1, 5):
            info = save(ckpts, step, frozen=frozen, trained=block(100, step))
        assert info.new_bytes < 150 * KB
        assert stored(tmp_path) < 1200 * KB
        assert np.array_equal(ckpts.load()["frozen"], frozen)


def test_a_small_part_that_never_changes_does_not_keep_the_rest(tmp_path: Path) -> None:
    with holdfast.CheckpointManager(tmp_path, keep="last=1") as ckpts:
        mask = block(50, 0)
        for step in range(1, 5):
            save(ckpts, step, mask=mask, trained=block(1000, step))
        assert stored(tmp_path) < 1100 * KB, "the first pack is gone"
        assert len(list(tmp_path.glob("packs/*"))) == 1, "and no pack is made for the mask alone"
        assert np.array_equal(ckpts.load()["mask"], mask)


def test_a_larger_part_moves_to_a_pack_of_its_own_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packer, "OWN_PACK_BYTES", 100 * KB)
    with holdfast.CheckpointManager(tmp_path, keep="last=1") as ckpts:
        frozen = block(300, 0)
        sizes = [
            save(ckpts, step, frozen=frozen, trained=block(700, step)).new_bytes
            for step in range(1, 5)
        ]
    assert sizes[0] > 1000 * KB
    assert sizes[1] > 1000 * KB, "moved: the first pack goes with the first checkpoint"
    assert max(sizes[2:]) < 750 * KB, "and stays where it is from then on"
    assert stored(tmp_path) < 1050 * KB
    assert len(list(tmp_path.glob("packs/*"))) == 2


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=6),
    changes=st.lists(st.sets(st.integers(0, 5)), min_size=1, max_size=6),
    own_pack=st.sampled_from([1, 50 * KB, 10_000 * KB]),
)
def test_a_checkpoint_never_keeps_more_than_twice_its_size(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    changes: list[set[int]],
    own_pack: int,
) -> None:
    folder = tmp_path_factory.mktemp("run")
    with (
        pytest.MonkeyPatch.context() as patch,
        holdfast.CheckpointManager(folder, keep="last=1") as ckpts,
    ):
        patch.setattr(packer, "OWN_PACK_BYTES", own_pack)
        state = {f"leaf{n}": block(size, n) for n, size in enumerate(sizes)}
        for step, changed in enumerate(changes):
            for n in changed & set(range(len(sizes))):
                state[f"leaf{n}"] = block(sizes[n], 1000 * step + n)
            info = save(ckpts, step, **state)
            for name, value in state.items():
                assert np.array_equal(ckpts.load()[name], value)
            overhead = 20 * KB  # headers of packs, and random states
            assert stored(folder) <= 2 * info.nbytes + overhead
