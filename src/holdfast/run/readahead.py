"""Whether something between a loop and its body asks for item 1 before it hands out item 0.

Being asked for the next item is the only sign that a body was completed. A wrapper that
reads ahead (a prefetcher around `run.batches`) gives that sign too early, and a resume would
skip a step that was never trained. So the first two items of each loop are watched:

* The frames between the loop and the frame that made it are those of wrappers if there are
  generators or methods of the iteration protocol among them. Without any, nothing is done.
* Else the outermost of them must hand something out (yield, or return from `__next__`)
  between the two items. A trace function sees that. It is there from the first item to the
  moment it is handed out, and does nothing but notice it. Where another trace function is
  at work (a debugger, coverage), nothing is watched.
* An object that took the first item in its `__init__`, `__iter__` or `__enter__` has handed
  it out when a later call of one of its methods returns.

A wrapper that drops items asks twice as well, and may: see `_only_drops`.
"""

from __future__ import annotations

import dis
import inspect
import os
import sys
from functools import lru_cache
from types import CodeType, FrameType
from typing import Any, NamedTuple

from holdfast.run.callsite import loop_end, stack_of

_PRELOADS = frozenset({"__init__", "__post_init__", "__iter__", "__enter__"})
"""Methods that hand out no item. `__iter__` may be a generator: that one does."""
_HELPERS = 3
"""How many functions deep a wrapper may call for an item, where it cannot be known which
frame made the loop."""
_MAX_CALLS = 20_000
"""Calls that are traced between an object's construction and its first item (some
milliseconds); then the watch is given up."""


class Origin(NamedTuple):
    """Where a loop was made. Holds no frame."""

    frame_id: int
    code: CodeType
    thread: int

    def depth_in(self, stack: list[FrameType]) -> int | None:
        """Where the frame is in `stack`; None if it has returned."""
        for depth, frame in enumerate(stack):
            if id(frame) == self.frame_id and frame.f_code is self.code:
                return depth
        return None

    def frame(self, current: FrameType) -> FrameType | None:
        """The frame itself, if it is `current` or among its callers."""
        stack = stack_of(current)
        depth = self.depth_in(stack)
        return None if depth is None else stack[depth]


class ReadAhead:
    """Watches what becomes of the first item of a loop, until `check` or `stop`."""

    def __init__(self, frames: list[FrameType]) -> None:
        """`frames`: from the caller of the loop to the outermost wrapper."""
        outermost = frames[-1]
        self._first: FrameType | None = outermost
        self._places = _places(frames)
        self._inside: FrameType | None = outermost
        self._self = ""
        self._owner: object = None
        """Of the method that took the first item without handing it out, and what the
        method calls it: a function that is given the object calls it something else."""
        if _preloads(outermost.f_code) and outermost.f_code.co_argcount:
            self._self = outermost.f_code.co_varnames[0]
            self._owner = outermost.f_locals.get(self._self)
        self._calls_left = _MAX_CALLS
        self._tracer = self._on_call  # one object, to be recognised
        outermost.f_trace = self._on_leave
        outermost.f_trace_lines = False
        sys.settrace(self._tracer)

    @classmethod
    def start(cls, caller: FrameType, origin: Origin | None) -> ReadAhead | None:
        """Watch, if the frame that asked for the first item is not the body's own.

        The last thing to do before the item is returned: calls are traced from here on.
        """
        frames = _wrappers(caller, origin)
        if not frames or sys.gettrace() is not None:
            return None
        return cls(frames)

    def check(self, caller: FrameType, *, active: bool) -> str:
        """At the second item, asked for by `caller`: who reads ahead, "" if nobody does or
        it cannot be known. `active`: something happened that only a body does."""
        inside = self._inside
        watched = sys.gettrace() is self._tracer
        first = self._first
        self.stop()
        if inside is None or not watched:
            return ""
        frames = stack_of(caller)
        if inside not in frames:
            return ""
        frames = frames[: frames.index(inside) + 1]
        if inside is not first:
            # A method of an object that took the first item when it was made. One that
            # iterates itself, a trainer's `fit`, is where the body is.
            if not _is_wrapper(inside.f_code) and (active or _at_for(caller)):
                return ""
        elif _places(frames) == self._places and (active or _only_drops(frames)):
            return ""
        return _described(frames)

    def stop(self) -> None:
        """Leave no trace function behind. Safe to call at any time."""
        if sys.gettrace() is self._tracer:
            sys.settrace(None)
        if self._inside is not None:
            self._forget(self._inside)
        self._first = self._owner = None

    def _forget(self, frame: FrameType) -> None:
        self._inside = None
        frame.f_trace = None
        frame.f_trace_lines = True

    # -- trace functions: they must not raise ------------------------------------------

    def _on_call(self, frame: FrameType, event: str, arg: Any) -> Any:
        """The thread's: every call of a Python function while an item is on its way."""
        self._calls_left -= 1
        if self._calls_left < 0:
            self.stop()
        elif (
            self._inside is None
            and self._owner is not None
            and not _preloads(frame.f_code)
            and frame.f_code.co_varnames[:1] == (self._self,)
            and frame.f_locals.get(self._self) is self._owner
        ):
            self._inside = frame
            frame.f_trace_lines = False
            return self._on_leave
        return None

    def _on_leave(self, frame: FrameType, event: str, arg: Any) -> Any:
        """That of the outermost frame of the wrappers."""
        if event != "return" or frame is not self._inside:
            return self._on_leave
        if _hands_out(frame.f_code, arg, self._owner):
            self.stop()
        else:
            self._forget(frame)
            if self._owner is None:
                self.stop()
        return None


# -- frames ------------------------------------------------------------------------------


def _wrappers(caller: FrameType, origin: Origin | None) -> list[FrameType]:
    """The frames from the caller of a loop to the outermost wrapper; [] if there is none."""
    stack = stack_of(caller)
    made_at = None if origin is None else origin.depth_in(stack)
    found = 0
    for depth, frame in enumerate(stack[:made_at]):
        if _is_wrapper(frame.f_code):
            found = depth + 1
        elif made_at is None and (found or _at_for(frame) or depth >= _HELPERS):
            break  # the body is there
    return stack[:found]


def _is_wrapper(code: CodeType) -> bool:
    """Whether a frame of `code` stands between an iterator and who uses it."""
    if code.co_flags & inspect.CO_GENERATOR:
        return code.co_name != "<genexpr>"  # cannot read ahead, and may be the body
    return code.co_name == "__next__" or code.co_name in _PRELOADS


def _preloads(code: CodeType) -> bool:
    return code.co_name in _PRELOADS and not code.co_flags & inspect.CO_GENERATOR


def _hands_out(code: CodeType, result: object, owner: object) -> bool:
    """Whether `result`, which a frame of `code` yields or returns, can be an item."""
    if code.co_flags & inspect.CO_GENERATOR or code.co_name in ("__next__", "__call__"):
        return True
    if code.co_name.startswith("__"):
        return False
    return result is not None and result is not owner and not isinstance(result, bool)


def _at_for(frame: FrameType) -> bool:
    return loop_end(frame.f_code, frame.f_lasti) is not None


def _places(frames: list[FrameType]) -> list[tuple[CodeType, int]]:
    return [(frame.f_code, frame.f_lasti) for frame in frames]


def _only_drops(frames: list[FrameType]) -> bool:
    """Whether wrappers that asked twice at one place of their code have dropped an item.

    One that reads ahead has an item left when the loop has ended, so it yields behind its
    `for` too. A generator that yields only inside the `for` that it is at cannot.
    """
    return all(_yields_only_inside(frame.f_code, frame.f_lasti) for frame in frames)


@lru_cache(maxsize=256)
def _yields_only_inside(code: CodeType, instruction: int) -> bool:
    end = loop_end(code, instruction)
    if end is None or not code.co_flags & inspect.CO_GENERATOR:
        return False
    return all(
        instruction < found.offset < end
        for found in dis.get_instructions(code)
        if found.opname == "YIELD_VALUE"
    )


def _described(frames: list[FrameType]) -> str:
    """The wrappers among `frames`, for people."""
    codes = [frame.f_code for frame in frames if _is_wrapper(frame.f_code)]
    return " in ".join(
        f"{code.co_qualname} ({os.path.basename(code.co_filename)}:{code.co_firstlineno})"
        for code in codes
    )
