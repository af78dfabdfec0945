"""Trainings that LightGBM cannot go on with, or whose state no one can read."""

from __future__ import annotations

from typing import Any

from holdfast.errors import UsageError

_COSTS = ("cegb_penalty_split", "cegb_penalty_feature_lazy", "cegb_penalty_feature_coupled")


def refuse(config: dict[str, str], booster: Any, caller: dict[str, Any]) -> None:
    """Raises UsageError where a training could not be resumed.

    config: all parameters, as LightGBM writes them.
    caller: the variables of `lightgbm.train`.
    """

    def given(name: str) -> bool:
        return config.get(name, "") not in ("", "0")

    forest = config["boosting"] == "rf"
    goss = config["data_sample_strategy"] == "goss"
    reasons = {
        'boosting="dart" cannot be resumed: LightGBM never drops trees that it has read': (
            config["boosting"] == "dart",
            'boosting="gbdt", or the DART of XGBoost with holdfast.xgboost',
        ),
        'boosting="rf" cannot be resumed where it is evaluated on its own training data': (
            forest and bool(caller.get("is_valid_contain_train")),
            "Evaluate it on another Dataset of the same rows: "
            "valid_sets=[lightgbm.Dataset(X, y, reference=train_set)]",
        ),
        "gradients that are rounded at random cannot be resumed: their generator is not at hand": (
            given("use_quantized_grad") and given("stochastic_rounding"),
            'params["stochastic_rounding"] = False',
        ),
        "costs of features (cegb_…) cannot be resumed: what was paid before is not in the model": (
            any(given(name) for name in _COSTS),
            "Leave these parameters out.",
        ),
        "positions of ranked rows cannot be resumed: their biases are not in the model": (
            getattr(booster.train_set, "position", None) is not None,
            "Leave `position` out.",
        ),
        "several machines that train together cannot be resumed yet": (
            int(config.get("num_machines", "1")) > 1,
            "Train on one.",
        ),
        "a booster of GOSS cannot be kept for training where it may have been resumed": (
            goss and bool(caller.get("keep_training_booster")),
            "Leave keep_training_booster out.",
        ),
    }
    for reason, (found, hint) in reasons.items():
        if found:
            raise UsageError(reason, hint=hint)
