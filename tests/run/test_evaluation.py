"""`run.evaluate`: at any place of a program, which goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.errors import RunClosed, StructureMismatch, UsageError
from holdfast.manager import CheckpointManager
from tests.support.jobs import Countdown, Killed, Model, Shuffled, fresh_address, process

EPOCHS, BATCHES = 3, 4


def program(
    address: str,
    evaluate: Callable[[holdfast.Run, Model, Any], object] = lambda run, model, box: None,
    *,
    where: str = "",
    **options: Any,
) -> Model:
    """A training of 12 steps; `evaluate` is called at the place `where`."""
    run = holdfast.Run(address, **{"every": 2, "keep": None, "quiet": True, **options})
    model = Model()
    run.track(model=model, loader=(loader := Shuffled(BATCHES)))
    box = run.box(best=1e9, seen=[])

    def at(place: str) -> None:
        if place == where:
            evaluate(run, model, box)

    with run:
        at("before")
        for _ in run.epochs(EPOCHS):
            for batch in run.batches(loader):
                at("step")
                loss = model.step(batch)
                run.log(loss=loss)
                box.best = min(box.best, loss)
                box.seen.append(loss)
            at("tail")
        at("after")
    return model


def contents(address: str) -> list[Any]:
    """Every checkpoint, but for when it was made and what was evaluated. Each weight depends on
    all random numbers and batches before it."""
    with CheckpointManager(address, keep=None) as manager:
        return [
            [
                info.step,
                manager.load(info.id).read(),
                {k: v for k, v in info.metrics.items() if k != "distance"},
            ]
            for info in manager.checkpoints()
        ]


def same(a: Any, b: Any) -> bool:
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return value.tobytes().hex() if isinstance(value, np.ndarray) else repr(value)

    return plain(a) == plain(b)


def spoil(run: holdfast.Run, model: Model, box: Any) -> None:
    """Evaluate all that is there, with a function that leaves nothing as it is."""

    def distance(checkpoint: Any) -> float:
        assert np.array_equal(model.weights, checkpoint["model"]["weights"])
        assert model.seen == checkpoint.info.step
        assert box.seen == checkpoint["box"]["seen"]
        found = float(model.weights.sum()) + np.random.rand()
        model.weights += 1
        model.seen = 77
        box.best = -1.0
        box.seen.append("spoiled")
        return found

    run.evaluate(distance)


def started(address: str, evaluate: Any, where: str, **options: Any) -> None:
    with process():
        program(address, evaluate, where=where, **options)


@pytest.fixture(scope="module")
def untouched() -> list[Any]:
    address = fresh_address()
    with process():
        program(address)
    return contents(address)


@pytest.mark.parametrize("where", ["step", "tail", "after"])
def test_the_training_does_not_notice(untouched: list[Any], where: str) -> None:
    address = fresh_address()
    # The first body has nothing to evaluate.
    evaluate = lambda run, model, box: spoil(run, model, box) if run.step > 2 else None  # noqa: E731
    started(address, evaluate, where)
    assert same(contents(address), untouched)
    with CheckpointManager(address) as manager:
        evaluated = [info.step for info in manager.checkpoints() if "distance" in info.metrics]
    assert evaluated == ([2, 4, 6, 8, 10, 12] if where == "after" else evaluated)
    assert len(evaluated) >= 4


def test_before_the_loops_of_a_program_that_goes_on(untouched: list[Any]) -> None:
    address = fresh_address()

    def kill(run: holdfast.Run, model: Model, box: Any) -> None:
        if run.step == 7:
            raise Killed

    started(address, kill, "step")
    started(address, spoil, "before")
    assert same(contents(address), untouched)


@pytest.mark.parametrize(
    ("where", "number"), [("step", 0), ("step", 3), ("step", 4), ("tail", 1), ("tail", 4)]
)
def test_killed_in_an_evaluation_it_goes_on(untouched: list[Any], where: str, number: int) -> None:
    """In the middle of a call, with another checkpoint's state in the model: nothing of it is
    in what is saved."""
    address, die = fresh_address(), Countdown(number)

    def evaluate(run: holdfast.Run, model: Model, box: Any) -> None:
        def distance(checkpoint: Any) -> float:
            model.weights += 1
            die()
            return 1.0

        if run.step > 2:
            run.evaluate(distance)

    started(address, evaluate, where)
    assert die.calls == number
    started(address, spoil if where == "tail" else lambda run, model, box: None, where)
    assert same(contents(address), untouched)


def test_a_finished_program_that_is_started_again() -> None:
    address, calls = fresh_address(), Countdown()

    def evaluate(run: holdfast.Run, model: Model, box: Any) -> None:
        def distance(checkpoint: Any) -> float:
            calls()
            return 1.0

        run.evaluate(distance)

    for _ in range(2):
        started(address, evaluate, "after")
    assert calls.calls == 6, "none of them twice"


def test_an_exception_leaves_the_run_usable(untouched: list[Any]) -> None:
    address = fresh_address()

    def evaluate(run: holdfast.Run, model: Model, box: Any) -> None:
        def broken(checkpoint: Any) -> float:
            model.weights[:] = np.nan
            raise KeyboardInterrupt if run.step % 2 else ValueError("no")

        if run.step > 2:
            with pytest.raises((ValueError, KeyboardInterrupt)):
                run.evaluate(broken)

    started(address, evaluate, "step")
    assert same(contents(address), untouched)


# -- what it does for the run -------------------------------------------------------


def test_the_best_is_kept_from_then_on() -> None:
    address = fresh_address()

    def evaluate(run: holdfast.Run, model: Model, box: Any) -> None:
        if run.step == 4:
            run.evaluate(lambda c: abs(c.info.step - 2), metric="test_loss", only=["model"])

    started(address, evaluate, "tail", keep="last=2 best=1:test_loss")
    with CheckpointManager(address) as manager:
        assert [info.step for info in manager.checkpoints()] == [2, 10, 12]
        best = manager.best("test_loss")
        assert best is not None
        assert best.step == 2


def test_a_new_metric_competes_with_those_that_were_evaluated() -> None:
    """`best` saves when the metric improves: on what is known after the evaluation."""
    address, saved = fresh_address(), list[str]()

    def evaluate(run: holdfast.Run, model: Model, box: Any) -> None:
        if run.step == 2:
            run.log(score=5.0)
        if run.step == 4:
            run.evaluate(lambda c: 0.5, metric="score", again=True)
            run.log(score=1.0)

    started(address, evaluate, "step", every=1000, keep="last=9 best=1:score:min")
    with CheckpointManager(address) as manager:
        saved = [f"{info.step} {info.note}" for info in manager.checkpoints()]
    assert saved == ["3 best", "12 final"], "1.0 is no better than 0.5"


def test_the_published_one_follows(tmp_path: Path) -> None:
    folder = tmp_path / "best"

    def evaluate(run: holdfast.Run, model: Model, box: Any) -> None:
        run.evaluate(lambda c: abs(c.info.step - 6), metric="gap")

    options = {"keep": "last=9 best=1:gap", "publish": f"best:{folder}"}
    started(str(tmp_path / "run"), evaluate, "after", **options)
    described = json.loads((folder / "state.json").read_text())
    assert described["checkpoint"]["step"] == 6


def test_a_save_in_progress_is_evaluated_too() -> None:
    """And where there is none yet, nothing is."""
    address = fresh_address()
    with holdfast.Run(address, every=1, keep=None, quiet=True) as run:
        w = np.zeros(3)
        run.track(w=w)
        for step in run.range(4):
            done = run.evaluate(lambda c, w=w: float(w[0]), "last=1", metric="w")
            assert [(one.info.step, one.metrics["w"]) for one in done] == [(step, step)][:step]
            w[:] = step + 1


def test_only_and_what_a_checkpoint_lacks() -> None:
    address = fresh_address()
    with holdfast.Run(address, every=1, keep=None, quiet=True, late=["b"]) as run:
        run.track(a=(a := np.zeros(2)))
        b = np.zeros(2)
        for step in run.range(4):
            if step == 2:
                run.track(b=b)
            a += 1
            b += 10
        seen: list[tuple[float, float]] = []

        def look(checkpoint: Any) -> float:
            seen.append((float(a[0]), float(b[0])))
            return 0.0

        run.evaluate(look)
        assert seen == [(1, 40), (2, 40), (3, 30), (4, 40)]
        seen.clear()
        run.evaluate(look, "last=2", only=["b"], again=True)
        assert seen == [(4, 30), (4, 40)]
        assert (a[0], b[0]) == (4, 40)
        with pytest.raises(UsageError, match="nothing is tracked as 'c'"):
            run.evaluate(look, only=["c"])
        with pytest.raises(UsageError, match="is text"):
            run.evaluate(look, only="b")
        with pytest.raises(StructureMismatch, match="holds nothing of b"):
            run.evaluate(look, 1, only=["b"], again=True)
    with pytest.raises(RunClosed):
        run.evaluate(look)


def test_a_request_to_stop_is_answered_between_two_checkpoints(tmp_path: Path) -> None:
    """Here at once: the last save was at this place, so that nothing is lost."""
    seen: list[int] = []
    model = Model()
    run = holdfast.Run(tmp_path / "run", every=1, keep=None, quiet=True)
    run.track(model=model)

    def slow(checkpoint: Any) -> float:
        seen.append(checkpoint.info.step)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return 1.0

    with pytest.raises(SystemExit) as left:
        for step in run.range(9):
            if step == 5:
                weights = model.weights.copy()
                run.evaluate(slow)
            model.step(1.0)
    assert left.value.code == 75
    assert seen == [1, 2]
    assert np.array_equal(model.weights, weights)
    run.close()
    with CheckpointManager(tmp_path / "run") as manager:
        evaluated = [info.step for info in manager.checkpoints() if "slow" in info.metrics]
    assert evaluated == [1, 2]
