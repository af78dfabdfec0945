"""Writes checkpoints of estimators that later versions of scikit-learn must be able to go on from.

    python -m tests.golden.estimators tests/golden/sklearn-1.4.2

Made once, with an old scikit-learn, and committed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.cluster import MiniBatchKMeans
from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import SGDClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import holdfast

_RNG = np.random.default_rng(0)
X = _RNG.normal(size=(60, 4))
Y = (X[:, 0] + X[:, 1] > 0).astype(int)


def estimators() -> dict[str, Any]:
    return {
        "sgd": SGDClassifier(random_state=0),
        "bayes": GaussianNB(),
        "network": MLPClassifier([4], max_iter=5, random_state=0),
        "means": MiniBatchKMeans(3, random_state=0, n_init=1),  # pyright: ignore[reportArgumentType]
        "forest": RandomForestClassifier(2, max_depth=3, random_state=0, warm_start=True),
        "boosting": GradientBoostingClassifier(
            n_estimators=2, max_depth=2, random_state=0, warm_start=True
        ),
        "pipeline": make_pipeline(StandardScaler(), SGDClassifier(random_state=0)),
    }


def main() -> None:
    made = estimators()
    for one in made.values():
        one.fit(X, Y)
    predictions = {name: one.predict(X) for name, one in made.items()}
    with holdfast.CheckpointManager(Path(sys.argv[1])) as manager:
        manager.save(1, {"made": made, "predictions": predictions}, block=True)


if __name__ == "__main__":
    main()
