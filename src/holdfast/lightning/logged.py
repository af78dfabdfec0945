"""What was logged: means of an epoch in progress, newest values, torchmetrics.

Lightning saves none of it, so its own resume computes an epoch's mean from what is left of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_REDUCTIONS: dict[Any, str] = {
    torch.mean: "mean",
    torch.max: "max",
    torch.min: "min",
    torch.sum: "sum",
}
_BUILT_IN = {max: "max", min: "min", sum: "sum"}
_BOOKS = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")
_PLACE = ("_first_loop_iter", "_current_fx")
_KEPT = ("prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx")


def logged_state(trainer: Any) -> dict[str, Any]:
    connector = trainer._logger_connector
    return {
        "books": {name: dict(getattr(connector, name)) for name in _BOOKS},
        "place": {name: getattr(connector, name) for name in _PLACE},
        "results": [_entry_state(one) for one in trainer.fit_loop.epoch_loop._results.values()],
    }


def put_back_logged(trainer: Any, saved: Mapping[str, Any], *, own: bool = True) -> None:
    """`own`: this rank has logged it; else what follows is all that it adds to means."""
    connector = trainer._logger_connector
    module = trainer.lightning_module
    for name, values in saved["books"].items():
        setattr(connector, name, {key: _moved(value, module) for key, value in values.items()})
    for name, value in saved["place"].items():
        setattr(connector, name, value)
    results = trainer.fit_loop.epoch_loop._results
    results.clear()
    for entry in saved["results"]:
        _put_back_entry(results, trainer, entry, own=own)


def _entry_state(result: Any) -> dict[str, Any]:
    """One value that `self.log` has seen."""
    meta = result.meta
    built_in = meta.reduce_fx in _BUILT_IN
    return {
        "fx": meta.fx,
        "name": meta.name,
        "options": {name: getattr(meta, name) for name in _KEPT},
        "reduce": (_BUILT_IN if built_in else _REDUCTIONS).get(meta.reduce_fx),
        "built_in": built_in,
        "sync": meta.sync.should,
        "rank_zero_only": meta.sync.rank_zero_only,
        "metric": meta.metric_attribute,
        "reset": result.has_reset,
        "forward": _plain(result._forward_cache),
        **({"state": metric_state(result)} if result.is_tensor else {}),
    }


def _put_back_entry(results: Any, trainer: Any, entry: Mapping[str, Any], *, own: bool) -> None:
    module = trainer.lightning_module
    plain = "state" in entry
    reduce: Any = entry["reduce"]
    if entry["built_in"]:
        reduce = next(one for one, name in _BUILT_IN.items() if name == reduce)
    results.log(  # makes the entry; its value is set below
        entry["fx"],
        entry["name"],
        torch.zeros(1, device=module.device)[0] if plain else module.get_submodule(entry["metric"]),
        **entry["options"],
        reduce_fx=torch.mean if reduce is None else reduce,
        sync_dist=False,  # else this value is reduced, with what other ranks log here
        sync_dist_fn=trainer.strategy.reduce,
        batch_size=1,
        metric_attribute=entry["metric"],
        rank_zero_only=entry["rank_zero_only"],
    )
    result = results[f"{entry['fx']}.{entry['name']}"]
    result.meta.sync.should = entry["sync"]
    if plain and own:
        put_back_metric(result, entry["state"], module)
    elif plain:
        result.reset()
    result._forward_cache = _moved(entry["forward"], module)
    result.has_reset = entry["reset"]
    result._computed = None


# -- torchmetrics ----------------------------------------------------------------------


def metrics_state(module: torch.nn.Module) -> dict[str, Any]:
    """Of each metric in `module` that has seen something: a `state_dict` has none of it."""
    return {
        name: metric_state(part)
        for name, part in module.named_modules()
        if _is_metric(part) and part._update_count
    }


def put_back_metrics(module: torch.nn.Module, saved: Mapping[str, Any]) -> None:
    metrics: dict[str, Any] = {
        name: part for name, part in module.named_modules() if _is_metric(part)
    }
    for name, metric in metrics.items():
        if name in saved:
            put_back_metric(metric, saved[name], module)
        elif metric._update_count:
            metric.reset()


def _is_metric(part: Any) -> bool:
    return hasattr(part, "_defaults") and hasattr(part, "_update_count")


def metric_state(metric: Any) -> dict[str, Any]:
    return {
        "values": {name: _plain(getattr(metric, name)) for name in metric._defaults},
        "updates": metric._update_count,
    }


def put_back_metric(metric: Any, saved: Mapping[str, Any], module: Any) -> None:
    for name, value in saved["values"].items():
        setattr(metric, name, _moved(value, module))
    metric._update_count = saved["updates"]
    metric._computed = None


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, bool | int | float) else None


def _moved(value: Any, module: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(module.device)
    return [_moved(one, module) for one in value] if isinstance(value, list) else value
