"""Saving, restoring and looking after checkpoints through the public manager."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holdfast import CheckpointManager, File
from holdfast.core.digest import digest
from holdfast.errors import (
    CheckpointNotFound,
    HoldfastError,
    NoIntactCheckpoint,
    NoStore,
    RunClosed,
    RunHeld,
    SaveFailed,
    StoreFull,
    StructureMismatch,
    UnsupportedValue,
    UsageError,
)
from holdfast.stores.faulty import Effect, Fault, FaultPlan, FaultyStore
from holdfast.stores.local import LocalStore
from holdfast.stores.memory import MemoryStore


def state(step: int) -> dict[str, Any]:
    rng = np.random.default_rng(step)
    return {
        "weights": rng.normal(size=(300, 7)).astype(np.float32),
        "frozen": np.arange(5000, dtype=np.int64),
        "history": [1.0, 2.0, float(step)],
        "name": f"step {step}",
    }


def assert_equal(found: Any, step: int) -> None:
    wanted = state(step)
    assert set(found) == set(wanted)
    for name in ("weights", "frozen"):
        assert found[name].dtype == wanted[name].dtype
        np.testing.assert_array_equal(found[name], wanted[name])
    assert found["history"] == wanted["history"]
    assert found["name"] == wanted["name"]


def test_save_and_restore_into_live_objects(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "run") as ckpts:
        pending = ckpts.save(3, state(3), metrics={"loss": 0.5}, loop={"epoch": 1})
        info = pending.result()
        assert pending.done()
        assert (info.step, info.metrics, info.ref) == (3, {"loss": 0.5}, f"{tmp_path}/run@3")
    live = state(0)
    weights, history = live["weights"], live["history"]
    with CheckpointManager(tmp_path / "run") as ckpts:
        restored = ckpts.restore(live)
    assert restored is not None
    assert restored.info.step == 3
    assert restored.loop == {"epoch": 1}
    assert_equal(live, 3)
    assert live["weights"] is weights, "arrays are filled in place"
    assert live["history"] is history, "containers keep their identity"


def test_arrays_may_change_as_soon_as_save_returns(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "run") as ckpts:
        live = state(1)
        pending = ckpts.save(1, live)
        live["weights"][:] = -1
        live["history"].clear()
        pending.result()
        assert_equal(ckpts.load(1).read(), 1)


def test_an_empty_run_has_nothing(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "none") as ckpts:
        assert ckpts.restore({"x": 1}) is None
        assert ckpts.checkpoints() == []
        assert ckpts.latest() is None
        assert not ckpts.finished
        with pytest.raises(NoStore):
            ckpts.load()
    assert not (tmp_path / "none").exists(), "looking creates nothing"


def test_only_what_changed_is_written_again(tmp_path: Path) -> None:
    big = np.random.default_rng(0).normal(size=(3 << 20,))  # 24 MiB: three chunks
    with CheckpointManager(tmp_path / "run", keep=None) as ckpts:
        first = ckpts.save(1, {"a": big, "b": np.zeros(9)}).result()
        big[-1] = 0
        second = ckpts.save(2, {"a": big, "b": np.zeros(9)}).result()
    assert first.new_bytes > 24 << 20
    assert second.nbytes == first.nbytes
    assert (8 << 20) < second.new_bytes < (9 << 20)
    with CheckpointManager(tmp_path / "run", keep=None) as again:
        third = again.save(3, {"a": big, "b": np.zeros(9)}).result()
        assert third.new_bytes == 0, "a new process reuses too"
        np.testing.assert_array_equal(again.load(3)["a"], big)
        again.prune("last=1")
        np.testing.assert_array_equal(again.load(3)["a"], big)
        assert all(found.ok for found in again.verify())


def test_rewrite_every_bounds_how_many_share_one_copy(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "run", keep=None, rewrite_every=3) as ckpts:
        written = [ckpts.save(n, {"a": np.arange(10_000)}).result().new_bytes for n in range(7)]
    assert [bool(size) for size in written] == [True, False, False, True, False, False, True]


def test_retention_is_part_of_the_commit(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "run", keep="last=2 best=1:loss") as ckpts:
        for step, loss in enumerate([5.0, 1.0, 4.0, float("nan"), 3.0]):
            ckpts.save(step, state(step), metrics={"loss": loss})
        ckpts.wait()
        assert [c.step for c in ckpts.checkpoints()] == [1, 3, 4]
        best = ckpts.best("loss")
        assert best is not None
        assert best.step == 1
        assert ckpts.info("best:loss").step == 1
    with CheckpointManager(tmp_path / "run", keep="last=2 best=1:loss") as again:
        for step in (5, 6, 7):
            again.save(step, state(step), metrics={"loss": 2.0})
        again.wait()
        assert [c.step for c in again.checkpoints()] == [1, 6, 7], "best survives a restart"
    packs = list((tmp_path / "run" / "packs").iterdir())
    manifests = list((tmp_path / "run" / "manifests").iterdir())
    assert len(manifests) == 3
    assert len(packs) <= 4


def test_tags_pins_and_late_metrics(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "run", keep="last=1") as ckpts:
        ckpts.save(1, state(1), tags=["gold"]).result()
        ckpts.save(2, state(2)).result()
        ckpts.pin(2, "paper")
        for step in (3, 4):
            ckpts.save(step, state(step)).result()
        assert [c.step for c in ckpts.checkpoints()] == [1, 2, 4]
        ckpts.tag(4, "gold")
        assert ckpts.info("gold").step == 4
        assert ckpts.info(1).tags == ()
        ckpts.log_metrics(4, {"acc": 0.5, "odd": float("inf")})
        assert ckpts.info(4).metrics == {"acc": 0.5, "odd": float("inf")}
        ckpts.log_metrics(4, {"odd": 1.0})
        assert ckpts.info(4).metrics == {"acc": 0.5, "odd": 1.0}
        ckpts.unpin(2)
        ckpts.untag("gold")
        with pytest.raises(CheckpointNotFound):
            ckpts.untag("gold")
        decisions = ckpts.prune(dry_run=True)
        assert [d.keep for d in decisions] == [False, False, True]
        assert all(d.why for d in decisions)
        assert len(ckpts.checkpoints()) == 3
        ckpts.prune()
        assert [c.step for c in ckpts.checkpoints()] == [4]


def test_a_guest_tags_and_prunes_beside_the_writer(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "run", keep=None) as ckpts:
        for step in (1, 2, 3):
            ckpts.save(step, state(step)).result()
        guest = CheckpointManager(tmp_path / "run")
        guest.tag(1, "gold")
        guest.prune("last=1")
        guest.close()
        ckpts.save(4, state(3)).result()  # its base was written for a checkpoint that is there
        assert [c.step for c in ckpts.checkpoints()] == [1, 3, 4]
        assert all(found.ok for found in ckpts.verify())


def test_lazy_loads_read_only_what_is_asked_for(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "run") as ckpts:
        ckpts.save(1, {"model": {"a": np.ones(100_000), "b": np.zeros(50)}, "n": 7}).result()
    store = FaultyStore(LocalStore(tmp_path / "run"))
    with CheckpointManager(tmp_path / "run", store=store) as ckpts:
        loaded = ckpts.load()
        assert list(loaded) == ["model", "n"]
        assert loaded["n"] == 7
        assert not [call for call in store.calls if call.operation == "read_into"]
        np.testing.assert_array_equal(loaded["model"]["b"], np.zeros(50))
        assert len([call for call in store.calls if call.operation == "read_into"]) == 1
        with pytest.raises(KeyError):
            loaded["model"]["c"]


def test_a_second_writer_in_this_process_is_refused(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "run") as first:
        first.save(1, state(1)).result()
        second = CheckpointManager(tmp_path / "run")
        with pytest.raises(RunHeld, match="already open for writing in this process"):
            second.save(2, state(2))
        second.close()
    with CheckpointManager(tmp_path / "run") as third:
        third.save(2, state(2)).result()


def test_structure_is_checked_before_anything_is_touched(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "run") as ckpts:
        ckpts.save(1, {"a": np.ones(3), "b": np.ones(4), "gone": 1}).result()
        live = {"a": np.zeros(3), "b": np.zeros((2, 2)), "new": np.zeros(1)}
        with pytest.raises(StructureMismatch) as caught:
            ckpts.restore(live)
        text = str(caught.value)
        assert "new" in text
        assert "gone" in text
        assert not live["a"].any()


def test_a_selection_that_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "run") as manager:
        manager.save(1, state(1)).result()
        live = state(0)
        with pytest.raises(UsageError, match="only='name' must be a list of names"):
            manager.restore(live, only="name")
        with pytest.raises(UsageError, match="is called 'history/3'") as caught:
            manager.restore(live, skip=["history/3"])
        assert "history/2" in caught.value.hint
        manager.restore(live, skip=["history/2", "weights"])
        assert live["history"] == [1.0, 2.0, 0.0]
        assert live["name"] == "step 1"


def test_unsupported_values_are_named(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "run") as ckpts:
        with pytest.raises(UnsupportedValue, match="model/hook"):
            ckpts.save(1, {"model": {"hook": lambda: None}})
        ckpts.save(2, {"model": {"hook": 1}}).result()


@pytest.mark.parametrize("step", [-1, 1.5, True, "7"])
def test_steps_are_checked(tmp_path: Path, step: Any) -> None:
    with CheckpointManager(tmp_path / "run") as ckpts, pytest.raises(UsageError):
        ckpts.save(step, {})


def test_metrics_must_be_numbers(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "run") as ckpts, pytest.raises(UsageError, match="'loss'"):
        ckpts.save(1, {}, metrics={"loss": "low"})  # type: ignore[dict-item]


def test_a_closed_manager_says_so(tmp_path: Path) -> None:
    ckpts = CheckpointManager(tmp_path / "run")
    ckpts.close()
    ckpts.close()
    with pytest.raises(RunClosed):
        ckpts.save(1, {})


# -- failures -----------------------------------------------------------------


def failing(times: int | None) -> FaultyStore:
    fault = Fault(Effect.FAIL, operation="put_new", prefix="packs/", times=times, error=StoreFull)
    return FaultyStore(MemoryStore("failing"), FaultPlan((fault,)))


def test_a_failed_save_is_logged_and_the_next_one_works(caplog: pytest.LogCaptureFixture) -> None:
    with CheckpointManager("memory://failing", store=failing(2)) as ckpts:
        with caplog.at_level(logging.ERROR):
            first = ckpts.save(1, state(1))
            with pytest.raises(StoreFull):
                first.result()
            assert "the save of step 1 failed" in caplog.text
            with pytest.raises(StoreFull):
                ckpts.save(2, state(2)).result()
        ckpts.save(3, state(3)).result()
        assert [c.step for c in ckpts.checkpoints()] == [3]


def test_three_failures_in_a_row_raise_at_the_next_call() -> None:
    ckpts = CheckpointManager("memory://failing", store=failing(None))
    for step in (1, 2, 3):
        pending = ckpts.save(step, state(step))
        with pytest.raises(StoreFull):
            pending.result()
    with pytest.raises(SaveFailed, match="3 saves of memory://failing in a row"):
        ckpts.save(4, state(4))
    with pytest.raises(SaveFailed):
        ckpts.close()


def test_a_save_that_is_waited_for_is_always_tried() -> None:
    """After three failures the disk has room again: the last save of a job must not be lost."""
    with CheckpointManager("memory://failing", store=failing(3)) as ckpts:
        for step in (1, 2, 3):
            with pytest.raises(StoreFull):
                ckpts.save(step, state(step)).result()
        ckpts.save(4, state(4), block=True)
        assert [c.step for c in ckpts.checkpoints()] == [4]


def test_close_raises_when_the_last_save_failed() -> None:
    ckpts = CheckpointManager("memory://failing", store=failing(1))
    ckpts.save(1, state(1))
    with pytest.raises(SaveFailed, match="last save"):
        ckpts.close()


# -- damage -------------------------------------------------------------------


def saved_run(folder: Path) -> None:
    with CheckpointManager(folder, keep=None) as ckpts:
        for step in (1, 2):
            ckpts.save(step, state(step), loop={"at": step}).result()


def test_flipping_any_byte_is_noticed_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every file of the newest checkpoint, at many places: never a wrong value."""
    saved_run(tmp_path / "run")
    with CheckpointManager(tmp_path / "run") as ckpts:
        newest = ckpts.manifest(2)
        id = ckpts.info(2).id
    own = [pack.name for pack in newest.packs if pack.born == newest.ordinal]
    files = [tmp_path / "run" / "manifests" / f"{id}.json"]
    files += [tmp_path / "run" / "packs" / f"{name}.safetensors" for name in own]
    chance = random.Random(0)
    for file in files:
        whole = file.read_bytes()
        places = {0, 1, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(60))}
        for place in sorted(places):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << chance.randrange(8)
            file.write_bytes(damaged)
            caplog.clear()
            live = state(0)
            with CheckpointManager(tmp_path / "run") as ckpts:
                restored = ckpts.restore(live)
                assert restored is not None
                assert restored.info.step == 1, f"{file.name} byte {place}"
                assert restored.loop == {"at": 1}
                assert_equal(live, 1)
                assert len(restored.skipped) == 1
                found = ckpts.verify(2)[0]
                assert not found.ok
                assert found.problems
                with pytest.raises(HoldfastError):
                    ckpts.restore(state(0), 2)
            assert "is damaged" in caplog.text
            assert "fell back to" in caplog.text
        file.write_bytes(whole)


@pytest.mark.parametrize("how", ["truncated", "missing", "longer", "empty"])
def test_a_pack_of_another_size_is_noticed(tmp_path: Path, how: str) -> None:
    saved_run(tmp_path / "run")
    with CheckpointManager(tmp_path / "run") as ckpts:
        name = next(p.name for p in ckpts.manifest(2).packs if p.born == 2)
    file = tmp_path / "run" / "packs" / f"{name}.safetensors"
    data = file.read_bytes()
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes({"truncated": data[:-1], "longer": data + b"x", "empty": b""}[how])
    with CheckpointManager(tmp_path / "run") as ckpts:
        live = state(0)
        restored = ckpts.restore(live)
        assert restored is not None
        assert restored.info.step == 1
        assert not ckpts.verify(2)[0].ok


def test_damage_everywhere_is_an_error_and_never_a_start_from_zero(tmp_path: Path) -> None:
    saved_run(tmp_path / "run")
    for file in (tmp_path / "run" / "packs").iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    live = state(0)
    with (
        CheckpointManager(tmp_path / "run") as ckpts,
        pytest.raises(NoIntactCheckpoint, match=r"none of the 2 checkpoint.* is intact"),
    ):
        ckpts.restore(live)
    assert_equal(live, 0)


def test_damaged_bytes_are_never_reused_by_a_save(tmp_path: Path) -> None:
    same = np.arange(100_000)
    with CheckpointManager(tmp_path / "run", keep=None) as ckpts:
        ckpts.save(1, {"a": same, "b": 1}).result()
        ckpts.save(2, {"a": same, "b": 2}).result()
    file = next((tmp_path / "run" / "packs").iterdir())
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with CheckpointManager(tmp_path / "run", keep=None) as ckpts:
        with pytest.raises(NoIntactCheckpoint):
            ckpts.restore({"a": np.zeros(100_000, dtype=np.int64), "b": 0})
        info = ckpts.save(3, {"a": same, "b": 3}).result()
        assert info.new_bytes > 100_000
        assert ckpts.verify(3)[0].ok


def test_a_file_without_a_target_can_be_read_after_a_restore(tmp_path: Path) -> None:
    (tmp_path / "vocabulary").write_bytes(b"words" * 50_000)
    with CheckpointManager(tmp_path / "run") as ckpts:
        ckpts.save(1, {"v": File(tmp_path / "vocabulary")}).result()
        restored = ckpts.restore()
        assert restored is not None
        assert restored.values["v"].read() == b"words" * 50_000
        ckpts.load()["v"].copy_to(tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"words" * 50_000


def test_a_damaged_run_file_is_not_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved_run(tmp_path / "run")
    file = tmp_path / "run" / "holdfast.json"
    data = bytearray(file.read_bytes())
    data[40] ^= 1
    file.write_bytes(data)
    with CheckpointManager(tmp_path / "run", keep=None) as ckpts:
        live = state(0)
        ckpts.restore(live)
        assert_equal(live, 2)
        assert "holdfast.json is damaged" in caplog.text
        ckpts.save(3, state(3)).result()
        assert [c.step for c in ckpts.checkpoints()] == [1, 2, 3]


# -- export and fork ------------------------------------------------------------


def test_an_export_opens_with_safetensors_alone(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    saved_run(tmp_path / "run")
    with CheckpointManager(tmp_path / "run") as ckpts:
        written = ckpts.export(2, tmp_path / "out")
        with pytest.raises(UsageError, match="not empty"):
            ckpts.export(2, tmp_path / "out")
    assert [path.name for path in written] == ["state.safetensors", "state.json"]
    tensors = load_file(tmp_path / "out" / "state.safetensors")
    np.testing.assert_array_equal(tensors["weights"], state(2)["weights"])
    np.testing.assert_array_equal(tensors["frozen"], state(2)["frozen"])
    assert set(tensors) == {"weights", "frozen"}


def test_packs_open_with_safetensors(tmp_path: Path) -> None:
    from safetensors import safe_open

    saved_run(tmp_path / "run")
    for file in (tmp_path / "run" / "packs").iterdir():
        with safe_open(file, "np") as pack:
            for name in pack.keys():  # noqa: SIM118 - safe_open is no mapping
                pack.get_tensor(name)


def test_digests_are_blake3() -> None:
    assert digest(b"abc").startswith("6437b3ac38465133ffb63b75273a8db5")


def test_gc_tells_what_it_deletes_and_a_dry_run_deletes_nothing(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as ckpts:
        ckpts.save(1, {"x": np.ones(100)}).result()
    orphan = "packs/000001-0123456789abcdef-0-0.safetensors"
    (tmp_path / orphan).write_bytes(b"left by a dead writer")
    with CheckpointManager(tmp_path) as ckpts:
        assert ckpts.gc(dry_run=True) == [orphan]
        assert (tmp_path / orphan).exists()
        assert ckpts.gc() == [orphan]
        assert not (tmp_path / orphan).exists()
        assert ckpts.gc() == []
