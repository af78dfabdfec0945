"""Metrics for checkpoints that are there already, from any process."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import holdfast
from holdfast.errors import (
    CheckpointNotFound,
    DamagedObject,
    NoStore,
    StructureMismatch,
    UsageError,
)
from holdfast.manager import CheckpointManager, Evaluation, LoadedCheckpoint
from holdfast.repo import log
from holdfast.stores.base import Store
from holdfast.stores.faulty import Died, Effect, FaultPlan, FaultyStore
from holdfast.stores.memory import MemoryStore
from tests.support.damage import damage_newest
from tests.support.jobs import Killed, fresh_address

STEPS = (1, 2, 3, 4)
ROOT = Path(__file__).parents[2]


def saved(address: Any, store: Store | None = None, **options: Any) -> None:
    with CheckpointManager(address, keep=None, store=store, **options) as manager:
        for step in STEPS:
            manager.save(step, state(step)).result()


def state(step: int) -> dict[str, Any]:
    return {"w": np.full(3, float(step)), "box": {"n": step, "seen": [step]}}


def distance(checkpoint: LoadedCheckpoint) -> float:
    """Step 3 is the best."""
    return abs(float(checkpoint["w"][0]) - 3)


class Counted:
    """`fn` of `evaluate`; raises at the n-th call."""

    def __init__(self, fn: Callable[[Any], Any] = distance, raises: Any = None, at: int = 0):
        self.fn, self.raises, self.at = fn, raises, at
        self.steps: list[int] = []

    def __call__(self, checkpoint: LoadedCheckpoint) -> Any:
        if self.raises is not None and len(self.steps) == self.at:
            raise self.raises
        self.steps.append(checkpoint.info.step)
        return self.fn(checkpoint)


def outcomes(done: list[Evaluation]) -> list[tuple[int, str]]:
    return [(one.info.step, one.outcome) for one in done]


@pytest.fixture
def run() -> str:
    address = fresh_address()
    saved(address)
    return address


def test_the_metric_is_there_for_best_and_for_who_lists(run: str) -> None:
    with CheckpointManager(run, keep=None) as manager:
        done = manager.evaluate(distance)
        assert outcomes(done) == [(step, "evaluated") for step in STEPS]
        assert [one.metrics for one in done] == [{"distance": x} for x in (2.0, 1.0, 0.0, 1.0)]
        assert [one.info for one in done] == manager.checkpoints()
    with CheckpointManager(run) as other:
        best = other.best("distance")
        assert best is not None
        assert best.step == 3
        assert other.info("best:distance").metrics == {"distance": 0.0}
        assert all(v.ok for v in other.verify())


def test_what_is_chosen(run: str) -> None:
    with CheckpointManager(run, keep=None) as manager:
        manager.tag(1, "gold")
        counted = Counted()
        manager.evaluate(counted, "last=2 gold", metric="m")
        assert counted.steps == [1, 3, 4]
        with pytest.raises(CheckpointNotFound, match="no checkpoint at step 9"):
            manager.evaluate(counted, [1, 9], metric="m")
    with CheckpointManager(fresh_address()) as nothing, pytest.raises(NoStore):
        nothing.evaluate(distance)


def test_what_fn_gives(run: str) -> None:
    with CheckpointManager(run, keep=None) as manager:
        manager.evaluate(lambda c: torch.tensor([2.5]), 1, metric="tensor")
        manager.evaluate(lambda c: np.float32(0.5), 1, metric="numpy")
        manager.evaluate(lambda c: {"a": 1, "b": True}, 1)
        manager.evaluate(lambda c: float("nan"), 1, metric="odd")
        found = dict(manager.info(1).metrics)
        assert str(found.pop("odd")) == "nan"
        assert found == {"tensor": 2.5, "numpy": 0.5, "a": 1.0, "b": 1.0}
        known = manager.evaluate(lambda c: 1.0, 1, metric="odd")
        assert outcomes(known) == [(1, "known")], "it was evaluated, if to nothing"


@pytest.mark.parametrize(
    ("fn", "metric", "words"),
    [
        (lambda c: 1.0, None, "nothing says what it is"),
        (lambda c: {}, None, "gave no metric"),
        (lambda c: {"a": 1.0}, ["a", "b"], "gave a, and no b"),
        (lambda c: 1.0, ["a", "b"], "gave one value, not a, b"),
        (lambda c: "high", "a", "metric 'a' is not a number: a str"),
        (lambda c: np.ones(2), "a", "metric 'a' is not a number: a ndarray"),
        (lambda c: None, "a", "metric 'a' is not a number: a NoneType"),
        (lambda c: 1.0, [], "names no metric"),
    ],
)
def test_what_is_no_metric(run: str, fn: Any, metric: Any, words: str) -> None:
    with CheckpointManager(run, keep=None) as manager:
        with pytest.raises(UsageError, match=words):
            manager.evaluate(fn, metric=metric)
        assert not any(info.metrics for info in manager.checkpoints())


def test_killed_in_the_middle_it_goes_on_where_it_was(run: str) -> None:
    with CheckpointManager(run, keep=None) as manager:
        first = Counted(raises=Killed(), at=2)
        with pytest.raises(Killed):
            manager.evaluate(first, metric="m")
    with CheckpointManager(run, keep=None) as manager:
        second = Counted()
        done = manager.evaluate(second, metric="m")
        assert (first.steps, second.steps) == ([1, 2], [3, 4])
        assert outcomes(done) == [(1, "known"), (2, "known"), (3, "evaluated"), (4, "evaluated")]
        assert [one.metrics["m"] for one in done] == [2.0, 1.0, 0.0, 1.0]
        third = Counted()
        manager.evaluate(third, metric="m")
        assert third.steps == []
        manager.evaluate(third, "last=2", metric="m", again=True)
        assert third.steps == [3, 4]


def test_several_metrics_go_on_too(run: str) -> None:
    def both(checkpoint: LoadedCheckpoint) -> dict[str, float]:
        return {"a": 1.0, "b": 2.0}

    with CheckpointManager(run, keep=None) as manager:
        with pytest.raises(Killed):
            manager.evaluate(Counted(both, Killed(), 2))
        named = Counted(both)
        manager.evaluate(named, "last=3", metric=["a", "b"])
        assert named.steps == [3, 4]
        manager.save(5, state(5)).result()
        learned = Counted(both)
        done = manager.evaluate(learned)
        assert learned.steps == [5], "one that lacks them says what they are"
        assert [one.outcome for one in done] == ["known"] * 4 + ["evaluated"]
        once = Counted(both)
        manager.evaluate(once)
        assert len(once.steps) == 1, "nothing else can say it"


def test_an_exception_names_the_checkpoint(run: str) -> None:
    with CheckpointManager(run, keep=None) as manager:
        with pytest.raises(ZeroDivisionError) as caught:
            manager.evaluate(Counted(raises=ZeroDivisionError("oh"), at=1), metric="m")
        assert caught.value.__notes__ == [f"while {run}@2 was evaluated"]
        assert [dict(info.metrics) for info in manager.checkpoints()] == [{"m": 2.0}, {}, {}, {}]


# -- live objects -----------------------------------------------------------------


def live() -> dict[str, Any]:
    return {"w": np.full(3, -1.0), "box": {"n": 7, "seen": [8, 9], "more": "x"}}


def test_into_live_objects_which_are_put_back(run: str) -> None:
    objects, expected = live(), live()
    array, box, seen = objects["w"], objects["box"], objects["box"]["seen"]
    random.seed(5)
    np.random.seed(5)
    states = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    draws: list[float] = []

    def measure(checkpoint: LoadedCheckpoint) -> float:
        step = checkpoint.info.step
        assert array.tolist() == [step] * 3
        assert (box["n"], seen) == (step, [step])
        draws.append(random.random() + np.random.rand())
        array[:] = 99.0
        box["new"] = 1
        return step

    with CheckpointManager(run, keep=None) as manager:
        manager.evaluate(measure, into=objects, strict=False)
    assert np.array_equal(objects.pop("w"), expected.pop("w"))
    assert objects == expected
    assert (objects["box"] is box, box["seen"] is seen, array[0]) == (True, True, -1.0)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states  # type: ignore[index, union-attr]
    assert len(set(draws)) == 1, "each checkpoint is measured with the same draws"


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), Killed(), SystemExit(3)])
def test_they_are_put_back_whatever_is_raised(run: str, error: BaseException) -> None:
    objects = {"w": np.full(3, -1.0)}
    random.seed(6)
    before = random.getstate()
    with CheckpointManager(run, keep=None) as manager, pytest.raises(type(error)):
        manager.evaluate(Counted(lambda c: random.random(), error, 2), metric="m", into=objects)
    assert objects["w"].tolist() == [-1.0] * 3
    assert random.getstate() == before


def test_a_tracked_file_is_put_back(tmp_path: Path) -> None:
    path = tmp_path / "vocab"
    with CheckpointManager(tmp_path / "run", keep=None) as manager:
        for step in (1, 2):
            path.write_bytes(b"%d" % step * 9_000_000)
            manager.save(step, {"f": holdfast.File(path)}).result()
        path.write_text("as it is now")
        done = manager.evaluate(
            lambda c: int(path.read_bytes()[-1:]), metric="m", into={"f": holdfast.File(path)}
        )
    assert [one.metrics["m"] for one in done] == [1.0, 2.0]
    assert path.read_text() == "as it is now"


def test_what_does_not_fit(run: str) -> None:
    objects = {"w": np.full(4, -1.0)}
    with CheckpointManager(run, keep=None) as manager:
        with pytest.raises(StructureMismatch) as caught:
            manager.evaluate(distance, into=objects)
        assert caught.value.__notes__ == [f"while {run}@1 was loaded to be evaluated"]
        with pytest.raises(StructureMismatch):
            manager.evaluate(distance, into={"v": np.zeros(3)})
    assert objects["w"].tolist() == [-1.0] * 4


def test_it_is_no_restore_in_the_history(tmp_path: Path) -> None:
    """Goodput would count it as a start; and what is saved next builds on the newest."""
    with CheckpointManager(tmp_path / "run", keep=None) as manager:
        for step in (1, 2):
            manager.save(step, {"w": np.full(50_000, step)}).result()
    with CheckpointManager(tmp_path / "run", keep=None) as manager:
        before = manager.events()
        into = {"w": np.zeros(50_000, np.int64)}
        manager.evaluate(lambda c: into["w"][0], "1", metric="m", into=into)
        assert manager.events() == before
        manager.save(3, {"w": np.full(50_000, 2)}).result()
        assert manager.info(3).new_bytes < 50_000


# -- damage, and other processes ----------------------------------------------------


@pytest.mark.parametrize("into", [True, False])
def test_a_damaged_one_is_named_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, into: bool
) -> None:
    saved(tmp_path / "run")
    damage_newest(tmp_path / "run")
    objects = {"w": np.zeros(3)} if into else None
    with CheckpointManager(tmp_path / "run", keep=None) as manager:
        done = manager.evaluate(distance, [4, 2], into=objects)
    assert outcomes(done) == [(2, "evaluated"), (4, "damaged")]
    assert "'w' in packs/" in done[1].why
    assert f"{tmp_path}/run@4 is damaged and was not evaluated" in caplog.text
    assert done[1].info.metrics == {}


def test_a_damaged_manifest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path / "run")
    with CheckpointManager(tmp_path / "run", keep=None) as manager:
        path = tmp_path / "run" / "manifests" / f"{manager.info(2).id}.json"
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:-30])
        done = manager.evaluate(distance)
    assert [one.outcome for one in done] == ["evaluated", "damaged", "evaluated", "evaluated"]
    assert "run@2 is damaged" in caplog.text


def test_damage_of_another_run_is_an_error(run: str, tmp_path: Path) -> None:
    saved(tmp_path / "other")
    damage_newest(tmp_path / "other")
    with CheckpointManager(run, keep=None) as manager, pytest.raises(DamagedObject):
        manager.evaluate(lambda c: holdfast.open(tmp_path / "other")["w"][0], metric="m")


def test_one_that_is_removed_meanwhile(run: str, caplog: pytest.LogCaptureFixture) -> None:
    """While it is evaluated, or before."""

    def remove(checkpoint: LoadedCheckpoint) -> float:
        if checkpoint.info.step == 1:
            with CheckpointManager(run, keep=None) as other:
                other.remove([1, 2])
        return 1.0

    with CheckpointManager(run, keep=None) as manager:
        done = manager.evaluate(remove, [1, 2, 4], metric="m")
        assert outcomes(done) == [(1, "removed"), (2, "removed"), (4, "evaluated")]
        assert caplog.text.count("was removed before it was evaluated") == 2
        with pytest.raises(CheckpointNotFound, match="no checkpoint at step 9"):
            manager.evaluate(lambda c: manager.load(9)["w"][0], metric="n")


def test_beside_a_live_writer_and_kept_by_its_rule(tmp_path: Path) -> None:
    """The writer goes on, with what another process has found."""
    address = tmp_path / "run"
    keep = "last=1 best=1:distance"
    evaluate = (
        "import sys, holdfast\n"
        "with holdfast.CheckpointManager(sys.argv[1]) as m:\n"
        "    m.evaluate(lambda c: abs(float(c['w'][0]) - 2), metric='distance')\n"
    )
    with CheckpointManager(address, keep="last=3 best=1:distance") as writer:
        for step in (1, 2, 3):
            writer.save(step, state(step)).result()
        subprocess.run([sys.executable, "-c", evaluate, str(address)], check=True, cwd=ROOT)
        writer.save(4, state(4), metrics={"distance": 5.0}).result()
        writer.save(5, state(5)).result()
        writer.save(6, state(6)).result()
        assert [info.step for info in writer.checkpoints()] == [2, 4, 5, 6]
        decisions = writer.prune(keep, dry_run=True)
        assert [d.why for d in decisions if d.record.step == 2] == [("best=1:distance (0)",)]
        writer.prune(keep)
        assert [info.step for info in writer.checkpoints()] == [2, 6]
        best = writer.best()
        assert best is not None
        assert best.step == 2


def test_two_evaluations_share_the_work(run: str) -> None:
    inner = Counted()

    def first(checkpoint: LoadedCheckpoint) -> float:
        if not inner.steps:
            with CheckpointManager(run, keep=None) as other:
                other.evaluate(inner, "last=2", metric="m")
        return 10.0

    with CheckpointManager(run, keep=None) as manager:
        counted = Counted(first)
        done = manager.evaluate(counted, metric="m")
    assert (counted.steps, inner.steps) == ([1, 2], [3, 4])
    assert [one.metrics["m"] for one in done] == [10.0, 10.0, 0.0, 1.0]


def test_copies_take_it_along(tmp_path: Path) -> None:
    run, one, all_of_it = tmp_path / "run", tmp_path / "one", tmp_path / "all"
    saved(run)
    with CheckpointManager(run, keep=None, mirror=tmp_path / "mirror", mirror_keep="") as manager:
        manager.sync(all_of_it)
        manager.evaluate(distance)
        manager.copy([3], one)
        manager.sync(all_of_it)
        manager.save(5, state(5)).result()
        assert manager.wait_mirrored(30)
        manager.evaluate(distance)
        assert manager.wait_mirrored(30)
    expected = {1: 2.0, 2: 1.0, 3: 0.0, 4: 1.0, 5: 2.0}
    for place, steps in ((one, [3]), (all_of_it, [1, 2, 3, 4]), (tmp_path / "mirror", expected)):
        with CheckpointManager(place, keep=None) as copy:
            found = {info.step: info.metrics.get("distance") for info in copy.checkpoints()}
            assert found == {step: expected[step] for step in steps}


# -- stopped at any storage call ------------------------------------------------------


@pytest.fixture
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_CREATE_BACKOFF_S", 0.0)


@pytest.mark.usefixtures("no_backoff")
@pytest.mark.parametrize("effect", [Effect.DIE_BEFORE, Effect.DIE_AFTER])
def test_stopped_at_each_storage_call(effect: Effect) -> None:
    """What was found by then stays, nothing else changes, and the next one completes it."""

    before = MemoryStore("evaluated")
    saved("memory://evaluated", before)

    def prepared() -> MemoryStore:
        store = MemoryStore("evaluated")
        store._objects.update(before._objects)
        return store

    def evaluate(store: Store, counted: Counted) -> list[Evaluation]:
        manager = CheckpointManager("memory://evaluated", keep=None, store=store)
        return manager.evaluate(counted, metric="m")

    whole = FaultyStore(prepared())
    evaluate(whole, Counted())
    assert len(whole.calls) > 20
    for number in range(1, len(whole.calls) + 1):
        store = FaultyStore(prepared(), FaultPlan.at(number, effect))
        first, second = Counted(), Counted()
        with pytest.raises(Died):
            evaluate(store, first)
        with CheckpointManager("x", keep=None, store=store.survivor()) as manager:
            found = [info.step for info in manager.checkpoints() if "m" in info.metrics]
            assert found == first.steps or found == first.steps[:-1]
            assert all(v.ok for v in manager.verify())
            done = manager.evaluate(second, metric="m")
            assert second.steps == [step for step in STEPS if step not in found]
            assert [one.metrics["m"] for one in done] == [2.0, 1.0, 0.0, 1.0]


PROGRAM = """
import sys, time
import holdfast

def slow(checkpoint):
    print(checkpoint.info.step, flush=True)
    time.sleep(0.2)
    return float(checkpoint["w"].sum()) / 3

with holdfast.CheckpointManager(sys.argv[1], keep=None) as manager:
    manager.evaluate(slow)
"""


@pytest.mark.slow
def test_a_process_that_is_killed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    saved(run)
    command = [sys.executable, "-c", PROGRAM, str(run)]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    for line in first.stdout:
        if int(line) == 3:
            break
    first.kill()
    first.communicate()
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert second.stdout.split() == ["3", "4"]
    with CheckpointManager(run, keep=None) as manager:
        assert [info.metrics["slow"] for info in manager.checkpoints()] == [1.0, 2.0, 3.0, 4.0]
        assert all(v.ok for v in manager.verify())
