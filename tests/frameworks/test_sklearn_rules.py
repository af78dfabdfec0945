"""scikit-learn: retention and preemption, edits of the program, versions, refusals."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# scikit-learn has no types of its own: what pyright infers from its defaults is too narrow.
from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import sklearn
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import SGDClassifier
from sklearn.neighbors import KNeighborsClassifier, LocalOutlierFactor
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer, SplineTransformer, StandardScaler
from sklearn.tree import DecisionTreeClassifier

import holdfast
from holdfast.errors import (
    ConfigChanged,
    DamagedObject,
    NoIntactCheckpoint,
    PickleRefused,
    StateError,
    StructureMismatch,
    UnsupportedValue,
)
from holdfast.sklearn import load_estimator
from tests.support.estimators import digest
from tests.support.jobs import fresh_address, process
from tests.support.programs import Program

_DATA = np.random.RandomState(5)
X = _DATA.randn(90, 4)
Y = (X[:, 0] + X[:, 1] > 0).astype(int)


class Centered(TransformerMixin, BaseEstimator):
    """An estimator of the program's own, with an object that it makes itself."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        self._drawing = np.random.RandomState(9)

    def fit(self, X: Any, y: Any = None) -> Centered:
        self.middle_ = X.mean(0) * self.factor + self._drawing.rand()
        return self

    def transform(self, X: Any) -> Any:
        return X - self.middle_


class Stateful(ClassifierMixin, BaseEstimator):
    def __init__(self) -> None:
        self.seen = 0

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"] + 100


def saved(value: Any, **options: Any) -> str:
    address = fresh_address()
    with holdfast.CheckpointManager(address, **options) as manager:
        manager.save(1, {"x": value}).result()
    return address


def restored(value: Any, live: Any, **options: Any) -> Any:
    with holdfast.CheckpointManager(saved(value)) as manager:
        state = {"x": live}
        manager.restore(state, **options)
    return state["x"]


# -- every rule ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "keep", "steps"),
    [
        (1, "last=2", [5, 6]),
        (1, "best=1:loss last=1", [2, 6]),
        (4, "last=3", [4, 6]),
        ("20s", "last=9", [2, 4, 6]),
    ],
)
def test_rules_of_saving_and_keeping(every: Any, keep: str, steps: list[int]) -> None:
    address, now = fresh_address(), 0.0
    clf = SGDClassifier(random_state=0)
    states: dict[int, str] = {}
    with holdfast.Run(address, every=every, keep=keep, quiet=True, clock=lambda: now) as run:
        run.track(clf=clf)
        for number in run.range(6):
            clf.partial_fit(X, Y, classes=[0, 1])
            run.log(loss=abs(number - 1))
            states[number + 1] = digest(clf)
            now += 10.0
    with holdfast.CheckpointManager(address) as manager:
        assert [info.step for info in manager.checkpoints()] == steps
    for step in steps:
        assert digest(load_estimator(f"{address}@{step}")) == states[step]


TRAIN = """
import numpy as np
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.linear_model import SGDClassifier
rng = np.random.RandomState(0)
X = rng.randn(60, 4); Y = (X[:, 0] > 0).astype(int)
sgd = SGDClassifier(random_state=rng)
boost = GradientBoostingClassifier(warm_start=True, subsample=0.5, max_depth=2)
np.random.seed(1)
run.track(sgd=sgd, models={"boost": [boost]}, rng=rng)
for number in run.range(6):
    sgd.partial_fit(X, Y, classes=[0, 1])
    boost.set_params(n_estimators=number + 1).fit(X, Y)
    if number == 3 and run.resumed is None:
        say("ready")
        time.sleep(WAIT)
say(sgd.coef_.tobytes().hex() + boost.predict_proba(X).tobytes().hex() + str(rng.rand()))
"""


def program(folder: Path, wait_s: float) -> Program:
    folder.mkdir()
    made = Program(folder, TRAIN.replace("WAIT", str(wait_s)))
    made.script.write_text(made.script.read_text().replace("every=None", "every=1"))
    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "wait_s", "status"),
    [(signal.SIGTERM, 1.0, 75), (signal.SIGKILL, 600.0, -signal.SIGKILL)],
)
def test_processes_that_are_stopped_and_killed(
    tmp_path: Path, sent: signal.Signals, wait_s: float, status: int
) -> None:
    code, out, err = program(tmp_path / "whole", 0.0).again()
    assert code == 0, err
    expected = out.replace("ready\n", "")
    job = program(tmp_path / "stopped", wait_s)
    os.kill(job.start().pid, sent)
    code, _, err = job.end()
    assert code == status, err
    for _ in range(2):  # the second time there is nothing left to do
        code, out, err = job.again()
        assert code == 0, err
        assert out == expected


# -- the program was edited -------------------------------------------------------------


def job(
    address: str, clf: Any, steps: int = 6, *, kill_at: int | None = None, **options: Any
) -> Any:
    with process():
        run = holdfast.Run(address, every=1, **options).track(clf=clf)
        for number in run.range(6):
            if number == kill_at:
                run.manager.wait()
                return clf
            clf.fit(X, Y) if isinstance(clf, Pipeline) else clf.partial_fit(X, Y, classes=[0, 1])
        run.close()
    return clf


def test_changed_parameters_are_refused_or_overridden(capfd: pytest.CaptureFixture[str]) -> None:
    address = fresh_address()
    job(address, SGDClassifier(alpha=0.1, random_state=0), kill_at=2, quiet=True)
    with pytest.raises(ConfigChanged, match=r"clf\.alpha: 0\.1 -> 0\.2") as caught:
        job(address, SGDClassifier(alpha=0.2, random_state=0), quiet=True)
    assert "override=['clf']" in caught.value.hint
    # How it is computed is no such change, and the machine's own.
    clf = job(address, SGDClassifier(alpha=0.1, random_state=0, n_jobs=2, verbose=0), kill_at=3)
    assert (clf.n_jobs, clf.t_) == (2, 1 + 3 * len(X))
    clf = job(address, SGDClassifier(alpha=0.2, random_state=0), override=["clf.alpha"])
    assert "not as in the checkpoint: clf.alpha: 0.1 -> 0.2" in capfd.readouterr().err
    assert (clf.alpha, clf.t_) == (0.2, 1 + 6 * len(X))


def test_parameters_of_parts_are_named_as_scikit_learn_does() -> None:
    def pipeline(alpha: float) -> Pipeline:
        clf = SGDClassifier(alpha=alpha, random_state=0, tol=None, max_iter=2)
        return Pipeline([("scale", StandardScaler()), ("clf", clf)])

    address = fresh_address()
    job(address, pipeline(0.1), kill_at=2, quiet=True)
    with pytest.raises(ConfigChanged, match=r"clf\.clf__alpha: 0\.1 -> 0\.2"):
        job(address, pipeline(0.2), quiet=True)
    found = job(address, pipeline(0.2), quiet=True, override=["clf.clf__alpha"])
    assert found.named_steps["clf"].alpha == 0.2


@pytest.mark.parametrize(
    ("before", "after", "line"),
    [
        (SGDClassifier, StandardScaler, r"x: saved as .*:SGDClassifier, live is .*:StandardScaler"),
        (
            lambda: Pipeline([("a", StandardScaler()), ("b", SGDClassifier())]),
            lambda: Pipeline([("a", StandardScaler()), ("c", SGDClassifier())]),
            r"x/steps: saved as a, b, live is a, c",
        ),
        (
            lambda: Pipeline([("a", StandardScaler()), ("b", SGDClassifier())]),
            lambda: Pipeline([("a", StandardScaler()), ("b", DecisionTreeClassifier())]),
            r"x/steps/1/1: saved as .*:SGDClassifier, live is .*:DecisionTreeClassifier",
        ),
        (
            lambda: SGDClassifier(random_state=0),
            lambda: SGDClassifier(random_state=np.random.RandomState(0)),
            r"x/random_state: saved as 0, live is RandomState",
        ),
        (
            lambda: FunctionTransformer(np.sum),
            lambda: FunctionTransformer(np.mean),
            r"x/func: saved as numpy:sum, live is numpy:mean",
        ),
        (lambda: {"a": 1}, StandardScaler, r"x: saved as a dict, live is StandardScaler"),
        (lambda: np.ones(3), StandardScaler, r"x: saved as a float64 array, live is"),
        (StandardScaler, Stateful, r"x: saved as .*:StandardScaler, live is .*Stateful"),
    ],
)
def test_what_cannot_be_right_is_reported_and_nothing_is_changed(
    before: Callable[[], Any], after: Callable[[], Any], line: str
) -> None:
    live = after()
    untouched = digest(live)
    with pytest.raises(StructureMismatch, match=line):
        restored(before(), live)
    assert digest(live) == untouched


def test_parts_can_be_skipped() -> None:
    live = SGDClassifier(alpha=0.5).fit(X, Y)
    coef = live.coef_
    fitted = SGDClassifier(alpha=0.25, random_state=3).fit(X * 2, Y)
    assert restored(fitted, live, skip=["x/coef_", "x/alpha"]) is live
    assert live.coef_ is coef
    assert (live.alpha, live.random_state) == (0.5, 3)
    assert live.intercept_ == fitted.intercept_


def test_another_version_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    address = saved([StandardScaler().fit(X), StandardScaler().fit(X)])
    with holdfast.CheckpointManager(address) as manager:
        monkeypatch.setattr(sklearn, "__version__", "99.0")
        with pytest.warns(
            RuntimeWarning, match="saved by scikit-learn .*, and this is 99.0"
        ) as told:
            manager.restore({"x": [StandardScaler(), StandardScaler()]})
    assert len(told) == 1


def test_estimators_that_nobody_saves_are_named(capfd: pytest.CaptureFixture[str]) -> None:
    clf, forgotten, fitted = (SGDClassifier(random_state=0) for _ in range(3))
    fitted.partial_fit(X, Y, classes=[0, 1])
    run = holdfast.Run(fresh_address(), every=1).track(clf=clf)
    for _ in run.range(3):
        for one in (clf, forgotten):
            one.partial_fit(X, Y, classes=[0, 1])
        fitted.predict(X)
    run.close()
    err = capfd.readouterr().err
    assert "in no checkpoint: forgotten (SGDClassifier);" in err
    assert "fitted" not in err


# -- what it can hold -----------------------------------------------------------------


def _texts() -> Any:
    return TfidfVectorizer(stop_words=["and"], dtype=np.float32).fit(["a bc and de", "bc"])


def _sparse() -> Any:
    return SGDClassifier(random_state=0).fit(X, Y).sparsify()


def _ball(**options: Any) -> Any:
    return KNeighborsClassifier(3, algorithm="ball_tree", **options).fit(X, Y)


@pytest.mark.parametrize(
    ("build", "ask"),
    [
        (_texts, lambda one: one.transform(["bc de de"]).toarray()),
        (_sparse, lambda one: one.decision_function(X)),
        (_ball, lambda one: one.kneighbors(X)),
        (lambda: _ball(metric="minkowski", p=3), lambda one: one.kneighbors(X)),
        (lambda: LocalOutlierFactor(novelty=True).fit(X), lambda one: one.decision_function(X)),
        (lambda: IsotonicRegression().fit(X[:, 0], Y), lambda one: one.predict(X[:, 1])),
        (
            lambda: CalibratedClassifierCV(SGDClassifier(random_state=0), cv=2).fit(X, Y),
            lambda one: one.predict_proba(X),
        ),
        (
            lambda: FunctionTransformer(functools.partial(np.multiply, 2.0)).fit(X),
            lambda one: one.transform(X),
        ),
    ],
    ids=["texts", "sparse", "ball", "metric", "outliers", "isotonic", "calibrated", "partial"],
)
def test_made_anew_it_answers_the_same(build: Callable[[], Any], ask: Callable[[Any], Any]) -> None:
    estimator = build()
    found = load_estimator(saved(estimator), "x")
    assert type(found) is type(estimator)
    assert digest(ask(found)) == digest(ask(estimator))


def test_an_estimator_of_ones_own() -> None:
    fitted = Centered(2.0).fit(X)
    live = Centered()
    drawing = live._drawing
    assert restored(fitted, live) is live
    assert live._drawing is drawing
    assert digest(live, live.fit(X)) == digest(fitted, fitted.fit(X))
    assert digest(load_estimator(saved(fitted), "x")) == digest(fitted)


def test_a_state_dict_of_its_own_comes_first() -> None:
    live = Stateful()
    assert restored(Stateful(), live).seen == 100


def test_what_cannot_be_saved_is_named_and_can_be_pickled() -> None:
    spline = SplineTransformer().fit(X)
    with pytest.raises(UnsupportedValue, match=r"'x/bsplines_/0'.*BSpline, a part of SplineT") as e:
        saved(spline)
    assert "allow_pickle=True" in e.value.hint
    address = saved(spline, allow_pickle=True)
    with holdfast.CheckpointManager(address) as manager, pytest.raises(PickleRefused):
        manager.restore({"x": SplineTransformer()})
    live = SplineTransformer()
    with holdfast.CheckpointManager(address, allow_pickle=True) as manager:
        manager.restore({"x": live}, allow_pickle=True)
    assert digest(live.transform(X)) == digest(spline.transform(X))


def test_load_estimator_finds_no_other_things() -> None:
    address = saved({"clf": StandardScaler().fit(X), "n": 3})
    assert load_estimator(address, "x/clf").n_features_in_ == 4
    for name in ("clf", "x/n", "x"):
        with pytest.raises(StateError, match="has no estimator called"):
            load_estimator(address, name)


# -- what a store may hold ------------------------------------------------------------


def spoiled(estimator: Any, change: Callable[[Any], None], monkeypatch: Any) -> Any:
    """Restore what was saved of an estimator whose trees say something else than they are."""
    from holdfast.sklearn import trees

    encode = trees.encode_tree

    class Encoder:
        def __init__(self, encoder: Any) -> None:
            self.encoder = encoder

        def encode(self, value: Any, path: str) -> Any:
            value = {k: np.array(v) if isinstance(v, np.ndarray) else v for k, v in value.items()}
            change(value)
            return self.encoder.encode(value, path)

    module = sys.modules["holdfast.sklearn.adapter"]
    monkeypatch.setattr(module, "encode_tree", lambda v, path, e: encode(v, path, Encoder(e)))
    return restored(estimator, DecisionTreeClassifier())


def _set(name: str, index: int, to: int) -> Callable[[Any], None]:
    def change(state: Any) -> None:
        state["nodes"][name][index] = to

    return change


@pytest.mark.parametrize(
    "change",
    [
        _set("left_child", 0, 10_000),
        _set("left_child", 0, 0),
        _set("right_child", 0, -1),
        _set("right_child", 0, 1),
        _set("feature", 0, 4),
        _set("feature", 0, -2),
        lambda state: state.update(max_depth=1),
        lambda state: state.update(n_features=1),
        lambda state: state.update(n_outputs=2),
        lambda state: state.update(n_classes=[1 << 40]),
        lambda state: state.update(values=state["values"][1:]),
        lambda state: state.update(nodes=state["values"]),
        lambda state: state.update(nodes=state["nodes"][:0], values=state["values"][:0]),
        lambda state: state.pop("values"),
    ],
)
def test_trees_that_would_lead_out_of_memory(change: Any, monkeypatch: Any) -> None:
    with pytest.raises(NoIntactCheckpoint, match=r"its tree|the nodes"):
        spoiled(DecisionTreeClassifier(random_state=0).fit(X, Y), change, monkeypatch)


@pytest.mark.parametrize(
    ("name", "to"),
    [("left", 0), ("left", 10_000), ("right", 1), ("feature_idx", 4), ("feature_idx", -1)],
)
def test_histogram_trees_that_would_lead_out_of_memory(name: str, to: int) -> None:
    hist = HistGradientBoostingClassifier(max_iter=1, max_leaf_nodes=4).fit(X, Y)
    hist._predictors[0][0].nodes[name][0] = to
    with pytest.raises(NoIntactCheckpoint, match="tree"):
        restored(hist, HistGradientBoostingClassifier())


def test_classes_that_are_no_estimators_are_not_made(tmp_path: Path) -> None:
    from holdfast.core.tree import Record, TreeDecoder

    def load(node: Any) -> Any:
        return TreeDecoder([]).decode(node, holdfast.core.adapters.NOTHING, "x")

    for kind in ("os:_Environ", "pathlib:Path", "sklearn.no:Such", "sklearn.base:clone", ":", ""):
        node = {"!": "sklearn.estimator", "type": kind, "v": {"!": "dict", "v": [["a", 1]]}}
        assert isinstance(load(node), Record)
    for name in ("os:system", "builtins:eval", "sklearn.datasets._base:load_files"):
        assert isinstance(load({"!": "sklearn.name", "v": name}), Record)
    assert load({"!": "sklearn.name", "v": "numpy:float32"}) is np.float32
    with pytest.raises(StateError):
        load({"!": "sklearn.rebuilt", "type": "builtins:int", "v": [3]})


def test_what_is_not_there_is_an_error_inside_of_a_live_one() -> None:
    local = type("Local", (Centered,), {"__module__": "gone", "__qualname__": "Local"})
    pipeline = CalibratedClassifierCV(SGDClassifier(random_state=0), cv=2).fit(X, Y)
    pipeline.extra_ = local()
    with pytest.raises(StateError, match="gone:Local, which cannot be made here"):
        restored(pipeline, CalibratedClassifierCV())


def test_sparse_matrices_are_checked() -> None:
    clf = _sparse()
    clf.coef_.indices[0] = 1000
    with pytest.raises(DamagedObject, match="sparse matrix"):
        load_estimator(saved(clf), "x")
    assert scipy.sparse.issparse(clf.coef_)
