"""LightGBM: finished trainings, rules, estimators, wrong use, and processes that are killed."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pytest

import holdfast
import holdfast.lightgbm
from holdfast.errors import HoldfastError, StateError, UsageError
from tests.examples.test_examples import Example, last_line
from tests.frameworks.test_lightgbm import (
    BASE,
    CLASSES,
    GRADES,
    NUMBERS,
    PLAIN,
    ROUNDS,
    ROWS,
    SAMPLED,
    X_VALID,
    At,
    X,
    job,
)
from tests.support.jobs import Killed, copied, fresh_address, kill_everywhere, steps_of

# -- the end, and beyond ----------------------------------------------------------------


def test_a_finished_training_makes_nothing_and_gives_all_again() -> None:
    for mode, rounds in ((PLAIN["multiclass"], ROUNDS), (SAMPLED["goss"], ROUNDS)):
        address = fresh_address()
        with holdfast.Run(address, every=5, quiet=True) as run:
            first = job(mode, run, rounds=rounds)
        with holdfast.Run(address, every=5, quiet=True) as run:
            assert run.finished
            again = job(mode, run, lambda: pytest.fail("a round"), rounds=rounds)
        assert again == first


def test_a_training_that_stopped_early_stays_so_and_a_whole_one_goes_on() -> None:
    mode = {"objective": "regression", "learning_rate": 0.9}, NUMBERS
    address = fresh_address()
    with holdfast.Run(address, quiet=True) as run:
        first = job(mode, run, rounds=60)
    for rounds in (60, 80):
        with holdfast.Run(address, quiet=True) as run:
            again = job(mode, run, rounds=rounds)
        assert again[0].partition("parameters:")[0] == first[0].partition("parameters:")[0]
        assert again[1:] == first[1:]
    address = fresh_address()
    with holdfast.Run(address, quiet=True) as run:
        job(PLAIN["regression"], run, rounds=6)
    with holdfast.Run(address, quiet=True) as run:
        longer = job(PLAIN["regression"], run, rounds=ROUNDS)
    assert longer == job(PLAIN["regression"], None, rounds=ROUNDS)


# -- rules --------------------------------------------------------------------------------


def test_what_is_kept_and_how_it_is_loaded() -> None:
    address = fresh_address()
    mode = PLAIN["regression"][0] | {"learning_rate": 0.9}, NUMBERS
    with holdfast.Run(address, every=3, keep="last=1 best=1:valid-l2", quiet=True) as run:
        end = job(mode, run, rounds=40)
    best = end[2]
    with holdfast.CheckpointManager(address) as manager:
        found = manager.best("valid-l2", "min")
    assert found is not None
    assert found.step == best
    assert steps_of(address) == sorted({best, len(end[4]["valid"]["l2"])})
    booster = holdfast.lightgbm.load_model(f"{address}@best:valid-l2:min")
    assert booster.current_iteration() == best
    assert np.asarray(booster.predict(X_VALID, raw_score=True)).tolist() == end[1]
    state = holdfast.open(address)["booster"]
    assert state["model"].tobytes().startswith(b"tree\n")


def test_an_evaluation_looks_at_the_booster_of_each_checkpoint() -> None:
    address = fresh_address()
    data = lightgbm.Dataset(X, NUMBERS[0])
    params = {"verbosity": -1, "num_threads": 1, "bagging_fraction": 0.7, "bagging_freq": 1}
    with holdfast.Run(address, every=2, keep=None, quiet=True) as run:
        booster = holdfast.lightgbm.train(params, data, 5, run=run)

        def spread(_: Any) -> float:
            return float(np.std(np.asarray(booster.predict(X_VALID))))

        before = booster.model_to_string()
        done = run.evaluate(spread)
        assert booster.model_to_string() == before
    found = {one.info.step: one.metrics["spread"] for one in done}
    assert list(found) == [2, 4, 5]
    for step, value in found.items():
        booster = holdfast.lightgbm.load_model(f"{address}@{step}")
        assert spread(None) == value


def test_by_the_clock() -> None:
    now = [0.0]

    def tick() -> None:
        now[0] += 1

    address = fresh_address()
    with holdfast.Run(address, every="10s", keep=None, quiet=True, clock=lambda: now[0]) as run:
        job(PLAIN["regression"], run, tick, rounds=ROUNDS)
    assert steps_of(address) == [5, 10, 12]


def test_a_request_to_stop_ends_it_after_the_round() -> None:
    address, places = fresh_address(), iter(range(100))

    def stop() -> None:
        if next(places) == 9:
            os.kill(os.getpid(), signal.SIGTERM)

    run = holdfast.Run(address, every=None, quiet=True)
    with pytest.raises(SystemExit) as ended:
        job(SAMPLED["rows"], run, stop)
    run.close()
    assert ended.value.code == 75
    assert steps_of(address) == [5]
    with holdfast.Run(address, quiet=True) as run:
        end = job(SAMPLED["rows"], run)
    with holdfast.Run(fresh_address(), quiet=True) as run:
        assert end == job(SAMPLED["rows"], run)


def test_folds_in_a_loop_of_the_run() -> None:
    def script(address: str, die: Any, trace: list[Any]) -> None:
        with holdfast.Run(address, every=1, quiet=True, late=["booster"]) as run:
            run.track(texts=(texts := []))
            for fold in run.range(3, name="folds"):
                mode = SAMPLED["rows"][0] | {"seed": fold}, NUMBERS
                texts.append(job(mode, run, die, rounds=4)[0])
            trace += texts

    kill_everywhere(script, only=lambda number: number in (3, 12, 19))


# -- estimators ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*eval_set.*")
@pytest.mark.filterwarnings("ignore:X does not have valid feature names")  # 4.6 itself
@pytest.mark.parametrize("kind", ["classifier", "regressor", "ranker"])
def test_estimators(kind: str) -> None:
    label, label_valid = {"classifier": CLASSES, "regressor": NUMBERS, "ranker": GRADES}[kind]
    make = getattr(lightgbm, f"LGBM{kind.capitalize()}")
    groups: dict[str, Any] = {}
    if kind == "ranker":
        groups = {"group": np.full(ROWS // 10, 10), "eval_group": [np.full(15, 10)] * 1}
    sampled = {"subsample": 0.7, "subsample_freq": 2, "colsample_bytree": 0.6}

    def script(address: str, die: Any, trace: list[Any]) -> None:
        with holdfast.Run(address, every=1, quiet=True) as run:
            parameters = {name: value for name, value in BASE.items() if name != "num_leaves"}
            estimator = make(n_estimators=ROUNDS, num_leaves=6, **sampled, **parameters)
            estimator.fit(
                X,
                label,
                eval_set=[(X_VALID, label_valid)],
                callbacks=[
                    At(die, before=True),
                    holdfast.lightgbm.Callback(run),
                    lightgbm.early_stopping(5, verbose=False),
                ],
                **groups,
            )
        trace += [
            estimator.booster_.model_to_string(),
            estimator.evals_result_,
            estimator.best_iteration_,
            estimator.predict(X_VALID).tolist(),
        ]

    kill_everywhere(script, only=lambda number: number in (2, 7))


def test_the_callback_in_lightgbms_own_train() -> None:
    def script(address: str, die: Any, trace: list[Any]) -> None:
        with holdfast.Run(address, every=2, quiet=True) as run:
            data = lightgbm.Dataset(X, NUMBERS[0], free_raw_data=False)
            callbacks = [At(die, before=True), holdfast.lightgbm.Callback(run)]
            booster = lightgbm.train(BASE, data, ROUNDS, callbacks=callbacks)
            trace += [booster.model_to_string(), booster.num_trees()]

    kill_everywhere(script, only=lambda number: number in (1, 6, 11))


# -- wrong use ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "word"),
    [
        ({"boosting": "dart"}, "dart"),
        ({"use_quantized_grad": True}, "stochastic_rounding"),
        ({"cegb_penalty_split": 0.1}, "cegb"),
        (
            {"boosting": "rf", "bagging_fraction": 0.5, "bagging_freq": 1},
            "own training data",
        ),
    ],
)
def test_what_cannot_be_resumed_is_refused_at_once(parameters: Any, word: str) -> None:
    data = lightgbm.Dataset(X, NUMBERS[0])
    with holdfast.Run(fresh_address(), quiet=True) as run:
        with pytest.raises(UsageError) as refused:
            holdfast.lightgbm.train({**BASE, **parameters}, data, 3, run=run, valid_sets=[data])
        run.close()
    assert word in str(refused.value)


def test_a_booster_of_goss_that_is_kept() -> None:
    with holdfast.Run(fresh_address(), quiet=True) as run:
        with pytest.raises(UsageError, match="keep_training_booster"):
            job(SAMPLED["goss"], run, keep_training_booster=True)
        run.close()


@pytest.mark.parametrize("killed", [False, True])
def test_a_booster_that_is_kept_can_be_trained_on(killed: bool) -> None:
    def trained(run: holdfast.Run | None, die: Callable[[], None] = lambda: None) -> str:
        data = lightgbm.Dataset(X, NUMBERS[0])
        options: Any = {"keep_training_booster": True, "callbacks": [At(die, before=True)]}
        if run is None:
            booster = lightgbm.train(BASE, data, ROUNDS, **options)
        else:
            booster = holdfast.lightgbm.train(BASE, data, ROUNDS, run=run, **options)
        booster.update()
        return booster.model_to_string()

    address, places = fresh_address(), iter(range(100))

    def die() -> None:
        if killed and next(places) == 7:
            raise Killed

    try:
        with holdfast.Run(address, every=1, quiet=True) as run:
            first = trained(run, die)
    except Killed:
        with holdfast.Run(copied(address), every=1, quiet=True) as run:
            first = trained(run)
    assert first == trained(None)
    with holdfast.Run(copied(address), quiet=True) as run:
        assert trained(run) == first


def test_cv_is_refused() -> None:
    data = lightgbm.Dataset(X, NUMBERS[0])
    with holdfast.Run(fresh_address(), quiet=True) as run:
        with pytest.raises(UsageError, match="fold after fold"):
            callbacks = [holdfast.lightgbm.Callback(run)]
            lightgbm.cv(BASE, data, 3, nfold=2, stratified=False, callbacks=callbacks)
        run.close()


def test_rows_that_are_gone_are_missed_at_the_start() -> None:
    with holdfast.Run(fresh_address(), quiet=True) as run:
        data = lightgbm.Dataset(X, NUMBERS[0])
        with pytest.raises(UsageError, match="free_raw_data=False"):
            lightgbm.train(BASE, data, 3, callbacks=[holdfast.lightgbm.Callback(run)])
        run.close()


def test_train_frees_the_rows_as_lightgbm_does() -> None:
    data, kept = lightgbm.Dataset(X, NUMBERS[0]), lightgbm.Dataset(X, NUMBERS[0])
    kept.free_raw_data = False
    with holdfast.Run(fresh_address(), quiet=True) as run:
        holdfast.lightgbm.train(BASE, data, 2, run=run)
        holdfast.lightgbm.train(BASE, kept, 2, run=run, name="other")
    assert data.data is None
    assert data.free_raw_data
    assert kept.data is X


def test_another_objective_is_refused() -> None:
    address = fresh_address()
    for changed in ({}, {"objective": "huber"}, {"objective": "multiclass", "num_class": 3}):
        with holdfast.Run(address, every=1, quiet=True) as run:
            train = lightgbm.Dataset(X, CLASSES[0])
            params = {"verbosity": -1, **changed}
            if not changed:
                holdfast.lightgbm.train(params, train, 2, run=run)
                continue
            with pytest.raises(StateError, match="are for regression"):
                holdfast.lightgbm.train(params, train, 3, run=run)


def test_a_name_is_for_one_training() -> None:
    with holdfast.Run(fresh_address(), quiet=True) as run:
        callback = holdfast.lightgbm.Callback(run)
        data = lightgbm.Dataset(X, NUMBERS[0], free_raw_data=False)
        lightgbm.train(BASE, data, 2, callbacks=[callback])
        with pytest.raises(UsageError, match="a name"):
            lightgbm.train(BASE, data, 2, callbacks=[callback])
        run.close()


def test_without_lightgbm_the_hint_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("holdfast.lightgbm")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(HoldfastError) as missing:
        importlib.import_module("holdfast.lightgbm")
    assert "pip install 'holdfast[lightgbm]'" in str(missing.value)


# -- a process of its own -----------------------------------------------------------------

PROGRAM = """
import os, signal, sys, time
import holdfast, holdfast.lightgbm, lightgbm
from tests.frameworks import test_lightgbm as t

def die():
    if len(sys.argv) > 2 and run.step == int(sys.argv[2]):
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)

run = holdfast.Run(sys.argv[1], every=1, quiet=True)
with run:
    end = t.job(t.SAMPLED["rows for three rounds"], run, die)
print(end[0], end[2:])
"""


@pytest.mark.slow
def test_a_process_that_is_killed(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]

    def start(run: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path / run), *arguments],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    whole = start("whole")
    assert whole.returncode == 0, whole.stderr
    assert start("killed", "4").returncode == -signal.SIGKILL
    assert start("killed", "9").returncode == -signal.SIGKILL
    again = start("killed")
    assert again.returncode == 0, again.stderr
    assert again.stdout == whole.stdout


@pytest.mark.slow
def test_the_example(tmp_path: Path) -> None:
    example = Example("lightgbm_digits.py", "--rounds", "30", "--every", "1")
    whole = last_line(example.finish(tmp_path / "whole", tmp_path))
    assert example.kill_after(tmp_path / "killed", tmp_path, 8, 0.01)
    again = example.finish(tmp_path / "killed", tmp_path)
    assert "resumed" in again
    assert last_line(again) == whole
