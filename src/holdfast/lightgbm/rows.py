"""What trees that are read are applied to, and the scores that come of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np

from holdfast.errors import UsageError


def rows_of_an_estimator(booster: lightgbm.Booster) -> dict[int, Any]:
    """What the Datasets of an estimator's `fit` were made of: LightGBM frees it at once."""
    frame = sys._getframe(2)
    while frame is not None:
        scope = frame.f_locals
        if scope.get("train_set") is booster.train_set and "_X" in scope:
            sets, given = scope.get("valid_sets") or [], scope.get("eval_set") or []
            if isinstance(given, tuple):  # one pair is taken for a list of it
                given = [given]
            rows = {id(data): pair[0] for data, pair in zip(sets, given, strict=False)}
            return {**rows, id(booster.train_set): scope["_X"]}
        frame = frame.f_back
    return {}


def source_of(data: lightgbm.Dataset, rows: dict[int, Any]) -> tuple[Any, Any]:
    """What trees can be applied to in place of `data`, and which rows of it (None: all).

    Raises UsageError if there is nothing.
    """
    found, indices = rows.get(id(data), data.data), None
    if found is None and data.used_indices is not None:
        found, indices = getattr(data.reference, "data", None), data.used_indices
    if found is None:
        raise UsageError(
            "LightGBM has freed the rows of a Dataset: the trees of a checkpoint could not be "
            "applied to them",
            hint="Dataset(…, free_raw_data=False), or holdfast.lightgbm.train with a new Dataset",
        )
    if isinstance(found, str | Path | list | lightgbm.Sequence):
        raise UsageError(
            f"a Dataset that is made of a {type(found).__name__} cannot be resumed yet",
            hint="Make it of one array, matrix or table.",
        )
    return found, indices


def scores_before(
    trees: lightgbm.Booster, source: tuple[Any, Any], begin: Any, *, forest: bool
) -> Any:
    """The scores that rows had once `trees` were made, to the last bit; class after class.

    begin: their scores before the first tree, if they had any.
    forest: whether scores are averages.
    """
    rows, indices = source

    def predicted(first: int, count: int) -> Any:
        scores = trees.predict(rows, raw_score=True, start_iteration=first, num_iteration=count)
        scores = np.asarray(scores, np.float64)
        return (scores if indices is None else scores[indices]).ravel(order="F")

    if begin is None and not forest:
        return predicted(0, -1)
    # As LightGBM does it, tree after tree: the sum of the sums would differ in the last bit.
    scores: Any = 0.0 if begin is None else np.asarray(begin, np.float64).ravel(order="F")
    for number in range(trees.current_iteration()):
        if forest:
            scores = (scores * number + predicted(number, 1)) * (1.0 / (number + 1))
        else:
            scores = scores + predicted(number, 1)
    return scores


def free(sets: Sequence[lightgbm.Dataset]) -> None:
    """Do what LightGBM does with a Dataset that is not to keep its rows."""
    for one in sets:
        one.free_raw_data = True
        if one._handle is not None:
            one.data = None
