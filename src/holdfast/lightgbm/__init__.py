"""Holdfast for LightGBM: boosting goes on at the round where it was interrupted.

    run = holdfast.Run("runs/boost", every="5min", keep="last=2 best=1:valid_0-auc:max")
    booster = holdfast.lightgbm.train(
        params, dtrain, 500, run=run, valid_sets=[dvalid], callbacks=[early_stopping(20)]
    )

or, for `lightgbm.train` and the estimators of `lightgbm.sklearn`, a callback:

    lightgbm.LGBMClassifier(n_estimators=500).fit(X, y, callbacks=[holdfast.lightgbm.Callback(run)])

A checkpoint holds the model as LightGBM's text (no pickle), and the state of the other callbacks.
The rounds are the total: started again after 200 of 500, 300 follow.

**Bit for bit.** The text holds leaf values exactly, and LightGBM adds them up in one order, so a
new booster that begins with the predictions of the old trees has the very scores. What no file
holds are the generators that draw rows and columns. Where a training samples, each round is
therefore seeded by its number: the booster equals an uninterrupted one's, but not that of the
same parameters without Holdfast. Where nothing is sampled, nothing is changed. DART is refused: it
changes trees that it has made, and LightGBM cannot do that to trees that it has read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from holdfast.errors import HoldfastError
from holdfast.run.run import Run
from holdfast.run.trainings import saved_training

try:
    import lightgbm
except ModuleNotFoundError as error:
    if error.name != "lightgbm":
        raise
    raise HoldfastError(
        "holdfast.lightgbm needs LightGBM", hint="pip install 'holdfast[lightgbm]'"
    ) from None

from holdfast.lightgbm.callback import Callback as Callback
from holdfast.lightgbm.callback import text_of
from holdfast.lightgbm.rows import free

__all__ = ["Callback", "load_model", "train"]


def train(
    params: dict[str, Any],
    train_set: lightgbm.Dataset,
    num_boost_round: int = 100,
    *,
    run: Run,
    name: str = "booster",
    callbacks: Sequence[Callable[..., Any]] | None = None,
    **options: Any,
) -> lightgbm.Booster:
    """`lightgbm.train` that goes on where it was interrupted; the booster after all rounds.

    num_boost_round: how many there are in total, whichever process makes them.
    run: saves as its `every=` says, and logs each metric as "data-metric": "valid_0-auc".
    name: of the booster in checkpoints. Each training of a run that is not inside a loop of it
        needs its own.
    options: as of `lightgbm.train`.

    Raises UsageError for what cannot be resumed, StateError where the checkpoint is of another
    training, and SystemExit at a round's end once the process was asked to stop.
    """
    valid = options.get("valid_sets") or []
    sets = [train_set, *([valid] if isinstance(valid, lightgbm.Dataset) else valid)]
    # LightGBM frees what a Dataset was made of before it calls any callback.
    freed = [one for one in sets if one.free_raw_data]
    for one in freed:
        one.free_raw_data = False
    try:
        return lightgbm.train(
            params,
            train_set,
            num_boost_round,
            callbacks=[*(callbacks or ()), Callback(run, name=name, _to_free=freed)],
            **options,
        )
    finally:
        free(freed)


def load_model(ref: str, name: str = "booster") -> lightgbm.Booster:
    """The booster of a checkpoint: `load_model("runs/boost@best")`. One that `holdfast import` has
    made of a file is called "model".

    Raises StateError if the checkpoint has none of that name.
    """
    state = saved_training(ref, name, "LightGBM", str)
    return lightgbm.Booster(model_str=state if isinstance(state, str) else text_of(state))
