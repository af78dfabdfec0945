"""Ranks on nodes with disks of their own: the mirror is the run, a disk is its node's part."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holdfast.errors import GroupError, HoldfastError, NoStore, OtherRun, StoreFull, UsageError
from holdfast.manager.manager import CheckpointManager
from holdfast.repo import keys
from holdfast.stores.local import LocalStore
from tests.support.thread_ranks import ThreadGroup, all_ranks, run_ranks

SIZE = 4
PER_NODE = 2


def state_of(rank: int, step: int) -> dict[str, Any]:
    return {"own": np.full(5000, 100 * rank + step), "plain": [rank] * step}


def empty() -> dict[str, Any]:
    return {"own": np.zeros(5000, int), "plain": []}


class Nodes:
    """The disks of two nodes, and what all of them reach."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mirror = folder / "shared"

    def disk(self, node: int) -> Path:
        return self.folder / f"node{node}" / "run"

    def manager(self, group: ThreadGroup | None, rank: int = 0, **options: Any) -> Any:
        store = LocalStore(self.disk(rank // PER_NODE))
        options = {"mirror": self.mirror, "keep": "last=2", **options}
        return CheckpointManager("run", store=store, group=group, **options)

    def save(self, steps: range, *, size: int = SIZE, **options: Any) -> None:
        def work(group: ThreadGroup) -> None:
            rank = group.ranks.rank
            with self.manager(group, rank, **options) as ckpts:
                for step in steps:
                    ckpts.save(step, state_of(rank, step)).result()

        all_ranks(size, work)

    def restored(self, *, size: int = SIZE) -> int:
        """The step; each rank has found its own."""

        def work(group: ThreadGroup) -> int:
            rank = group.ranks.rank
            with self.manager(group, rank) as ckpts:
                live = empty()
                found = ckpts.restore(live)
                assert found is not None
                step = found.info.step
                expected = state_of(rank, step)
                assert np.array_equal(live["own"], expected["own"])
                assert live["plain"] == expected["plain"]
                return step

        steps = all_ranks(size, work)
        assert len(set(steps)) == 1
        return steps[0]

    def near(self, node: int) -> dict[str, Path]:
        """The packs on a node's disk, by name."""
        return packs(self.disk(node) / "node")

    def damage(self, files: dict[str, Path]) -> None:
        for file in files.values():
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)


def packs(folder: Path) -> dict[str, Path]:
    return {keys.pack_of(f"packs/{file.name}"): file for file in (folder / "packs").glob("*")}


def ranks_of(names: Any) -> set[int]:
    return {int(name.split("-")[2]) for name in names}


def step_of_rank_0(nodes: Nodes, group: ThreadGroup) -> int:
    """Of the checkpoint that one process has made: all ranks have found what it had."""
    with nodes.manager(group, group.ranks.rank) as ckpts:
        live = empty()
        step = ckpts.restore(live).info.step
        assert np.array_equal(live["own"], state_of(0, step)["own"])
        return step


@pytest.fixture
def nodes(tmp_path: Path) -> Nodes:
    return Nodes(tmp_path)


def test_each_node_keeps_what_its_ranks_have_written(nodes: Nodes) -> None:
    nodes.save(range(2))
    assert ranks_of(nodes.near(0)) == {0, 1}
    assert ranks_of(nodes.near(1)) == {2, 3}
    there = packs(nodes.mirror)
    assert set(there) == {*nodes.near(0), *nodes.near(1)}
    assert nodes.restored() == 1
    with CheckpointManager(nodes.mirror) as ckpts:
        assert [each.step for each in ckpts.checkpoints()] == [0, 1]
        assert all(each.ok for each in ckpts.verify())


def test_what_a_node_has_is_not_read_from_the_mirror(nodes: Nodes) -> None:
    nodes.save(range(2))
    # Its size is asked for; a byte that is read would be found to be wrong.
    nodes.damage(packs(nodes.mirror))
    assert nodes.restored() == 1


@pytest.mark.parametrize("lost", [0, 1])
def test_a_node_that_is_new_reads_the_mirror(nodes: Nodes, lost: int) -> None:
    nodes.save(range(2))
    shutil.rmtree(nodes.disk(lost))
    assert nodes.restored() == 1
    nodes.save(range(2, 4))
    assert ranks_of(nodes.near(lost)) == {2 * lost, 2 * lost + 1}
    assert nodes.restored() == 3


def test_what_is_damaged_on_a_disk_comes_from_the_mirror(nodes: Nodes) -> None:
    nodes.save(range(2))
    nodes.damage(nodes.near(1))
    before = set(nodes.near(1))
    assert nodes.restored() == 1
    with CheckpointManager(nodes.mirror) as ckpts:
        newest = set(ckpts.manifest().packs)
    gone = before - set(nodes.near(1))
    assert ranks_of(gone) == {2, 3}
    assert gone <= {pack.name for pack in newest}


def test_a_disk_keeps_less_than_the_mirror(nodes: Nodes) -> None:
    nodes.save(range(6), keep="last=1", mirror_keep="last=4")
    with CheckpointManager(nodes.mirror) as ckpts:
        assert [each.step for each in ckpts.checkpoints()] == [2, 3, 4, 5]
        newest = {pack.name for pack in ckpts.manifest().packs}
    for node in (0, 1):
        # The newest, and the one before it, which was wanted when it was tidied last.
        kept = set(nodes.near(node))
        assert newest & kept
        assert len(kept - newest) <= PER_NODE


def test_one_process_goes_on_from_the_mirror(nodes: Nodes) -> None:
    nodes.save(range(2))
    with nodes.manager(None) as ckpts:
        live = empty()
        found = ckpts.restore(live)
        assert found.info.step == 1
        assert np.array_equal(live["own"], state_of(0, 1)["own"])
        ckpts.save(2, state_of(0, 2)).result()
        assert ckpts.wait_mirrored(30)
    found = all_ranks(SIZE, lambda group: step_of_rank_0(nodes, group))
    assert found == [2] * SIZE


def test_several_nodes_go_on_from_what_one_process_had_mirrored(nodes: Nodes) -> None:
    with nodes.manager(None) as ckpts:
        ckpts.save(5, state_of(0, 5)).result()
        assert ckpts.wait_mirrored(30)

    found = all_ranks(SIZE, lambda group: step_of_rank_0(nodes, group))
    assert found == [5] * SIZE
    nodes.save(range(6, 7))
    assert nodes.restored() == 6


def refused(nodes: Nodes, kind: type[HoldfastError], rank: int, **options: Any) -> HoldfastError:
    """What the rank is told; all ranks are refused."""
    found = run_ranks(SIZE, lambda group: nodes.manager(group, group.ranks.rank, **options))
    assert all(isinstance(each, HoldfastError) for each in found), found
    error = found[rank]
    assert isinstance(error, kind)
    return error


def test_what_is_only_on_one_disk_is_not_passed_over(nodes: Nodes) -> None:
    with nodes.manager(None, mirror=None) as ckpts:
        ckpts.save(5, state_of(0, 5)).result()
    error = refused(nodes, UsageError, 0)
    assert "step 5 is only in" in error.message
    assert error.hint.startswith("holdfast sync ")
    assert "step 5 is only in" in refused(nodes, GroupError, 3).message


def test_the_mirror_of_another_run_is_refused(nodes: Nodes) -> None:
    with nodes.manager(None, mirror=None) as ckpts:
        ckpts.save(5, state_of(0, 5)).result()
    with CheckpointManager(nodes.mirror) as ckpts:
        ckpts.save(9, state_of(0, 9)).result()
    refused(nodes, OtherRun, 1)


def test_the_speed_of_copies_cannot_be_limited(nodes: Nodes) -> None:
    assert "mirror_bandwidth=" in refused(nodes, UsageError, 2, mirror_bandwidth="1MB/s").message


def test_a_folder_that_all_see_has_a_mirror_as_ever(nodes: Nodes) -> None:
    def work(group: ThreadGroup) -> bool:
        with nodes.manager(group, 0) as ckpts:
            ckpts.save(1, state_of(group.ranks.rank, 1)).result()
            if group.ranks.rank == 0:
                assert ckpts.wait_mirrored(30)
            return ckpts.on_node_disks

    assert all_ranks(SIZE, work) == [False] * SIZE
    assert not (nodes.disk(0) / "node").exists()
    with CheckpointManager(nodes.disk(0)) as ckpts:
        assert [each.step for each in ckpts.checkpoints()] == [1]


def test_who_looks_at_a_disk_learns_where_the_run_is(nodes: Nodes) -> None:
    nodes.save(range(1))
    with CheckpointManager(nodes.disk(1)) as ckpts, pytest.raises(NoStore) as raised:
        ckpts.info()
    assert str(nodes.mirror) in raised.value.hint


def test_a_full_disk_fails_no_save(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(method: str) -> Callable[..., Any]:
        before = getattr(LocalStore, method)

        def put(store: LocalStore, *args: Any, **options: Any) -> Any:
            if store.address.endswith("node"):
                raise StoreFull("no space is left")
            return before(store, *args, **options)

        return put

    monkeypatch.setattr(LocalStore, "create", full("create"))
    monkeypatch.setattr(LocalStore, "put_new", full("put_new"))
    nodes.save(range(2))
    assert nodes.near(0) == {}
    assert nodes.restored() == 1
