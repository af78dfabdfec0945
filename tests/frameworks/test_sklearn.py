"""scikit-learn: what is killed anywhere and resumed ends with the same bits."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# scikit-learn has no types of its own: what pyright infers from its defaults is too narrow.
from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from sklearn.base import BaseEstimator
from sklearn.cluster import Birch, MiniBatchKMeans
from sklearn.decomposition import (
    IncrementalPCA,
    LatentDirichletAllocation,
    MiniBatchDictionaryLearning,
)
from sklearn.ensemble import (
    BaggingRegressor,
    ExtraTreesRegressor,
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    IsolationForest,
    RandomForestClassifier,
)
from sklearn.feature_selection import SelectKBest, f_classif
from sklearn.linear_model import SGDClassifier, SGDRegressor
from sklearn.multioutput import MultiOutputClassifier
from sklearn.naive_bayes import GaussianNB, MultinomialNB
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import MinMaxScaler, OneHotEncoder, StandardScaler
from threadpoolctl import threadpool_limits

import holdfast
from tests.support.estimators import digest
from tests.support.jobs import kill_everywhere

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Sums have one order, and the machine is left to others."""
    with threadpool_limits(1):
        yield


STEPS = 3
_DATA = np.random.RandomState(5)
X = np.abs(_DATA.randn(240, 6))
Y = (X[:, 0] + X[:, 1] * X[:, 2] > 1.2).astype(int) + (X[:, 3] > 1.5)
NAMES = np.array(["one", "two", "three"], object)[Y]
CLASSES = np.array(["one", "three", "two"], object)
CATEGORICAL = np.column_stack([X[:, :4], Y, (X[:, 4] * 3).astype(int)])

Step = Callable[[Any, int], Any]


def rows(number: int) -> slice:
    return slice(number * 60, (number + 1) * 60)


def partial(predict: str = "predict") -> Step:
    def step(estimator: Any, number: int) -> Any:
        estimator.partial_fit(X[rows(number)], NAMES[rows(number)], classes=CLASSES)
        return getattr(estimator, predict)(X)

    return step


def partial_alone(predict: str = "transform", **options: Any) -> Step:
    def step(estimator: Any, number: int) -> Any:
        estimator.partial_fit(X[rows(number)], **options)
        return getattr(estimator, predict)(X)

    return step


def grown(name: str, by: int, y: Any = NAMES, x: Any = X) -> Step:
    """`fit` goes on where it was: so many more trees, or rounds."""

    def step(estimator: Any, number: int) -> Any:
        estimator.set_params(**{name: by * (number + 1)})
        estimator.fit(x, y)
        return estimator.predict(x)

    return step


def again(estimator: Any, number: int) -> Any:
    estimator.fit(X, NAMES)
    return estimator.predict_proba(X) if hasattr(estimator, "predict_proba") else None


def multi(estimator: Any, number: int) -> Any:
    targets = np.column_stack([Y, 1 - Y])[rows(number)]
    estimator.partial_fit(X[rows(number)], targets, classes=[[0, 1, 2], [-1, 0, 1]])
    return estimator.predict(X)


def regression(estimator: Any, number: int) -> Any:
    estimator.partial_fit(X[rows(number)], X[rows(number), 0] * 2)
    return estimator.predict(X)


R = np.random.RandomState
FAMILIES: dict[str, tuple[Callable[[], BaseEstimator], Step]] = {
    # partial_fit
    "SGD": (lambda: SGDClassifier(random_state=3), partial()),
    "SGD log": (lambda: SGDClassifier(loss="log_loss", average=True), partial("predict_proba")),
    "SGD generator": (lambda: SGDClassifier(random_state=R(1), penalty="l1"), partial()),
    "SGD huber": (lambda: SGDRegressor(loss="huber", random_state=R(1)), regression),
    "k-means": (
        lambda: MiniBatchKMeans(3, random_state=3, reassignment_ratio=0.3),
        partial_alone("predict"),
    ),
    "k-means global": (lambda: MiniBatchKMeans(3), partial_alone("predict")),
    "PCA": (lambda: IncrementalPCA(3), partial_alone()),
    "scaler": (StandardScaler, partial_alone()),
    "min max": (MinMaxScaler, partial_alone()),
    "naive Bayes": (lambda: MultinomialNB(alpha=0.5), partial("predict_proba")),
    "Gauss": (GaussianNB, partial("predict_proba")),
    "network": (lambda: MLPClassifier((5, 4), random_state=3), partial("predict_proba")),
    "network global": (lambda: MLPClassifier((5,)), partial("predict_proba")),
    "network SGD": (
        lambda: MLPRegressor(
            hidden_layer_sizes=(5,), solver="sgd", random_state=R(1), batch_size=20
        ),
        regression,
    ),
    "Birch": (
        lambda: Birch(threshold=0.4, branching_factor=5, n_clusters=None),
        partial_alone("predict"),
    ),
    "dictionary": (
        lambda: MiniBatchDictionaryLearning(3, random_state=R(1), max_iter=2),
        partial_alone(),
    ),
    "topics": (lambda: LatentDirichletAllocation(3, random_state=3), partial_alone()),
    "many outputs": (lambda: MultiOutputClassifier(SGDClassifier(random_state=R(1))), multi),
    # warm_start
    "boosting": (
        lambda: GradientBoostingClassifier(warm_start=True, subsample=0.7, max_depth=2),
        grown("n_estimators", 2),
    ),
    "boosting seeded": (
        lambda: GradientBoostingRegressor(
            warm_start=True, subsample=0.7, loss="huber", random_state=R(1), max_features=3
        ),
        grown("n_estimators", 2, X[:, 0] * 2),
    ),
    "boosting stops": (
        lambda: GradientBoostingClassifier(
            warm_start=True, n_iter_no_change=2, max_depth=2, random_state=3
        ),
        grown("n_estimators", 2),
    ),
    "forest": (
        lambda: RandomForestClassifier(warm_start=True, random_state=R(1), max_depth=4),
        grown("n_estimators", 15),
    ),
    "extra trees": (
        lambda: ExtraTreesRegressor(warm_start=True, bootstrap=True),
        grown("n_estimators", 3, np.column_stack([X[:, 0], X[:, 1]])),
    ),
    "isolation": (
        lambda: IsolationForest(warm_start=True, random_state=R(1), max_samples=50),
        grown("n_estimators", 3, None),
    ),
    "bagging": (
        lambda: BaggingRegressor(warm_start=True, random_state=R(1)),
        grown("n_estimators", 3, X[:, 0] * 2),
    ),
    "histograms": (
        lambda: HistGradientBoostingClassifier(warm_start=True, random_state=3, max_leaf_nodes=4),
        grown("max_iter", 2),
    ),
    "histograms stop": (
        lambda: HistGradientBoostingRegressor(
            warm_start=True,
            early_stopping=True,
            random_state=R(1),
            max_features=0.5,
            max_leaf_nodes=4,
        ),
        grown("max_iter", 2, X[:, 0] * 2),
    ),
    "histograms scored": (
        lambda: HistGradientBoostingClassifier(
            warm_start=True, early_stopping=True, scoring="accuracy", max_leaf_nodes=4
        ),
        grown("max_iter", 2),
    ),
    "histograms score themselves": (
        lambda: HistGradientBoostingClassifier(
            warm_start=True, early_stopping=True, scoring=None, max_leaf_nodes=4
        ),
        grown("max_iter", 2),
    ),
    "histograms of categories": (
        lambda: HistGradientBoostingClassifier(
            warm_start=True, categorical_features=[4, 5], random_state=3, min_samples_leaf=5
        ),
        grown("max_iter", 2, x=CATEGORICAL),
    ),
    "network warm": (
        lambda: MLPClassifier((5,), warm_start=True, max_iter=2, random_state=3),
        again,
    ),
    "network stops": (
        lambda: MLPClassifier((5,), warm_start=True, max_iter=2, early_stopping=True),
        again,
    ),
    "SGD warm": (
        lambda: SGDClassifier(warm_start=True, max_iter=3, random_state=R(1), tol=None),
        again,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_killed_anywhere_it_ends_with_the_same_bits(family: str) -> None:
    build, step = FAMILIES[family]

    def script(address: str, die: Any, trace: list[str]) -> None:
        estimator = build()
        run = holdfast.Run(address, every=1, keep="last=2", quiet=True)
        run.track(estimator=estimator, trace=trace)
        for number in run.range(STEPS):
            die()
            with warnings.catch_warnings():
                if hasattr(estimator, "_scorer"):  # it draws a subset that lacks a class
                    warnings.simplefilter("ignore")
                predicted = step(estimator, number)
            trace.append(digest(predicted, _settled(estimator)))
            np.random.rand()  # the program, too, draws from NumPy's global generator
            die()
        run.close()
        trace.append(digest(_settled(estimator)))
        die()

    # With nothing saved, behind each step that is, and at the end: there it does nothing more.
    kill_everywhere(script, only=lambda place: place == 1 or place % 2 == 0)


def _settled(estimator: Any) -> Any:
    """Without a scorer that holds the estimator: it is asked for what it would score."""
    found = dict(vars(estimator))
    scorer = found.pop("_scorer", None)
    found.pop("_raw_predict", None)  # scikit-learn leaves the class's method there
    return found, None if scorer is None else (type(scorer), scorer(estimator, X, NAMES))


# -- in other things -----------------------------------------------------------------


def test_in_pipelines_dicts_lists_and_boxes_with_one_generator_for_all() -> None:
    def script(address: str, die: Any, trace: list[str]) -> None:
        drawing = np.random.RandomState(7)
        scaler, clf = StandardScaler(), SGDClassifier(random_state=drawing)
        pipeline = Pipeline(
            [
                ("encode", OneHotEncoder(dtype=np.float32, handle_unknown="ignore")),
                ("select", SelectKBest(f_classif, k=2)),
                ("clf", SGDClassifier(random_state=drawing)),
            ]
        )
        models = {"parts": [scaler, clf, pipeline], 3: GaussianNB()}
        run = holdfast.Run(address, every=1, quiet=True)
        run.track(trace=trace, models=models, drawing=drawing, scaler=scaler)
        box = run.box(kmeans=MiniBatchKMeans(2, random_state=drawing), best=None)
        for number in run.range(STEPS):
            die()
            some, names = X[rows(number)], NAMES[rows(number)]
            scaled = scaler.partial_fit(some).transform(some)
            clf.partial_fit(scaled, names, classes=CLASSES)
            models[3].partial_fit(scaled, names, classes=CLASSES)
            pipeline.fit((some * 2).astype(int).astype(str).astype(object), names)
            box.kmeans.partial_fit(some)
            box.best = StandardScaler().fit(some)
            assert clf.random_state is drawing is pipeline.named_steps["clf"].random_state
            assert models["parts"][0] is scaler
            assert box.kmeans.random_state is drawing
            trace.append(digest(models, drawing, box.kmeans, box.best, drawing.rand()))
        run.close()

    assert kill_everywhere(script) == STEPS


def test_a_restore_in_place_takes_away_what_came_later() -> None:
    clf, scaler = SGDClassifier(random_state=0), StandardScaler()
    with holdfast.CheckpointManager("memory://in-place") as manager:
        manager.save(1, {"clf": clf, "scaler": scaler.fit(X)}).result()
        before = digest(clf, scaler)
        clf.partial_fit(X, NAMES, classes=CLASSES)
        scaler.fit(X * 2)
        live = {"clf": clf, "scaler": scaler}
        manager.restore(live)
    assert live["clf"] is clf
    assert live["scaler"] is scaler
    assert not hasattr(clf, "coef_")
    assert digest(clf, scaler) == before
