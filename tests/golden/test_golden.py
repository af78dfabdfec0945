"""Stores written by every release open, verify and give back their exact values."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from tests.core.exactness import assert_exact
from tests.golden.estimators import X, Y, estimators
from tests.golden.make import state
from tests.torch.roundtrip import assert_same

STORES = sorted(path for path in Path(__file__).parent.iterdir() if path.name.startswith("v"))


def assert_state(found: Mapping[str, Any], step: int) -> None:
    wanted = state(step)
    assert_same(found["torch"], wanted["torch"])
    for name in ("plain", "numpy", "frozen"):
        assert_exact(found[name], wanted[name], name)


def test_there_are_stores() -> None:
    assert [path.name for path in STORES][:1] == ["v0.1"]


@pytest.mark.parametrize("store", STORES, ids=lambda path: path.name)
def test_reads_old(store: Path, tmp_path: Path) -> None:
    with holdfast.CheckpointManager(store) as ckpts:
        assert all(found.ok for found in ckpts.verify())
        assert [c.step for c in ckpts.checkpoints()] == [1, 2, 3, 4, 5, 6]
        assert ckpts.finished
        assert ckpts.info("gold").step == 2
        assert ckpts.info(3).pinned
        assert math.isnan(ckpts.info(2).metrics["odd"])
        best = ckpts.best("loss", "min")
        assert best is not None
        assert best.step == 5
        for step in (1, 6):
            found = ckpts.restore(ref=step, rng=False)
            assert found is not None
            assert_state(found.values, step)
        assert ckpts.load(2).config == {"lr": 0.1}
        loop = ckpts.read_loop(4)
        assert loop is not None
        assert loop.loop == {"epoch": 4}


@pytest.mark.parametrize("store", STORES, ids=lambda path: path.name)
def test_goes_on_with_old(store: Path, tmp_path: Path) -> None:
    """Today's version adds to an old store, reusing its data, and prunes it."""
    copy = tmp_path / "run"
    shutil.copytree(store, copy)
    with holdfast.CheckpointManager(copy, keep="last=2") as ckpts:
        info = ckpts.save(7, state(6)).result()
        assert info.new_bytes < info.nbytes
        assert [c.step for c in ckpts.checkpoints()] == [2, 3, 6, 7]
        assert all(found.ok for found in ckpts.verify())
        found = ckpts.restore(ref=7, rng=False)
        assert found is not None
        assert_state(found.values, 6)


def test_reads_leaves_that_are_cut_in_boxes(tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(STORES[0].with_name("boxes"), copy)
    with holdfast.CheckpointManager(copy, keep=None) as ckpts:
        [checked] = ckpts.verify()
        assert checked.ok, checked.problems
        found = ckpts.restore(rng=False)
        assert found is not None
        assert_state(found.values, 6)
        ckpts.save(7, state(6)).result()
        found = ckpts.restore(ref=7, rng=False)
        assert found is not None
        assert_state(found.values, 6)


@pytest.mark.filterwarnings("ignore:The parameter `criterion` is deprecated:FutureWarning")
def test_estimators_of_an_old_version_go_on() -> None:
    """Saved with scikit-learn 1.4.2 and NumPy 2.2.6."""
    made = estimators()
    into: dict[str, Any] = {"made": made}
    with holdfast.CheckpointManager(Path(__file__).parent / "sklearn-1.4.2") as manager:
        with pytest.warns(RuntimeWarning, match="was saved by scikit-learn 1.4.2"):
            manager.restore(into, only=["made"])
        predictions = manager.load()["predictions"]
    for name, one in made.items():
        np.testing.assert_array_equal(one.predict(X), predictions[name])
    for name in ("sgd", "bayes", "network", "means"):
        made[name].partial_fit(X, Y)
    for name in ("forest", "boosting"):
        before = np.ravel(made[name].estimators_)
        made[name].set_params(n_estimators=4).fit(X, Y)
        after = np.ravel(made[name].estimators_)
        assert len(after) == 4
        assert all(one is other for one, other in zip(before, after[:2], strict=True))
