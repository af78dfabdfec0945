"""Holdfast for scikit-learn: estimators as a part of the state.

    clf = SGDClassifier(random_state=0)
    run.track(clf=clf)
    for epoch in run.range(20):
        clf.partial_fit(X[rows(epoch)], y[rows(epoch)], classes=classes)

Tracked estimators are found by themselves, also in dicts, lists and other estimators; this
module is imported when one turns up. A checkpoint holds their attributes, without pickle, and
a restore puts them into the estimator that the program has built.
"""

from __future__ import annotations

from holdfast.errors import HoldfastError

try:
    import sklearn as _sklearn
except ModuleNotFoundError as error:
    if error.name != "sklearn":
        raise
    raise HoldfastError(
        "holdfast.sklearn needs scikit-learn", hint="pip install 'holdfast[sklearn]'"
    ) from None

from holdfast.sklearn.adapter import adapter as adapter
from holdfast.sklearn.plain import load_estimator as load_estimator

__all__ = ["adapter", "load_estimator"]

del _sklearn
