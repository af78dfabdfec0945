"""The state of other callbacks as plain values, and LightGBM's results as these."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import lightgbm
from lightgbm.callback import CallbackEnv

_STOPPING = ("best_score", "best_iter", "best_score_list", "enabled", "first_metric")
"""What early stopping changes, or knows only after the first round."""


def has_state(callback: Any) -> bool:
    """Whether it has something that a checkpoint should hold."""
    return (
        hasattr(callback, "load_state_dict")
        or _is_recording(callback)
        or is_early_stopping(callback)
    )


def is_early_stopping(callback: Any) -> bool:
    """Whether it is what `lightgbm.early_stopping` makes."""
    return hasattr(callback, "best_score_list") and hasattr(callback, "cmp_op")


def _is_recording(callback: Any) -> bool:
    """Whether it is what `lightgbm.record_evaluation` makes."""
    return isinstance(getattr(callback, "eval_result", None), dict)


def state_of(callback: Any) -> Any:
    """Its state, of which nothing changes afterwards."""
    if hasattr(callback, "state_dict"):
        return callback.state_dict()
    if _is_recording(callback):
        return {
            data: {metric: list(values) for metric, values in metrics.items()}
            for data, metrics in callback.eval_result.items()
        }
    return {
        "best_score": [float(one) for one in callback.best_score],
        "best_iter": list(callback.best_iter),
        "best_score_list": [plain(one) for one in callback.best_score_list],
        "enabled": callback.enabled,
        "first_metric": callback.first_metric,
    }


def put_back(callback: Any, state: Any) -> None:
    """Give it a state that `state_of` has told."""
    if hasattr(callback, "load_state_dict"):
        callback.load_state_dict(state)
    elif _is_recording(callback):
        callback.eval_result.clear()
        for data, metrics in state.items():
            callback.eval_result[data] = OrderedDict((k, list(v)) for k, v in metrics.items())
    else:
        lists = [results_of(one) for one in state["best_score_list"]]
        vars(callback).update(state, best_score_list=lists)


def make_ready(callback: Any, env: CallbackEnv) -> None:
    """Have early stopping make what it makes in the first round, and keep all that it knows."""
    kept = {name: getattr(callback, name) for name in _STOPPING}
    callback._init(env)
    vars(callback).update(kept)


def plain(results: Any) -> list[list[Any]]:
    """Results of evaluations, each as data, metric, value, whether more is better."""
    return [[data, metric, float(value), bool(more)] for data, metric, value, more, *_ in results]


def results_of(values: list[list[Any]]) -> list[Any]:
    """`plain` turned round, as this LightGBM has them."""
    kind = getattr(lightgbm.basic, "EvalResult", None)  # from 4.7 on
    return [tuple(one) if kind is None else kind(*one) for one in values]
