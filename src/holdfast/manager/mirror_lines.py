"""What is said about a mirror that lacks something for good."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from holdfast.core.units import format_list
from holdfast.errors import HoldfastError, OtherRun

_MOST_STEPS = 4  # in one line


def only_here(run: str, mirror: str, steps: Sequence[int], *, known: bool | None) -> str:
    """`known`: whether they are known not to be there; None if the mirror was given up.

    >>> only_here("runs/x", "s3://b/x", [300, 200], known=True)
    'runs/x: step 300, 200: only here, not in s3://b/x; start again, or: holdfast sync runs/x s3://b/x'
    """
    some = ", ".join(f"{step:,}" for step in steps[:_MOST_STEPS])
    more = f" and {len(steps) - _MOST_STEPS} more" if len(steps) > _MOST_STEPS else ""
    if known is None:  # a line has said why, and what to do
        return f"{run}: step {some}{more}: only here, {mirror} is not used any more"
    where = "not in" if known else "perhaps not in"
    return (
        f"{run}: step {some}{more}: only here, {where} {mirror}; start again, or: "
        f"holdfast sync {shlex.quote(run)} {shlex.quote(mirror)}"
    )


def given_up(name: str, run: str, mirror: str, error: HoldfastError) -> str:
    """Why nothing is copied any more, and what to do; `name` is the run's for people."""
    hint = error.hint
    if isinstance(error, OtherRun):
        hint = (
            f"Training goes on without it. To go on from what is in {mirror}, start again "
            f"without {run}; else name another mirror."
        )
    told = format_list([hint]) if hint else ""
    return f"{name}: nothing is copied to its mirror any more: {error.message}{told}"
