"""Every error that Holdfast raises, and the exit status the CLI gives it.

An error says what happened and where in its message, and what to do next in
`hint`. Both are shown by `str(error)`; the CLI prints them as `Error:` and
`Hint:`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

_STDLIB = os.path.dirname(os.__file__)
_OURS = (
    os.path.dirname(__file__) + os.sep,
    os.path.join(_STDLIB, "contextlib.py"),
    os.path.join(_STDLIB, "concurrent", ""),
)
"""Where our own calls are; those of context managers and thread pools are in between."""
_P = ParamSpec("_P")
_T = TypeVar("_T")

logger = logging.getLogger("holdfast")


class HoldfastError(Exception):
    """Base of every error of ours. `exit_code` is what the CLI exits with."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nHint: {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors go from rank to rank as pickles, whatever their class was made with.
        return _again, (type(self), self.args, self.__dict__)


def _again(kind: type[HoldfastError], args: tuple[Any, ...], fields: dict[str, Any]) -> Any:
    error = kind.__new__(kind, *args)
    error.__dict__.update(fields)
    return error


def brief(error: HoldfastError) -> HoldfastError:
    """The error, to be raised again where the user's code called ours: its traceback shows
    none of our own calls below, which the log has at level DEBUG.

    It stays whole if code of others is among them, such as a state_dict that raised.
    """
    trace = error.__traceback__
    while trace is not None:
        if not trace.tb_frame.f_code.co_filename.startswith(_OURS):
            return error
        trace = trace.tb_next
    logger.debug("raised here: %s", error.message, exc_info=error)
    return error.with_traceback(None)


def briefly(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Let the errors of `function`, one that users call, be `brief`."""

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return function(*args, **kwargs)
        except HoldfastError as error:
            raise brief(error)  # noqa: B904 -- it is the same error

    return call


DIFFERENT = 5
"""What `holdfast diff` and `holdfast rehearse` exit with where the two differ. Not 1, as `diff`
has it: 1 is an error, and a script must not take a checkpoint that is not there for one that
differs."""

# -- addresses and settings ---------------------------------------------------


class UsageError(HoldfastError):
    """An argument is wrong: nothing was read or changed."""

    exit_code = 2


class BadAddress(UsageError):
    """A run address or a checkpoint reference cannot be parsed."""


class BadPolicy(UsageError):
    """`every=` or `keep=` cannot be parsed."""


class ConfigChanged(UsageError):
    """The run was started with another `config`."""


# -- stores -------------------------------------------------------------------


class StoreError(HoldfastError):
    """A store could not do what was asked."""


class StoreUnavailable(StoreError):
    """The store did not answer, or answered with a passing error.

    After a write raised this its outcome is *unknown*: the object may be there,
    may be absent, or may still arrive. Trying again may help.
    """


class StoredWrong(StoreUnavailable):
    """The store created the object and holds other bytes than it was given: at this key, for
    ever. Nobody else's object is there."""


class StoreFull(StoreUnavailable):
    """No space is left (ENOSPC, EDQUOT, EFBIG)."""


class StoreReadOnly(StoreError):
    """The store cannot be written by this user."""


class StoreUnfit(StoreError):
    """The store lacks an operation that safe commits need; only reading is allowed."""


class ObjectNotFound(StoreError):
    """There is no object at this key."""

    def __init__(self, key: str, store: str) -> None:
        super().__init__(f"no object {key!r} in {store}")
        self.key = key


class NoStore(StoreError):
    """There is no run at this address."""

    exit_code = 10


# -- damage -------------------------------------------------------------------


class CorruptionError(HoldfastError):
    """Stored bytes are not what was written. They were not used."""

    exit_code = 4


class DamagedObject(CorruptionError):
    """An object of the run is damaged: wrong digest, truncated, or malformed."""

    def __init__(self, key: str, reason: str, *, leaf: str = "", hint: str = "") -> None:
        where = f"{leaf!r} in {key}" if leaf else key
        super().__init__(f"{where} is damaged: {reason}", hint=hint)
        self.key = key
        self.reason = reason
        self.leaf = leaf
        self.brief = f"{where}: {reason}"
        """Below a heading that speaks of damage already."""


class NoIntactCheckpoint(CorruptionError):
    """Checkpoints exist, but none of them is intact."""


class FormatTooNew(HoldfastError):
    """The run was written by a newer Holdfast."""


class UnknownFile(HoldfastError):
    """A file is of no kind that can be described."""


# -- commits ------------------------------------------------------------------


class RunHeld(HoldfastError):
    """Another live process on this machine writes the run."""

    exit_code = 11


class OtherRun(HoldfastError):
    """What is at the address is no copy of the run: nothing of the two is mixed."""


class CopyStopped(HoldfastError):
    """A copy was told to stop before it was complete. What it copied is used next time."""


class Fenced(HoldfastError):
    """A newer process took the run over; this one can no longer commit."""

    exit_code = 11


class CommitUnknown(HoldfastError):
    """A commit was sent but could not be confirmed. It was not reported as saved."""


class BaseLost(HoldfastError):
    """A pack that a save wanted to reuse is gone; the save must write it anew."""

    def __init__(self, packs: Sequence[str]) -> None:
        super().__init__(f"packs to reuse are no longer live: {', '.join(packs)}")
        self.packs = tuple(packs)


class CheckpointRemoved(HoldfastError):
    """The checkpoint was removed while it was being read."""


class CheckpointNotFound(HoldfastError):
    """The run has no checkpoint that this reference names."""


class CheckpointProtected(HoldfastError):
    """A checkpoint that was to be removed is one that no rule would remove."""


class RunClosed(HoldfastError):
    """The run or manager was closed."""


class SaveFailed(HoldfastError):
    """A save failed; earlier checkpoints are whole."""


class TornRead(SaveFailed):
    """State changed while it was being read for a save; `leaves` are their paths, which are
    copied at once from now on."""

    def __init__(self, leaves: Sequence[str]) -> None:
        more = f" and {len(leaves) - 1:,} more" if len(leaves) > 1 else ""
        super().__init__(
            f"{leaves[0]!r}{more} changed while it was being saved, before the optimizer's step",
            hint="Nothing needs to be done: from the next save on it is copied first.",
        )
        self.leaves = tuple(leaves)


# -- state --------------------------------------------------------------------


class StateError(HoldfastError):
    """The state cannot be captured or applied."""


class UnsupportedValue(StateError):
    """A value in the state has a type that cannot be stored without pickle."""

    def __init__(self, path: str, kind: str, *, hint: str) -> None:
        super().__init__(f"cannot save {path!r}: it is a {kind}", hint=hint)
        self.path = path
        self.kind = kind


class PickleRefused(StateError):
    """The checkpoint holds pickled values and the caller did not allow them."""


class StructureMismatch(StateError):
    """The live objects and the checkpoint do not have the same leaves."""

    def __init__(
        self,
        message: str,
        *,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        changed: Sequence[str] = (),
        hint: str = "",
    ) -> None:
        super().__init__(message, hint=hint)
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.changed = tuple(changed)


class UnsafePlace(HoldfastError):
    """A job that runs here would lose work when it is stopped (`holdfast doctor`)."""

    exit_code = 6


class GroupError(HoldfastError):
    """Processes that train together do not agree, or one of them did not come."""


class LoopError(HoldfastError):
    """The training loop is used in a way that cannot be resumed exactly."""


class Preempted(HoldfastError):
    """The run was asked to stop, saved, and can be started again (notebooks).

    Scripts exit with status 75 instead.
    """

    exit_code = 75


class LoaderInterrupted(HoldfastError):
    """A worker of the data loader died before it delivered the next batch.

    No batch was handed out: the state is that of the last completed step.
    """


_PARAMETERS_SHOWN = 10  # of what may be thousands


class UntrackedParameters(StateError):
    """Optimizers train parameters that no checkpoint would hold: a resumed run would go
    on with old moments and new parameters."""

    def __init__(self, parameters: Sequence[str]) -> None:
        lines = ["trained, but not tracked, so that no checkpoint would hold them:"]
        lines += parameters[:_PARAMETERS_SHOWN]
        if len(parameters) > _PARAMETERS_SHOWN:
            lines.append(f"... and {len(parameters) - _PARAMETERS_SHOWN} more")
        super().__init__(
            "\n  ".join(lines),
            hint="Track the module that owns them, or the tensors themselves: "
            "run.track(extra=tensor), or save_checkpoint(..., extra=tensor).",
        )
        self.parameters = tuple(parameters)
