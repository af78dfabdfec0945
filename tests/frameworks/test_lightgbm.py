"""LightGBM: killed anywhere and started again, a training ends as if it was left alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import lightgbm
import numpy as np
import pytest

import holdfast
import holdfast.lightgbm
from holdfast.errors import UsageError
from tests.support.jobs import fresh_address, kill_everywhere

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
