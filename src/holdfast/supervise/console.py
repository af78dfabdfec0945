"""What the supervisor prints: a line per event, and on a terminal one that shows how it is."""

from __future__ import annotations

import shutil
from typing import TextIO

from holdfast.core.units import format_duration, format_seconds
from holdfast.supervise.machine import State

_REDRAW_S = 1.0
_ERASE = "\r\x1b[K"


class Console:
    """Prints to `stream`, which may be closed or a pipe that nobody reads: a job must not end
    of that."""

    def __init__(self, stream: TextIO | None, *, status: bool) -> None:
        self._stream = stream
        self._status = status and _is_terminal(stream)
        self._drawn = False
        self._due_s = 0.0

    def say(self, line: str) -> None:
        """One event."""
        self.erase()
        self._write(f"holdfast run: {_safe(line)}\n")

    def draw(self, state: State, now_s: float, saved_s: float | None) -> None:
        """Show the status, if it is time; `saved_s` is when the newest checkpoint was seen."""
        if not self._status or now_s < self._due_s:
            return
        self._due_s = now_s + _REDRAW_S
        width = shutil.get_terminal_size().columns
        line = _safe(status_line(state, now_s, saved_s))[: width - 1]
        # The cursor goes back to the start: what the command prints next begins there.
        self._write(f"{_ERASE}{line}\r")
        self._drawn = True

    def erase(self) -> None:
        """Take the status away."""
        if self._drawn:
            self._drawn = False
            self._write(_ERASE)

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            self._stream = None


def status_line(state: State, now_s: float, saved_s: float | None) -> str:
    """How it is going.

    >>> from holdfast.supervise.machine import Life
    >>> life = Life(beats=9, in_loop=True, phase="training", step=4321)
    >>> state = State(0.0, phase="running", attempt=2, alive_s=99.0, life=life)
    >>> status_line(state, 100.0, 40.0)
    '[step 4,321 | checkpoint 1 min ago | 1 restart | 2 min]'
    """
    parts: list[str] = []
    if state.phase == "waiting":
        parts.append(f"starting again in {format_seconds(max(0.0, state.start_at_s - now_s))}")
    elif state.life.beats:
        parts.append(f"step {state.life.step:,}")
        if state.life.phase not in ("training", ""):
            parts.append(state.life.phase)
        if state.life.in_loop and now_s - state.alive_s >= 10:
            parts.append(f"no heartbeat for {format_duration(now_s - state.alive_s)}")
    else:
        parts.append("no heartbeat yet")
    if saved_s is not None:
        parts.append(f"checkpoint {format_duration(now_s - saved_s)} ago")
    parts.append("1 restart" if state.restarts == 1 else f"{state.restarts:,} restarts")
    parts.append(format_duration(now_s - state.began_s))
    return f"[{' | '.join(parts)}]"


def _safe(line: str) -> str:
    """Addresses may hold anything; a terminal must show escapes, not obey them."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False
