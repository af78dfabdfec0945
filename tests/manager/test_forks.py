"""Runs that begin from a checkpoint of another one, and borrow its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from holdfast import CheckpointManager
from tests.manager.test_manager import assert_equal, state


def test_a_fork_shares_data_and_stays_whole_when_the_parent_prunes(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "parent", keep="last=1") as parent:
        parent.save(1, state(1)).result()
        parent.fork(1, tmp_path / "child")
        for step in (2, 3):
            parent.save(step, state(step)).result()
        assert [c.step for c in parent.checkpoints()] == [1, 3]
    with CheckpointManager(tmp_path / "child", keep="last=1") as child:
        live = state(0)
        restored = child.restore(live)
        assert restored is not None
        assert_equal(live, 1)
        assert child.verify()[0].ok
        child.save(2, {**live, "weights": live["weights"] + 1}).result()
        assert child.verify()[0].ok
    with CheckpointManager(tmp_path / "parent") as parent:
        assert parent.info(1).pinned, "the child still borrows `frozen`"
    with CheckpointManager(tmp_path / "child", keep="last=1", rewrite_every=1) as child:
        child.save(3, state(3)).result()
    with CheckpointManager(tmp_path / "parent") as parent:
        assert not parent.info(1).pinned, "released once nothing is borrowed"


def test_a_fork_of_a_fork_keeps_what_both_lend_it(tmp_path: Path) -> None:
    def saved(name: str, step: int, **options: Any) -> None:
        with CheckpointManager(tmp_path / name, keep="last=1", **options) as run:
            run.save(step, state(step)).result()

    saved("first", 1)
    with CheckpointManager(tmp_path / "first") as first:
        first.fork(1, tmp_path / "second")
    saved("second", 2)
    with CheckpointManager(tmp_path / "second") as second:
        assert len({pack.run for pack in second.manifest(2).packs}) == 2  # its own, and a loan
        second.fork(2, tmp_path / "third")
    saved("third", 3)  # of `second` it needs nothing any more
    for name in ("second", "first"):
        saved(name, 4, rewrite_every=1)
    with CheckpointManager(tmp_path / "third") as third:
        assert [each.ok for each in third.verify()] == [True]
    saved("third", 5, rewrite_every=1)
    for name in ("second", "first"):
        with CheckpointManager(tmp_path / name) as run:
            assert not any(info.pinned for info in run.checkpoints())
