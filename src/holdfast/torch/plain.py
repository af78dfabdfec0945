"""Two functions for people who want no more: save a checkpoint, load it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from holdfast.core.address import Latest, parse_reference
from holdfast.errors import UntrackedParameters
from holdfast.torch.untracked import untracked_parameters

if TYPE_CHECKING:
    from holdfast.manager import CheckpointInfo, Restored

# The manager is imported in the functions: the adapter, which shares this package, must
# not pull it in.


def save_checkpoint(
    address: str | os.PathLike[str],
    *,
    model: torch.nn.Module,
    optimizer: Any = None,
    scheduler: Any = None,
    step: int,
    metrics: Mapping[str, float] | None = None,
    keep: str | None = "last=3",
    **more: Any,
) -> CheckpointInfo:
    """Save a model and what belongs to it, after `step` completed steps.

    Returns once the checkpoint is durable. `more` are further objects or plain values
    to save by name. The random states of Python, NumPy and torch are saved, too. `keep`
    says which older checkpoints of this run stay (None: all).

    Raises UnsupportedValue, UntrackedParameters if the optimizer trains parameters that
    neither `model` nor `more` holds, RunHeld if another process writes the run, StoreError.

    >>> model = torch.nn.Linear(2, 1)
    >>> save_checkpoint("memory://plain", model=model, step=10, epoch=1).ref
    'memory://plain@10'
    """
    from holdfast.manager import CheckpointManager

    state = _named(model, optimizer, scheduler, more)
    _check_complete(state)
    with CheckpointManager(address, keep=keep) as manager:
        return manager.save(step, state, metrics=metrics).result()


def load_checkpoint(
    address: str | os.PathLike[str],
    *,
    model: torch.nn.Module,
    optimizer: Any = None,
    scheduler: Any = None,
    strict: bool = True,
    rng: bool = True,
    **more: Any,
) -> Restored | None:
    """Restore what `save_checkpoint` saved into the live objects.

    `address` may name one checkpoint (`runs/a@best:val_loss`, `runs/a@1200`); else the
    newest intact one is taken. None if the run has no checkpoint yet. The result's
    `info.step` is the step to go on from; `values` holds the values of `more`, where
    plain ones stand for the default. Every byte is verified, and nothing live is
    touched before the names, shapes and dtypes were found to fit. `strict=False`
    leaves what differs as it is; what was saved and is not asked for is ignored.
    `rng=False` leaves the random states alone.

    Raises StructureMismatch, UntrackedParameters, NoIntactCheckpoint, CheckpointNotFound.

    >>> model = torch.nn.Linear(2, 1)
    >>> _ = save_checkpoint("memory://plain2", model=model, step=10, epoch=1)
    >>> restored = load_checkpoint("memory://plain2", model=model, epoch=0)
    >>> restored.info.step, restored.values["epoch"]
    (10, 1)
    """
    from holdfast.manager import CheckpointManager

    reference = parse_reference(os.fspath(address))
    # The latest is asked for without a name: only then a damaged one is passed over.
    ref = None if isinstance(reference.selector, Latest) else str(reference.selector)
    into = _named(model, optimizer, scheduler, more)
    if strict:
        _check_complete(into)
    with CheckpointManager(reference.address, keep=None) as manager:
        return manager.restore(into, ref, strict=strict, only=tuple(into), rng=rng)


def _named(
    model: torch.nn.Module, optimizer: Any, scheduler: Any, more: Mapping[str, Any]
) -> dict[str, Any]:
    named = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    return {**{name: value for name, value in named.items() if value is not None}, **more}


def _check_complete(named: Mapping[str, Any]) -> None:
    if found := untracked_parameters(named):
        raise UntrackedParameters(found)
