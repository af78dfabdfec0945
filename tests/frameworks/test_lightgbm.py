"""LightGBM: killed anywhere and started again, a training ends as if it was left alone."""

from __future__ import annotations

import importlib
import os
import re
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
from holdfast.errors import HoldfastError, UsageError
from tests.examples.test_examples import Example, last_line
from tests.support.jobs import Killed, copied, fresh_address, kill_everywhere, steps_of

ROWS, ROUNDS = 400, 12
BASE = {
    "verbosity": -1,
    "num_threads": 1,
    "deterministic": True,
    "force_row_wise": True,
    "num_leaves": 6,
    "seed": 7,
}

_rng = np.random.default_rng(0)


def _rows(n: int, categories: int) -> np.ndarray:
    rows = _rng.standard_normal((n, 8))
    rows[:, 3] = _rng.integers(0, categories, n)
    rows[:, 4] = np.where(_rng.random(n) < 0.2, np.nan, rows[:, 4])
    return rows


X, X_VALID = _rows(ROWS, 9), _rows(150, 12)  # with missing values and unseen categories
_TRUTH = [
    x[:, 0] + np.sin(3 * x[:, 1]) * (x[:, 3] % 3) + np.nan_to_num(x[:, 4]) for x in (X, X_VALID)
]
NUMBERS = [truth + _rng.standard_normal(len(truth)) * 0.3 for truth in _TRUTH]
SIGNS = [(truth > 0).astype(float) for truth in _TRUTH]
CLASSES = [np.digitize(truth, [-1, 1]) for truth in _TRUTH]
GRADES = [np.clip(truth + 2, 0, 4).astype(int) for truth in _TRUTH]


def squares(scores: Any, data: lightgbm.Dataset) -> tuple[Any, Any]:
    return scores - np.asarray(data.get_label()), np.ones_like(scores) * 1.5


def mean_error(scores: Any, data: lightgbm.Dataset) -> tuple[str, float, bool]:
    return "error", float(np.abs(scores - np.asarray(data.get_label())).mean()), False


# Name: parameters, labels.
PLAIN = {
    "regression": ({"objective": "regression"}, NUMBERS),
    "l1": ({"objective": "l1", "lambda_l1": 0.1, "path_smooth": 1.0}, NUMBERS),
    "categories": (
        {"objective": "binary", "min_data_per_group": 5, "cat_smooth": 1},
        SIGNS,
    ),
    "multiclass": ({"objective": "multiclass", "num_class": 3}, CLASSES),
    "own objective": ({"objective": squares, "metric": "l2"}, NUMBERS),
    "ranking": ({"objective": "lambdarank"}, GRADES),
    "quantized": (
        {"objective": "regression", "use_quantized_grad": True, "stochastic_rounding": False},
        NUMBERS,
    ),
}
SAMPLED = {
    "rows": ({"objective": "regression", "bagging_fraction": 0.7, "bagging_freq": 1}, NUMBERS),
    "rows for three rounds": (
        {
            "objective": "binary",
            "bagging_fraction": 0.4,
            "bagging_freq": 3,
            "feature_fraction": 0.6,
        },
        SIGNS,
    ),
    "rows of each sign": (
        {
            "objective": "binary",
            "pos_bagging_fraction": 0.5,
            "neg_bagging_fraction": 0.8,
            "subsample_freq": 2,
        },
        SIGNS,
    ),
    "columns": (
        {"objective": squares, "metric": "l2", "colsample_bytree": 0.5, "boost": "gbdt"},
        NUMBERS,
    ),
    "columns of nodes": (
        {"objective": "multiclass", "num_class": 3, "feature_fraction_bynode": 0.5},
        CLASSES,
    ),
    "thresholds": ({"objective": "huber", "extra_trees": True}, NUMBERS),
    "goss": ({"objective": "binary", "boosting": "goss", "learning_rate": 0.2}, SIGNS),
    "goss, own objective": (
        {"objective": squares, "metric": "l2", "boosting": "goss", "learning_rate": 0.3},
        NUMBERS,
    ),
    "forest": (
        {
            "objective": "binary",
            "boosting": "rf",
            "bagging_fraction": 0.6,
            "bagging_freq": 1,
            "feature_fraction": 0.7,
        },
        SIGNS,
    ),
    "ranking": ({"objective": "rank_xendcg"}, GRADES),
}


def datasets(mode: tuple[dict[str, Any], list[Any]]) -> tuple[lightgbm.Dataset, lightgbm.Dataset]:
    parameters, (label, label_valid) = mode
    groups: list[Any] = [None, None]
    if "rank" in str(parameters["objective"]):
        groups = [np.full(len(one) // 10, 10) for one in (X, X_VALID)]
    columns: Any = [3] if "cat_smooth" in parameters else "auto"
    data = lightgbm.Dataset(X, label, group=groups[0], categorical_feature=columns)
    return data, lightgbm.Dataset(X_VALID, label_valid, reference=data, group=groups[1])


class At:
    """Calls `die` before and after rounds, among LightGBM's own callbacks."""

    def __init__(self, die: Callable[[], None], *, before: bool) -> None:
        self.before_iteration = before
        self.order = 25  # before early stopping
        self._die = die

    def __call__(self, env: Any) -> None:
        self._die()


def job(
    mode: tuple[dict[str, Any], list[Any]],
    run: holdfast.Run | None,
    die: Callable[[], None] = lambda: None,
    rounds: int = ROUNDS,
    callbacks: tuple[Any, ...] = (),
    stopping: int = 4,
    **options: Any,
) -> list[Any]:
    """All that is known after a training of `mode`, by bare LightGBM if there is no run."""
    data, valid = datasets(mode)
    parameters = {**BASE, **mode[0]}
    history: dict[str, Any] = {}
    forest = parameters.get("boosting") == "rf"
    stop = lightgbm.early_stopping(stopping, verbose=False)
    options = {
        "valid_sets": [valid] if forest else [valid, data],
        "valid_names": ["valid"] if forest else ["valid", "training"],
        **options,
        "callbacks": [
            At(die, before=False),
            stop,
            At(die, before=True),
            lightgbm.record_evaluation(history),
            *callbacks,
        ],
    }
    if run is None:
        booster = lightgbm.train(parameters, data, rounds, **options)
    else:
        booster = holdfast.lightgbm.train(parameters, data, rounds, run=run, **options)
    return [
        booster.model_to_string(num_iteration=-1),
        np.asarray(booster.predict(X_VALID, raw_score=True)).tolist(),
        booster.best_iteration,
        {data: dict(scores) for data, scores in booster.best_score.items()},
        {data: dict(scores) for data, scores in history.items()},
        stop.best_iter,
    ]


def killed_in_places(mode: Any, places: tuple[int, ...], **options: Any) -> list[Any]:
    """What a training ends with, which was killed in each of `places` (two of each round)."""
    ends: list[Any] = []

    def script(address: str, die: Any, trace: list[Any]) -> None:
        with holdfast.Run(address, every=1, quiet=True) as run:
            trace += job(mode, run, die, **options)
        ends.append(trace)

    kill_everywhere(script, only=lambda number: number in places)
    assert len(ends) > len(places) // 2
    return ends[0]


def settings(text: str) -> str:
    return text.partition("\nparameters:\n")[2]


@pytest.mark.parametrize("mode", PLAIN)
def test_where_nothing_is_sampled_it_is_what_bare_lightgbm_gives(mode: str) -> None:
    assert killed_in_places(PLAIN[mode], (2, 9, 16)) == job(PLAIN[mode], None)


@pytest.mark.parametrize("mode", SAMPLED)
def test_sampled_it_ends_as_uninterrupted(mode: str) -> None:
    end, bare = killed_in_places(SAMPLED[mode], (2, 9, 14, 23)), job(SAMPLED[mode], None)
    assert end[0] != bare[0]
    assert settings(end[0]) == settings(bare[0])
    assert len(end[1]) == len(bare[1])


def test_each_round_draws_other_rows_and_columns() -> None:
    mode = {"objective": "regression", "bagging_fraction": 0.5, "bagging_freq": 3}, NUMBERS
    with holdfast.Run(fresh_address(), quiet=True) as run:
        text = job(mode, run, stopping=100)[0]
    roots = re.findall(r"^internal_count=(\d+)", text, re.MULTILINE)
    assert all(len(set(roots[start : start + 3])) == 1 for start in range(0, ROUNDS, 3))
    assert len(set(roots)) == ROUNDS // 3
    mode = {"objective": "regression", "feature_fraction": 0.3}, NUMBERS
    with holdfast.Run(fresh_address(), quiet=True) as run:
        text = job(mode, run, stopping=100)[0]
    columns = [set(one.split()) for one in re.findall(r"split_feature=(.*)", text)]
    assert all(len(one) <= 2 for one in columns)
    assert len(set.union(*columns)) > 5


def test_float32_rows_with_linear_trees() -> None:
    global X, X_VALID
    wide = X, X_VALID
    try:
        X, X_VALID = (np.nan_to_num(one.astype(np.float32)) for one in wide)
        mode = {"objective": "regression", "linear_tree": True}, NUMBERS
        assert killed_in_places(mode, (2, 9, 16)) == job(mode, None)
    finally:
        X, X_VALID = wide


def test_scores_to_begin_with() -> None:
    def script(run: holdfast.Run | None, die: Callable[[], None] = lambda: None) -> list[Any]:
        data, valid = datasets(PLAIN["regression"])
        data.set_init_score(np.linspace(-1, 1, ROWS))
        valid.set_init_score(np.linspace(-1, 1, len(X_VALID)))
        history: dict[str, Any] = {}
        options: dict[str, Any] = {
            "valid_sets": [valid],
            "callbacks": [lightgbm.record_evaluation(history), At(die, before=True)],
        }
        if run is not None:
            booster = holdfast.lightgbm.train(BASE, data, ROUNDS, run=run, **options)
        else:
            booster = lightgbm.train(BASE, data, ROUNDS, **options)
        assert np.array_equal(np.asarray(data.get_init_score()), np.linspace(-1, 1, ROWS))
        return [booster.model_to_string(), history]

    ends: list[Any] = []

    def resumable(address: str, die: Any, trace: list[Any]) -> None:
        with holdfast.Run(address, every=1, quiet=True) as run:
            trace += script(run, die)
        ends.append(trace)

    kill_everywhere(resumable, only=lambda number: number in (1, 6))
    assert ends[0] == script(None)


@pytest.mark.parametrize("mode", [PLAIN["multiclass"], SAMPLED["goss"]], ids=["gbdt", "goss"])
def test_a_model_to_begin_with(mode: Any) -> None:
    parameters = {**BASE, **mode[0], "verbosity": -1}
    first = lightgbm.train(parameters, datasets(mode)[0], 6)
    end = killed_in_places(mode, (3, 14, 20), init_model=first)
    if mode is PLAIN["multiclass"]:
        assert end == job(mode, None, init_model=first)
    assert end[0].startswith(first.model_to_string()[:30])
    rounds = len(end[4]["valid"][next(iter(end[4]["valid"]))])
    assert end[0].count("\nTree=") == (6 + rounds) * parameters.get("num_class", 1)


def test_early_stopping_goes_on_with_its_patience() -> None:
    mode = {"objective": "regression", "learning_rate": 0.9}, NUMBERS
    bare = job(mode, None, rounds=60)
    rounds = len(bare[4]["valid"]["l2"])
    best = bare[2]
    assert 0 < best == rounds - 4 < 56
    places = tuple(2 * number for number in range(best, rounds))  # in its patience, all of it
    assert killed_in_places(mode, places, rounds=60) == bare


@pytest.mark.parametrize("kind", ["function", "list"])
def test_schedules(kind: str) -> None:
    rates = [0.3 * 0.8 ** (number // 4) for number in range(ROUNDS)]
    schedule: Any = rates if kind == "list" else rates.__getitem__

    def callbacks() -> tuple[Any, ...]:
        return (lightgbm.reset_parameter(learning_rate=schedule),)

    mode = PLAIN["regression"]
    assert killed_in_places(mode, (3, 8, 16, 21), callbacks=callbacks()) == job(
        mode, None, callbacks=callbacks()
    )
    goss = {"objective": "regression", "boosting": "goss", "learning_rate": 0.3}, NUMBERS
    killed_in_places(goss, (8, 16, 21), callbacks=callbacks())
    fast = lightgbm.reset_parameter(learning_rate=[0.3] * 6 + [0.01] * 6)
    with holdfast.Run(fresh_address(), quiet=True) as run:
        with pytest.raises(UsageError, match="fallen"):
            job(goss, run, callbacks=(fast,))
        run.close()
    rows = {"objective": "regression", "bagging_fraction": 0.6, "bagging_freq": 4}, NUMBERS
    killed_in_places(rows, (8, 11, 16, 21), callbacks=callbacks())


class Falling:
    """A rate that falls when the error does not, as a user would write it."""

    order = 5

    def __init__(self) -> None:
        self.best, self.rate = float("inf"), 0.5

    def __call__(self, env: Any) -> None:
        value = env.evaluation_result_list[0][2]
        if value > self.best * 0.9:
            self.rate *= 0.7
            env.model.reset_parameter({"learning_rate": self.rate})
        self.best = min(value, self.best)

    def state_dict(self) -> dict[str, float]:
        return {"best": self.best, "rate": self.rate}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.best, self.rate = state["best"], state["rate"]


def test_callbacks_with_a_state_and_own_metrics() -> None:
    mode = PLAIN["regression"][0] | {"learning_rate": 0.5}, NUMBERS
    bare = job(mode, None, callbacks=(Falling(),), feval=mean_error)
    ends: list[Any] = []

    def script(address: str, die: Any, trace: list[Any]) -> None:
        falling = Falling()
        with holdfast.Run(address, every=1, quiet=True) as run:
            trace += job(mode, run, die, callbacks=(falling,), feval=mean_error)
        trace.append(falling.rate)
        ends.append(trace)

    kill_everywhere(script, only=lambda number: number in (3, 9, 16, 22))
    assert ends[0][:-1] == bare
    assert ends[0][-1] < 0.5


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
