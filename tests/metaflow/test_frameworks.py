"""Trainings with other libraries, interrupted, end as they would have."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.metaflow.support import Metaflow

pytestmark = pytest.mark.slow

EXTENSIONS = Path(__file__).parent / "extensions"


def test_xgboost_out_of_time_among_other_decorators(metaflow: Metaflow) -> None:
    """Of `@timeout @conda @card @retry @checkpoint`, each does its own."""
    ran = metaflow.run(
        *("boosting", "--environment=conda", "run", "--rounds=12"), PYTHONPATH=str(EXTENSIONS)
    )
    assert "timed out after" in ran.output
    first, retried, end = metaflow.told
    assert (first["loaded"], retried["loaded"]) == (0, 6)
    assert end == {"same": True, "metadata": [12]}
    cards = list(metaflow.folder.glob(".metaflow/mf.cards/**/*.html"))
    assert len(cards) == 1


def test_keras_goes_on_with_its_optimizer(metaflow: Metaflow) -> None:
    home = str(metaflow.folder / "keras")
    metaflow.run("layers", KERAS_BACKEND="torch", KERAS_HOME=home)
    assert metaflow.told == [
        {"attempt": 0, "loaded": 0},
        {"attempt": 1, "loaded": 3},
        {"same": True, "saved": [4, 5, 6]},
    ]


def test_nodes_that_train_together_stay_equal_whichever_dies(metaflow: Metaflow) -> None:
    metaflow.run("replicas")
    began = [(line["attempt"], line["loaded"]) for line in metaflow.told if "loaded" in line]
    assert sorted(began) == [(0, 0), (0, 0), (1, 2), (1, 2), (2, 4), (2, 4)]
    ended = [line for line in metaflow.told if "same" in line]
    assert sorted(line["rank"] for line in ended if line["same"]) == [0, 1]


def test_a_bucket_that_the_step_uses_too(metaflow_on_s3: Metaflow) -> None:
    metaflow = metaflow_on_s3
    root = metaflow.datastore[1].partition("=")[2]
    metaflow.run("buckets", METAFLOW_DATATOOLS_S3ROOT=f"{root}/data")
    assert metaflow.told == [
        {"attempt": 0, "loaded": 0, "kept": 0},
        {"attempt": 1, "loaded": 3, "kept": 3},
        {"listed": 5, "kept": 5},
    ]
