"""Metrics between `run.log` and a checkpoint: whose step they belong to, and when they
become numbers.

What is logged in the body of a step belongs to that step; what is logged after an inner
loop, or in front of one, to the last completed step. Tensors are kept as detached copies
and read only when a save or a person asks for the number, so that logging does not wait
for a device.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from holdfast.errors import UsageError


class MetricBook:
    """The metrics of one run. `log` may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, Any] = {}
        """Logged in the body in progress."""
        self._known: dict[str, Any] = {}
        """Of the last completed step."""
        self._latest: dict[str, tuple[int, Any]] = {}
        """Name -> (completed steps when it was logged, value)."""

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Take values; raises UsageError for what is no number."""
        taken = {name: _take(name, value) for name, value in metrics.items()}
        with self._lock:
            self._open.update(taken)
            self._latest.update((name, (step, value)) for name, value in taken.items())

    @property
    def fresh(self) -> bool:
        """Whether anything was logged in the body in progress."""
        return bool(self._open)

    def settle(self, *, is_step: bool) -> dict[str, Any]:
        """A body ended (`is_step`: a new step is complete), or an inner loop starts.

        Returns what was logged since the last call, unread.
        """
        with self._lock:
            fresh, self._open = self._open, {}
            self._known = fresh if is_step else {**self._known, **fresh}
            return fresh

    def known(self) -> dict[str, float]:
        """The metrics of the last completed step, as numbers."""
        with self._lock:
            return read(self._known)

    def latest(self) -> dict[str, float]:
        """The newest value of each metric, whatever its step."""
        with self._lock:
            return read({name: value for name, (_, value) in self._latest.items()})

    def numbers(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """What `settle` returned, as numbers."""
        return read(metrics)

    def to_tree(self) -> dict[str, list[Any]]:
        """The newest values with their steps, for a checkpoint."""
        with self._lock:
            return {name: [step, number(value)] for name, (step, value) in self._latest.items()}

    def restore(self, tree: Mapping[str, Any], known: Mapping[str, float]) -> None:
        """Go on from a checkpoint's."""
        with self._lock:
            self._latest = {name: (int(step), value) for name, (step, value) in tree.items()}
            self._known = dict(known)
            self._open = {}


def read(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Numbers, waiting for the device where one is still computing them."""
    return {name: number(value) for name, value in metrics.items()}


def number(value: Any) -> float:
    """`value` as a float; `item` also takes arrays of one element."""
    return float(value.item() if hasattr(value, "item") else value)


def _take(name: str, value: Any) -> Any:
    """What can be turned into a number later, whatever the caller does to `value`."""
    if isinstance(value, int | float):
        return float(value)
    size = getattr(value, "numel", None) or getattr(value, "size", None)
    count = size() if callable(size) else size
    if isinstance(count, int) and count != 1:
        shape = tuple(getattr(value, "shape", ()))
        argument = f"{name}=value.mean()"
        if not name.isidentifier():
            argument = f"**{{{name!r}: value.mean()}}"
        raise UsageError(
            f"metric {name!r} has shape {shape}; a metric is one number",
            hint=f"Log a mean or a sum: run.log({argument}).",
        )
    if hasattr(value, "detach"):
        # A copy: `total += loss` would change the tensor that was logged. On a device
        # the copy is queued, not waited for.
        return value.detach().clone()
    if hasattr(value, "block_until_ready"):
        return value  # a JAX array: cannot change, may still be computed
    try:
        return number(value)
    except (TypeError, ValueError):
        raise UsageError(
            f"metric {name!r} is not a number: {type(value).__name__}",
            hint="Metrics are numbers or tensors with one element; keep other values in run.box.",
        ) from None
