"""Copies by `copy` and `sync`, and repair from them, through the public manager."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.core.records import Record
from holdfast.errors import (
    CheckpointNotFound,
    CorruptionError,
    NoStore,
    OtherRun,
    RunHeld,
    UsageError,
)
from holdfast.manager.info import Transfer
from holdfast.manager.transfers import Wish, plan
from holdfast.repo.repo import Repo
from holdfast.stores.local import LocalStore
from tests.cli.damage import flip


def state(step: int) -> dict[str, Any]:
    return {"w": np.full(3000, step, np.float32), "frozen": np.arange(5000.0), "step": step}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoints that share a frozen array."""
    address = tmp_path / "run"
    with holdfast.CheckpointManager(address, keep=None) as manager:
        for step in (1, 2, 3):
            manager.save(step, state(step), metrics={"loss": 1 / step}, note="why").result()
        manager.tag(2, "gold")
    return address


def opened(address: Path) -> holdfast.CheckpointManager:
    return holdfast.CheckpointManager(address, keep=None)


def actions(transfers: list[Transfer]) -> list[tuple[int, str]]:
    return [(found.info.step, found.action) for found in transfers]


def records(address: Path) -> tuple[Record, ...]:
    return Repo(LocalStore(address)).records()


def entries(address: Path) -> set[str]:
    return {path.name for path in (address / "log").iterdir()}


def packs(address: Path) -> list[Path]:
    return sorted((address / "packs").iterdir())


def own_pack(address: Path, step: int) -> Path:
    """The pack that has the leaf `w` of that step, which no other step uses."""
    repo = Repo(LocalStore(address))
    manifest = repo.manifest(next(r for r in repo.records() if r.step == step))
    [chunk] = next(leaf for leaf in manifest.leaves if leaf.path == "w").chunks
    return address / "packs" / f"{manifest.packs[chunk.pack].name}.safetensors"


def restores(address: Path, *steps: int) -> None:
    """Every checkpoint is what was saved, bit for bit."""
    with opened(address) as manager:
        assert [info.step for info in manager.checkpoints()] == list(steps)
        assert all(found.ok for found in manager.verify())
        for step in steps:
            loaded = manager.load(step)
            for name, value in state(step).items():
                assert np.array_equal(loaded[name], value)


def test_sync_makes_the_copy_like_the_run(run: Path, tmp_path: Path) -> None:
    to = tmp_path / "copy"
    with opened(run) as manager:
        assert actions(manager.sync(to)) == [(1, "copy"), (2, "copy"), (3, "copy")]
        assert records(to) == records(run)
        before = entries(to)
        assert {t.action for t in manager.sync(to)} == {"keep"}
        assert entries(to) == before, "nothing to do: nothing is written"
        manager.log_metrics(1, {"late": 5.0})
        manager.tag(3, "gold")
        manager.pin(1, "report")
        manager.save(4, state(4)).result()
        assert actions(manager.sync(to)) == [
            (1, "update"),
            (2, "update"),
            (3, "update"),
            (4, "copy"),
        ]
        assert records(to) == records(run)
    restores(to, 1, 2, 3, 4)


def test_a_dry_run_says_what_would_be_done_and_does_nothing(run: Path, tmp_path: Path) -> None:
    to = tmp_path / "copy"
    with opened(run) as manager:
        planned = manager.sync(to, dry_run=True)
        assert not to.exists()
        done = manager.sync(to)
        assert planned == done
        assert sum(t.nbytes for t in done) == sum(path.stat().st_size for path in packs(to))


def test_delete_removes_what_the_run_no_longer_lists_and_only_then(
    run: Path, tmp_path: Path
) -> None:
    to = tmp_path / "copy"
    with opened(run) as manager, opened(to) as there:
        manager.sync(to)
        there.pin(1, "mine")
        manager.remove([1, 2], force=True)
        kept = [(3, "keep"), (1, "keep"), (2, "keep")]
        assert actions(manager.sync(to)) == kept
        doomed = [(3, "keep"), (1, "keep"), (2, "remove")]
        planned = manager.sync(to, delete=True, dry_run=True)
        assert actions(planned) == doomed
        before = sum(path.stat().st_size for path in packs(to))
        assert actions(manager.sync(to, delete=True)) == doomed
        assert before - sum(p.stat().st_size for p in packs(to)) == planned[-1].nbytes > 0
        there.unpin(1)
        manager.sync(to, delete=True)
    restores(to, 3)
    assert [path.name for path in packs(to)] == [path.name for path in packs(run)]


def test_nothing_is_deleted_if_something_could_not_be_copied(run: Path, tmp_path: Path) -> None:
    to = tmp_path / "copy"
    with opened(run) as manager:
        manager.sync(to)
        manager.save(4, state(4)).result()
        flip(own_pack(run, 4), 4096 + 100)
        manager.remove([1], force=True)
        done = manager.sync(to, delete=True)
    assert actions(done) == [(2, "keep"), (3, "keep"), (4, "copy"), (1, "keep")]
    assert done[2].damaged
    assert "'w' in packs/" in done[2].error
    assert done[3].why == ("not everything was copied: nothing is removed",)
    restores(to, 1, 2, 3)


def test_an_empty_run_deletes_no_copy(run: Path, tmp_path: Path) -> None:
    to = tmp_path / "copy"
    with opened(run) as manager:
        manager.sync(to)
        manager.remove([1, 2, 3], force=True)
        with pytest.raises(UsageError, match="everything in"):
            manager.sync(to, delete=True)
        assert {t.action for t in manager.sync(to)} == {"keep"}
    restores(to, 1, 2, 3)


def newest_entry(address: Path) -> Path:
    return max((address / "log").iterdir())


def test_a_damaged_list_is_no_reason_to_delete(run: Path, tmp_path: Path) -> None:
    to = tmp_path / "copy"
    with opened(run) as manager:
        manager.save(4, state(4)).result()
        manager.sync(to)
    for _ in range(2):  # back to before the last save
        flip(newest_entry(run), newest_entry(run).stat().st_size // 2)
        newest_entry(run).rename(tmp_path / newest_entry(run).name)
    flip(newest_entry(run), 200)
    with opened(run) as manager:
        for delete in (True, False):
            with pytest.raises(CorruptionError):
                manager.sync(to, delete=delete)
        # What the list still has can be rescued.
        manager.sync(tmp_path / "rescue")
    restores(to, 1, 2, 3, 4)
    assert len(records(tmp_path / "rescue")) == 3


def test_a_damaged_list_of_the_copy_is_rebuilt(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    to = tmp_path / "copy"
    with opened(run) as manager:
        manager.sync(to)
        for entry in (to / "log").iterdir():
            flip(entry, 200)
        manager.save(4, state(4)).result()
        assert {t.action for t in manager.sync(to)} == {"copy"}
        assert "rebuilt its list from 3 whole" in caplog.text
        assert {t.action for t in manager.sync(to)} == {"keep"}
    restores(to, 1, 2, 3, 4)
    assert records(to) == records(run)


def test_copy_takes_what_is_named(run: Path, tmp_path: Path) -> None:
    to = tmp_path / "copy"
    with opened(run) as manager:
        assert actions(manager.copy(["gold"], to)) == [(2, "copy")]
        assert actions(manager.copy([3, "gold", "best:loss"], to)) == [(2, "keep"), (3, "copy")]
        manager.untag("gold")
        assert actions(manager.copy([2], to)) == [(2, "update")]
        with pytest.raises(CheckpointNotFound):
            manager.copy([77], to)
    restores(to, 2, 3)
    assert [r.tags for r in records(to)] == [(), ()]


def test_what_is_missing_in_the_copy_is_found_and_brought(run: Path, tmp_path: Path) -> None:
    to = tmp_path / "copy"
    with opened(run) as manager:
        manager.sync(to)
        own_pack(to, 3).unlink()
        (to / "manifests" / f"{records(to)[1].id}.json").unlink()
        done = manager.sync(to)
        assert [t.action for t in done] == ["keep", "repair", "repair"]
        flip(own_pack(to, 3), 4096 + 100)
        assert {t.action for t in manager.sync(to)} == {"keep"}, "sizes only"
        done = manager.sync(to, verify=True)
        assert [t.action for t in done] == ["keep", "keep", "repair"]
    restores(to, 1, 2, 3)


def test_a_copy_of_a_fork_is_whole_by_itself(run: Path, tmp_path: Path) -> None:
    child, to = tmp_path / "deep" / "child", tmp_path / "copy"
    with opened(run) as manager:
        manager.fork(2, child)
    with opened(child) as manager:
        manager.save(3, state(3)).result()
        planned = manager.sync(to, dry_run=True)
        assert sum(t.nbytes for t in planned) == sum(t.nbytes for t in manager.sync(to))
    parent = run.rename(tmp_path / "elsewhere")
    child.rename(tmp_path / "nowhere")
    restores(to, 2, 3)
    with opened(to) as manager:
        manager.save(4, state(4)).result()
        manager.prune("last=1")
        assert manager.gc() == []
    restores(to, 4)
    with opened(parent) as manager:
        assert [info.pinned for info in manager.checkpoints()] == [False, True, False]


def test_training_goes_on_in_the_copy_and_the_two_are_told_apart(run: Path, tmp_path: Path) -> None:
    to = tmp_path / "copy"
    with opened(run) as manager, opened(to) as there:
        manager.sync(to)
        there.save(4, state(4)).result()
        with pytest.raises(OtherRun, match="went on by itself"):
            manager.sync(to)
        # The other way round the copy is the one to follow.
        assert actions(there.sync(run))[-1] == (4, "copy")
        manager.acquire()
        there.save(5, state(5)).result()
        with pytest.raises(RunHeld):
            there.sync(run)
    restores(to, 1, 2, 3, 4, 5)
    restores(run, 1, 2, 3, 4)


def test_a_target_that_is_written_or_another_run_is_refused(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with opened(run) as manager, opened(other) as there:
        there.save(1, state(1)).result()
        with pytest.raises(OtherRun):
            manager.sync(other)
        with pytest.raises(OtherRun):
            manager.copy([1], other, take_over=True)
        with pytest.raises(UsageError):
            manager.sync(run)
        there.save(2, state(2)).result()
    with opened(tmp_path / "nothing") as nothing, pytest.raises(NoStore):
        nothing.sync(tmp_path / "copy")


# -- repair ------------------------------------------------------------------------------


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    to = tmp_path / "copy"
    with opened(run) as manager:
        manager.sync(to)
    return to


def damaged_everywhere(run: Path) -> None:
    """A flipped bit, a short pack, a lost pack, a lost and a damaged manifest."""
    found = packs(run)
    flip(found[0], 4096 + 17)
    found[1].write_bytes(found[1].read_bytes()[:-9])
    found[2].unlink()
    manifests = sorted((run / "manifests").iterdir())
    manifests[0].unlink()
    flip(manifests[1], 300)


def test_verify_repairs_from_a_copy(run: Path, copied: Path) -> None:
    damaged_everywhere(run)
    with opened(run) as manager:
        assert [found.ok for found in manager.verify()] == [False, False, False]
        found = manager.verify(repair_from=copied)
        assert all(one.ok for one in found)
        repaired = [key for one in found for key in one.repaired]
        assert len(set(repaired)) == len(repaired)
        assert sum(key.startswith("packs/") for key in repaired) == len(packs(copied))
        assert sum(key.startswith("manifests/") for key in repaired) == 2
        again = manager.verify(repair_from=copied)
        assert all(one.ok and not one.repaired for one in again)
    restores(run, 1, 2, 3)


def test_what_is_damaged_in_both_stays_as_it_is_and_is_named(run: Path, copied: Path) -> None:
    damaged_everywhere(run)
    flip(packs(copied)[0], 4096 + 40)
    packs(copied)[1].unlink()
    before = packs(run)[0].read_bytes()
    with opened(run) as manager:
        found = manager.verify(repair_from=copied)
    lines = [line for one in found for line in one.unrepaired]
    assert any("is no better in" in line and "do not match" in line for line in lines)
    assert any("does not have it" in line for line in lines)
    assert packs(run)[0].read_bytes() == before
    assert not all(one.ok for one in found)


def test_repair_beside_the_writer_that_goes_on(run: Path, copied: Path) -> None:
    with opened(run) as writer, holdfast.CheckpointManager(run, keep=None) as guest:
        writer.save(4, state(4)).result()
        flip(own_pack(run, 1), 4096 + 17)
        assert not guest.verify(1)[0].ok
        assert guest.verify(1, repair_from=copied)[0].repaired
        writer.save(5, state(5)).result()
    restores(run, 1, 2, 3, 4, 5)


def test_there_must_be_something_to_repair_from(run: Path, tmp_path: Path) -> None:
    with opened(run) as manager:
        with pytest.raises(NoStore):
            manager.verify(repair_from=tmp_path / "nothing")
        with pytest.raises(UsageError, match="from itself"):
            manager.verify(repair_from=run)


# -- the plan ----------------------------------------------------------------------------


def record(ordinal: int, *packs: str, **fields: Any) -> Record:
    return Record(
        id=f"{ordinal}" * 64,
        step=ordinal,
        ordinal=ordinal,
        time_s=0.0,
        nbytes=1,
        new_bytes=1,
        packs=dict.fromkeys(packs, 10),
        **fields,
    )


def test_packs_that_several_share_are_counted_once() -> None:
    source = [record(1, "a", "b"), record(2, "b", "c")]
    needs = {r.id: r.packs for r in source}
    planned = plan(source, [], Wish(None), needs=needs, there={})
    assert [step.nbytes for step in planned] == [20, 10]
    target = [record(1, "a", "b"), record(2, "b", "c"), record(3, "c")]
    planned = plan(
        [target[2]], target, Wish(None, delete=True), needs=needs | {target[2].id: {}}, there={}
    )
    assert [(s.action, s.nbytes) for s in planned[1:]] == [("remove", 20), ("remove", 0)]
