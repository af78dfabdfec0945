"""Boosting that is killed at any place and started again ends as if it had been left alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pytest
import xgboost
from xgboost.callback import EarlyStopping, LearningRateScheduler, TrainingCallback

import holdfast
import holdfast.lightgbm
import holdfast.xgboost
from holdfast.errors import StateError, UnsupportedValue, UsageError
from tests.support.interrupted import check_stopped_and_killed
from tests.support.jobs import copied, fresh_address, steps_of

_chance = np.random.default_rng(1)
X = _chance.normal(size=(400, 8)).astype("f4")
Y = (X[:, 0] * X[:, 1] + 0.3 * _chance.normal(size=400) > 0).astype(int)
ROUNDS = 8


def data() -> dict[str, Any]:
    train, valid = xgboost.DMatrix(X[:300], Y[:300]), xgboost.DMatrix(X[300:], Y[300:])
    return {"dtrain": train, "evals": [(train, "train"), (valid, "valid")]}


class Leaving(TrainingCallback):
    """Copies the run at each place: what a process that is killed there leaves behind."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self.address = address
        self.left: list[str] = []

    def copy(self) -> None:
        self.left.append(copied(self.address))

    def before_training(self, model: Any) -> Any:
        self.copy()
        return model

    def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        self.copy()
        return False

    def after_training(self, model: Any) -> Any:
        self.copy()
        return model


class Counting(TrainingCallback):
    """A user's own, with a state, and one that hears the numbers of the rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []
        self.begun = 0

    def before_training(self, model: Any) -> Any:
        self.begun += 1
        self.seen = []
        return model

    def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        self.seen.append(epoch)
        return False

    def state_dict(self) -> dict[str, Any]:
        return {"seen": list(self.seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = list(state["seen"])


Training = Callable[..., Any]


def train(address: str, *others: TrainingCallback, rounds: int = ROUNDS, **params: Any) -> Any:
    """The booster's bytes, predictions and attributes, the history, the run's step and metrics."""
    options = {key: params.pop(key) for key in ("early_stopping_rounds",) if key in params}
    schedule = params.pop("schedule", None)
    mine = [*others, *([LearningRateScheduler(schedule)] if schedule else ())]
    counting, history = Counting(), dict[str, Any]()
    with holdfast.Run(address, every=1, quiet=True) as run:
        booster = holdfast.xgboost.train(
            {"objective": "binary:logistic", "nthread": 1, **params},
            num_boost_round=rounds,
            run=run,
            **data(),
            callbacks=[*mine, counting],
            evals_result=history,
            verbose_eval=False,
            **options,
        )
    assert counting.begun == 1
    # XGBoost asks no more callbacks behind one that ends the training: its last round goes unheard.
    assert counting.seen == sorted(set(counting.seen))
    assert len(set(range(run.step)) - set(counting.seen)) <= 1
    predicted = booster.predict(xgboost.DMatrix(X)).tobytes()
    raw = bytes(booster.save_raw("ubj"))
    return raw, predicted, booster.attributes(), history, run.step, run.metrics


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"tree_method": "exact", "colsample_bylevel": 0.5},
        {"tree_method": "approx", "subsample": 0.5},
        {"subsample": 0.5, "colsample_bytree": 0.5, "gamma": 0.1},
        {"booster": "dart", "rate_drop": 0.4, "skip_drop": 0.2},
        {"num_parallel_tree": 3, "colsample_bynode": 0.5, "subsample": 0.7},
        {"booster": "gblinear"},
        {"schedule": lambda number: 0.5 / (number + 1)},
        {"eta": 1.0, "early_stopping_rounds": 3, "rounds": 100},
        {"objective": "rank:pairwise", "lambdarank_pair_method": "mean"},
    ],
    ids=lambda params: "-".join(map(str, params)) or "hist",
)
def test_killed_anywhere(params: dict[str, Any]) -> None:
    address = fresh_address()
    leaving = Leaving(address)
    whole = train(address, leaving, **params)
    assert len(leaving.left) >= 5
    for place, left in enumerate(leaving.left):
        assert train(left, **params) == whole, f"killed at place {place}"
    assert train(address, **params) == whole, "it had come to its end"


@pytest.mark.parametrize("params", [{}, {"tree_method": "exact"}, {"booster": "gblinear"}])
def test_where_nothing_is_drawn_nothing_is_changed(params: dict[str, Any]) -> None:
    bare = xgboost.train(
        {"objective": "binary:logistic", "nthread": 1, **params},
        num_boost_round=ROUNDS,
        **data(),
        verbose_eval=False,
    )
    assert train(fresh_address(), **params)[0] == bare.save_raw("ubj")


def test_what_is_drawn_differs_from_round_to_round() -> None:
    """Not the same columns again and again, though each round is seeded."""
    address = fresh_address()
    train(address, colsample_bytree=0.2, max_depth=1, rounds=12)
    trees = holdfast.xgboost.load_model(address).get_dump()
    assert len({re.search(r"\[(f\d)<", tree)[1] for tree in trees}) >= 4  # type: ignore[index]


def test_more_rounds_follow_also_behind_an_early_end() -> None:
    address = fresh_address()
    assert train(address, rounds=4)[4] == 4
    assert train(address, rounds=9) == train(fresh_address(), rounds=9)
    address = fresh_address()
    early = train(address, eta=1.0, early_stopping_rounds=2, rounds=50)
    assert early[4] < 50
    assert train(address, eta=1.0, early_stopping_rounds=20, rounds=51)[4] > early[4]


def test_the_best_one_is_kept_and_can_be_loaded(tmp_path: Path) -> None:
    address = str(tmp_path / "run")
    keep = "last=1 best=1:valid-logloss"
    with holdfast.Run(address, every=1, keep=keep, quiet=True) as run:
        booster = holdfast.xgboost.train(
            {"objective": "binary:logistic", "eta": 1.5},
            num_boost_round=20,
            run=run,
            **data(),
            callbacks=[EarlyStopping(rounds=20, save_best=True, data_name="valid")],
            verbose_eval=False,
        )
    best = holdfast.xgboost.load_model(f"{address}@best")
    assert best.num_boosted_rounds() == booster.best_iteration + 1 < 20
    assert best.get_dump() == booster.get_dump()
    assert steps_of(address) == [booster.best_iteration + 1, 20]
    with pytest.raises(StateError, match="no booster of XGBoost's named 'other'") as caught:
        holdfast.xgboost.load_model(address, "other")
    assert "booster" in caught.value.hint
    with pytest.raises(StateError, match="no booster of LightGBM's named 'booster'"):
        holdfast.lightgbm.load_model(address)


def test_an_evaluation_looks_at_the_booster_of_each_checkpoint() -> None:
    address, valid = fresh_address(), xgboost.DMatrix(X[300:], Y[300:])

    def loss(booster: xgboost.Booster) -> float:
        return float(booster.eval(valid).rpartition(":")[2])

    class Looking(TrainingCallback):
        def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
            if epoch == 4:  # in the middle, too
                run.evaluate(lambda _: loss(model), metric="then")
            return False

    with holdfast.Run(address, every=2, keep=None, quiet=True) as run:
        model = xgboost.XGBClassifier(
            n_estimators=7, subsample=0.7, callbacks=[holdfast.xgboost.Callback(run), Looking()]
        )
        model.fit(X[:300], Y[:300])
        booster = model.get_booster()
        before = booster.save_raw("ubj"), booster.save_config()
        done = run.evaluate(lambda _: loss(booster), metric="now")
        assert (booster.save_raw("ubj"), booster.save_config()) == before
    with holdfast.Run(address, keep=None, quiet=True) as run:
        holdfast.xgboost.Callback(run)
        with pytest.raises(UsageError, match="a training that has not begun"):
            run.evaluate(lambda _: loss(booster), metric="early")
    rounds = [one.info.step for one in done]
    assert rounds == [2, 4, 6, 7]
    wanted = [loss(holdfast.xgboost.load_model(f"{address}@{number}")) for number in rounds]
    assert [one.metrics["now"] for one in done] == wanted
    assert [one.info.metrics["then"] for one in done[:2]] == wanted[:2]

    plain = xgboost.XGBClassifier(n_estimators=7, subsample=0.7)
    with holdfast.Run(fresh_address(), quiet=True) as run:
        plain.set_params(callbacks=[holdfast.xgboost.Callback(run)]).fit(X[:300], Y[:300])
    assert plain.get_booster().save_raw("ubj") == before[0]


def test_a_booster_that_no_checkpoint_can_be_put_into() -> None:
    with holdfast.Run(fresh_address(), every=2, keep=None, quiet=True) as run:
        stopping = EarlyStopping(rounds=9, save_best=True)
        booster = holdfast.xgboost.train(
            {}, num_boost_round=3, run=run, **data(), callbacks=[stopping]
        )
        with pytest.raises(UsageError, match="save_best") as caught:
            run.evaluate(lambda _: booster.num_boosted_rounds())
    assert "holdfast.xgboost.load_model(c.info.ref)" in caught.value.hint


def test_what_was_imported_can_be_loaded(tmp_path: Path) -> None:
    made = xgboost.train({}, xgboost.DMatrix(X, Y), 2)
    other = lightgbm.train({"verbosity": -1}, lightgbm.Dataset(X, Y), 2)
    made.save_model(tmp_path / "x.ubj")
    other.save_model(tmp_path / "y.txt")
    for file in ("x.ubj", "y.txt"):
        holdfast.import_checkpoint(tmp_path / file, tmp_path / file[0])
    loaded = holdfast.xgboost.load_model(str(tmp_path / "x"), "model")
    assert loaded.save_raw("ubj") == made.save_raw("ubj")
    text = holdfast.lightgbm.load_model(str(tmp_path / "y"), "model").model_to_string()
    assert text == lightgbm.Booster(model_str=other.model_to_string()).model_to_string()


class Ticking(TrainingCallback):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        self.now += 2
        return False


def test_by_the_clock() -> None:
    address, clock = fresh_address(), Ticking()
    with holdfast.Run(address, every="10s", keep=None, quiet=True, clock=lambda: clock.now) as run:
        holdfast.xgboost.train({}, data()["dtrain"], 12, run=run, callbacks=[clock])
    assert steps_of(address) == [5, 10, 12]


@pytest.mark.parametrize("place", [0, 3, 7, 12, 16])
def test_an_estimator_over_folds(place: int) -> None:
    def folds(address: str) -> Any:
        with holdfast.Run(address, every=1, quiet=True) as run:
            callback = holdfast.xgboost.Callback(run)
            leaving = Leaving(address)
            found = run.box(scores=[])
            for fold in run.range(3):
                chosen = np.arange(400) % 3 != fold
                model = xgboost.XGBClassifier(
                    n_estimators=4, subsample=0.5, callbacks=[callback, leaving]
                )
                model.fit(X[chosen], Y[chosen], eval_set=[(X, Y)], verbose=False)
                found.scores.append([*model.predict_proba(X)[:, 1], model.evals_result()])
        return found.scores, run.step, leaving.left

    scores, steps, left = folds(fresh_address())
    assert folds(left[place])[:2] == (scores, steps)


def test_two_trainings_in_a_row_have_names() -> None:
    def both(address: str) -> Any:
        leaving = Leaving(address)
        with holdfast.Run(address, every=1, late=["second"], quiet=True) as run:
            options: Any = {"num_boost_round": 3, "callbacks": [leaving], "verbose_eval": False}
            first = holdfast.xgboost.train({}, run=run, **data(), **options)
            second = holdfast.xgboost.train(
                {"eta": 0.1}, run=run, name="second", **data(), **options
            )
        return [bytes(one.save_raw("ubj")) for one in (first, second)], leaving.left

    whole, left = both(fresh_address())
    for place, where in enumerate(left):
        assert both(where)[0] == whole, place


@pytest.mark.parametrize("again", [True, False])
def test_a_name_is_used_once(again: bool) -> None:
    address = fresh_address()
    if again:
        with holdfast.Run(address, quiet=True) as run:
            holdfast.xgboost.train({}, **data(), num_boost_round=2, run=run, verbose_eval=False)
    with holdfast.Run(address, quiet=True) as run:
        holdfast.xgboost.train({}, **data(), num_boost_round=2, run=run, verbose_eval=False)
        with pytest.raises(UsageError, match="had a training named 'booster'"):
            holdfast.xgboost.train({}, **data(), num_boost_round=2, run=run)


def test_so_it_is_with_lightgbm() -> None:
    with holdfast.Run(fresh_address(), quiet=True) as run:
        holdfast.lightgbm.train({"verbosity": -1}, lightgbm.Dataset(X, Y), 2, run=run)
        with pytest.raises(UsageError, match="had a training named 'booster'"):
            holdfast.lightgbm.train({"verbosity": -1}, lightgbm.Dataset(X, Y), 2, run=run)


def test_one_callback_is_enough() -> None:
    with holdfast.Run(fresh_address(), quiet=True) as run:
        first, second = (holdfast.xgboost.Callback(run, name=name) for name in "ab")
        with pytest.raises(UsageError, match="two of Holdfast's callbacks"):
            xgboost.train({}, data()["dtrain"], 2, callbacks=[first, second])
    with holdfast.Run(fresh_address(), quiet=True) as run:
        both: Any = [holdfast.lightgbm.Callback(run, name=name) for name in "ab"]
        rows = lightgbm.Dataset(X, Y, free_raw_data=False)
        with pytest.raises(UsageError, match="two of Holdfast's callbacks"):
            lightgbm.train({"verbosity": -1}, rows, 2, callbacks=both)


def test_it_goes_on_from_a_model_that_is_given() -> None:
    def go(address: str) -> Any:
        leaving = Leaving(address)
        with holdfast.Run(address, every=1, quiet=True) as run:
            booster = holdfast.xgboost.train(
                {"subsample": 0.5},
                num_boost_round=4,
                run=run,
                **data(),
                xgb_model=given,
                callbacks=[leaving],
                verbose_eval=False,
            )
        return bytes(booster.save_raw("ubj")), booster.num_boosted_rounds(), leaving.left

    given = xgboost.train({}, data()["dtrain"], 3)
    *whole, left = go(fresh_address())
    assert whole[1] == 7
    for where in left:
        assert list(go(where)[:2]) == whole


def test_only_new_trees_are_written_again(tmp_path: Path) -> None:
    """In parts of 8 MiB: here of 64 KiB."""
    address = str(tmp_path / "run")
    deep = {"num_parallel_tree": 20, "subsample": 0.9, "nthread": 1}
    with holdfast.Run(
        address, every=1, keep=None, quiet=True, sparse_rows=["booster/model/trees"]
    ) as run:
        holdfast.xgboost.train(deep, data()["dtrain"], 16, run=run)
    with holdfast.CheckpointManager(address) as manager:
        sizes = [(info.nbytes, info.new_bytes) for info in manager.checkpoints()]
    whole, new = sizes[-1]
    assert whole > 400_000
    assert new < whole / 5


def test_what_cannot_be_resumed_is_refused() -> None:
    with holdfast.Run(fresh_address(), quiet=True) as run:
        callback = holdfast.xgboost.Callback(run)
        with pytest.raises(UsageError, match=r"xgboost\.cv trains a booster of each fold"):
            xgboost.cv({}, data()["dtrain"], 3, callbacks=[callback])
    tracked = xgboost.XGBClassifier(n_estimators=1).fit(X, Y)
    for model in (tracked, tracked.get_booster()):
        with holdfast.CheckpointManager(fresh_address()) as manager:
            with pytest.raises(UnsupportedValue) as caught:
                manager.save(1, {"model": model})
            assert "holdfast.xgboost.Callback(run)" in caught.value.hint
    with pytest.raises(UsageError, match="needs a Run, not 'runs/boost'"):
        holdfast.xgboost.train({}, **data(), run="runs/boost")  # type: ignore[arg-type]
    made = xgboost.train({}, data()["dtrain"], 2)
    again = {"process_type": "update", "updater": "refresh"}
    with (
        holdfast.Run(fresh_address(), quiet=True) as run,
        pytest.raises(UsageError, match="process_type"),
    ):
        holdfast.xgboost.train(again, **data(), num_boost_round=2, run=run, xgb_model=made)


@pytest.mark.parametrize("changed", [{"booster": "gblinear"}, {"objective": "reg:squarederror"}])
def test_another_kind_of_booster_is_refused(changed: dict[str, Any]) -> None:
    address = fresh_address()
    train(address, rounds=2)
    with pytest.raises(StateError, match=f"{next(iter(changed))} was .*, is "):
        train(address, rounds=4, **changed)
    assert train(address, rounds=4)[4] == 4


def test_a_run_of_another_library_is_refused() -> None:
    address = fresh_address()
    with holdfast.Run(address, quiet=True) as run:
        rows = lightgbm.Dataset(X, Y)
        holdfast.lightgbm.train({"verbosity": -1}, rows, 2, run=run)
    with (
        holdfast.Run(address, quiet=True) as run,
        pytest.raises(StateError, match="by another library than XGBoost"),
    ):
        holdfast.xgboost.train({}, data()["dtrain"], 2, run=run)
    address = fresh_address()
    with holdfast.Run(address, quiet=True) as run:
        holdfast.xgboost.train({}, data()["dtrain"], 2, run=run)
    with (
        holdfast.Run(address, quiet=True) as run,
        pytest.raises(StateError, match="by another library than LightGBM"),
    ):
        holdfast.lightgbm.train({"verbosity": -1}, lightgbm.Dataset(X, Y), 2, run=run)


PROGRAM = """
import sys, os, signal, time
import numpy as np, xgboost, holdfast, holdfast.xgboost

class Telling(xgboost.callback.TrainingCallback):
    def after_iteration(self, model, epoch, evals_log):
        print(epoch, flush=True)
        time.sleep(0.05)
        return False

X = np.random.default_rng(1).normal(size=(400, 8)); y = X[:, 0] * X[:, 1]
with holdfast.Run(sys.argv[1], every=5, quiet=True) as run:
    booster = holdfast.xgboost.train(
        {"subsample": 0.5, "nthread": 1}, xgboost.DMatrix(X, y), 40, run=run, callbacks=[Telling()]
    )
open(sys.argv[2], "wb").write(booster.save_raw("ubj"))
"""


@pytest.mark.slow
def test_real_processes(tmp_path: Path) -> None:
    check_stopped_and_killed(PROGRAM, tmp_path)
