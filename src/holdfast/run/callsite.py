"""Whether the program is still inside the body of a loop that it opened.

A loop that was left by `break` cannot tell: nothing is called. That matters when the
next loop opens: it is either nested in the body of the first or comes after it. The
call stack knows. When a loop is first advanced, the place of each `for` on the stack is
recorded; later it is compared with where the same frames are then. No frame is kept
alive: frames are compared by id and code.

Every answer may be None, "cannot be known": the loop is advanced with `next()`, or the
interpreter's bytecode is unlike what is expected.
"""

from __future__ import annotations

import dis
import inspect
import sys
from functools import lru_cache
from types import CodeType, FrameType
from typing import Any, NamedTuple

_MAX_DEPTH = 200


class _Place(NamedTuple):
    frame_id: int
    code: CodeType
    instruction: int


class Callsite:
    """Where a loop is driven from."""

    def __init__(self, caller: FrameType | None) -> None:
        self._places = _fors(caller)

    def cell_ended(self, current: FrameType | None) -> bool:
        """Whether the loop was at the top level of code that has ended while the
        process goes on: a cell of a notebook, a line at a prompt."""
        if not self._places or self._places[-1].code.co_name != "<module>":
            return False
        return self.frame(current) is None

    def frame(self, current: FrameType | None) -> FrameType | None:
        """The frame that the loop is in, if it is among the callers of `current`."""
        if not self._places:
            return None
        frame_id, code, _ = self._places[-1]
        # By its code too: a frame that has ended may leave its id to another one.
        found = (f for f in stack_of(current) if id(f) == frame_id and f.f_code is code)
        return next(found, None)

    def counters(self) -> list[str]:
        """What counts items around the loop, in the line of its `for`: it knows nothing of
        those that a resume leaves out.

        `enumerate(run.batches(loader))` does; `run.batches(enumerate(loader))` is fine.
        """
        return list(_counters(*self._places[-1][1:])) if self._places else []

    def targets(self) -> list[str]:
        """The names that the `for` assigns: what they hold before a body is of no account."""
        return list(_targets(*self._places[-1][1:])) if self._places else []

    def loop(self) -> tuple[CodeType, int] | None:
        """The code of the frame that `frame` gives, and the place of the `for` in it."""
        return self._places[-1][1:] if self._places else None

    def holds(self, current: FrameType | None, *, advancing: bool = False) -> bool | None:
        """Whether `current`, the calling frame, is in the loop's body.

        `advancing`: the loop fetching its next item counts as inside.
        """
        now = {id(frame): frame for frame in stack_of(current)}
        for place in self._places:
            frame = now.get(place.frame_id)
            if frame is None or frame.f_code is not place.code:
                if place.code.co_flags & inspect.CO_GENERATOR:
                    continue  # a wrapper such as tqdm's: suspended while the body runs
                return False  # the function that held the loop has returned
            end = loop_end(place.code, place.instruction)
            if end is None:
                return None
            inside = place.instruction < frame.f_lasti < end
            return inside or (advancing and frame.f_lasti == place.instruction)
        return None


def stack_of(frame: FrameType | None) -> list[FrameType]:
    """The frame and its callers, innermost first; at most 200."""
    frames: list[FrameType] = []
    while frame is not None and len(frames) < _MAX_DEPTH:
        frames.append(frame)
        frame = frame.f_back
    return frames


def variables_of(frame: FrameType) -> dict[str, Any]:
    """The local variables of `frame`, of a module all."""
    own = frame.f_locals
    variables = dict(own)
    # Until Python 3.13 the frame keeps what it gave us, and so all values in it, while it
    # runs: batches, graphs. Nobody else has that dict (the program may: `locals()`) if the
    # references are the frame's, our name and the argument.
    snapshot = isinstance(own, dict) and frame.f_code.co_flags & inspect.CO_OPTIMIZED
    if snapshot and sys.getrefcount(own) <= 3:
        own.clear()
    return variables


def _fors(caller: FrameType | None) -> list[_Place]:
    """Frames that are at a `for`, from the innermost to the first that is no generator."""
    places: list[_Place] = []
    for frame in stack_of(caller):
        if loop_end(frame.f_code, frame.f_lasti) is None:
            continue
        places.append(_Place(id(frame), frame.f_code, frame.f_lasti))
        if not frame.f_code.co_flags & inspect.CO_GENERATOR:
            break
    return places


@lru_cache(maxsize=256)
def loop_end(code: CodeType, instruction: int) -> int | None:
    """Where the `for` at `instruction` jumps to when it ends; None if there is none.

    Its body is what lies between, except for handlers of exceptions, which compilers
    put at the end of the function: a loop opened there is taken for one that follows.
    Advancing the first loop again then raises, so that nothing goes wrong silently.
    """
    for found in dis.get_instructions(code):
        if found.offset == instruction:
            if found.opname == "FOR_ITER" and isinstance(found.argval, int):
                return found.argval
            return None
    return None


_COUNTERS = frozenset({"enumerate", "islice", "zip"})
_LOOPS = frozenset({"batches", "epochs", "range"})


@lru_cache(maxsize=256)
def _counters(code: CodeType, instruction: int) -> tuple[str, ...]:
    instructions = list(dis.get_instructions(code))
    header = next(found.positions for found in instructions if found.offset == instruction)
    found: list[str] = []
    for one in instructions:
        # The `for` has the position of what it goes through.
        if one.offset >= instruction or not _within(one.positions, header):
            continue
        if one.opname in ("LOAD_ATTR", "LOAD_METHOD") and one.argval in _LOOPS:
            break  # what follows is inside of run.batches(...)
        if one.opname.startswith("LOAD_") and one.argval in _COUNTERS:
            found.append(one.argval)
    return tuple(found)


@lru_cache(maxsize=256)
def _targets(code: CodeType, instruction: int) -> tuple[str, ...]:
    found: list[str] = []
    for one in dis.get_instructions(code):
        if one.offset <= instruction or one.opname in ("UNPACK_SEQUENCE", "CACHE"):
            continue
        if not one.opname.startswith("STORE_") or "LOAD" in one.opname:
            break
        names = one.argval if isinstance(one.argval, tuple) else (one.argval,)
        found += [name for name in names if isinstance(name, str)]
    return tuple(found)


def _within(inner: dis.Positions | None, outer: dis.Positions | None) -> bool:
    if inner is None or outer is None or None in inner or None in outer:
        return False  # compiled without positions
    start, end = (inner.lineno, inner.col_offset), (inner.end_lineno, inner.end_col_offset)
    return (outer.lineno, outer.col_offset) <= start and end <= (
        outer.end_lineno,
        outer.end_col_offset,
    )
