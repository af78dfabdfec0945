"""A run's part in a rehearsal: it keeps to the script that `holdfast rehearse` gave it.

The command starts the program with the script in an environment variable. The run then
goes to a folder of the rehearsal instead of its own address, saves at fixed steps, writes
down what it sees at every boundary, dies when it is told to, and leaves after so many
steps. `holdfast.rehearse` compares what was written down.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec

from holdfast.core.rng import capture_rng
from holdfast.errors import UsageError
from holdfast.run.callsite import Callsite
from holdfast.run.survey import Entry, digest_of, survey

VARIABLE = "HOLDFAST_REHEARSAL"


class Part(msgspec.Struct, frozen=True):
    """What one process of a rehearsal is to do."""

    folder: str
    """Where the runs go, and `trace.jsonl`."""
    steps: int
    """Leave at the first boundary with so many completed steps."""
    every: int
    """Save at every so many steps, and at no other time."""
    process: int = 0
    """Which process of the rehearsal this is; for the trace."""
    die_in_step: int | None = None
    """In the body that follows so many completed steps."""
    die_after_s: float = 0.0
    """After the item was handed out."""
    signal: str = "SIGKILL"


class Started(msgspec.Struct, frozen=True, tag="started"):
    """A process came to its loop."""

    process: int
    run: str
    resumed: int | None
    """The step of the checkpoint."""


class Entered(msgspec.Struct, frozen=True, tag="entered"):
    """A body is about to run."""

    process: int
    run: str
    loop: str
    """Place of the loop whose body it is: "epochs#0/batches#0"."""
    step: int
    """Completed steps."""
    item: str
    """Digest of the item that the body is given."""
    random: dict[str, str]
    """Library -> digest of its global random state."""
    variables: list[Entry]
    """Of the frame that the loop is in, without what is tracked."""
    is_global: bool = False
    """Whether these are global variables, and not those of a function."""


class Completed(msgspec.Struct, frozen=True, tag="completed"):
    """A body has ended."""

    process: int
    run: str
    loop: str
    step: int
    """Completed steps, this one included."""
    metrics: dict[str, str]
    """Values as Python writes them: exact."""
    seconds: float
    """Since the body began."""


Line = Started | Entered | Completed


def part_of_this_process() -> Part | None:
    """The script in the environment; None if this is no rehearsal.

    Raises UsageError if it cannot be read: a rehearsal must not write to the real run.
    """
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    try:
        return msgspec.json.decode(text, type=Part)
    except msgspec.DecodeError as error:
        raise UsageError(
            f"{VARIABLE} is set and holds no script of a rehearsal: {error}",
            hint=f"Unset {VARIABLE}; it is set by `holdfast rehearse` alone.",
        ) from None


def address_in(part: Part, address: str) -> str:
    """Where a run goes instead of to `address`."""
    words = re.sub(r"[^A-Za-z0-9.=+-]+", "_", address).strip("._") or "run"
    return str(Path(part.folder, "runs", words))


def trace_path(folder: str | os.PathLike[str]) -> Path:
    """The file that all processes of one folder append to."""
    return Path(folder, "trace.jsonl")


def read_trace(folder: str | os.PathLike[str]) -> Iterator[Line]:
    """The lines that the processes of `folder` have written. A last line that a kill cut
    off is left out."""
    path = trace_path(folder)
    if not path.exists():
        return
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            yield msgspec.json.decode(line, type=Line)


class Recorder:
    """Writes the trace of one run in one process, and ends that process on time."""

    def __init__(self, part: Part, address: str) -> None:
        self.part = part
        self._run = Path(address).name
        self._trace = os.open(
            trace_path(part.folder), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644
        )
        self._began = 0.0

    def started(self, resumed: int | None) -> None:
        """The run's state was restored, or there was none."""
        self._write(Started(self.part.process, self._run, resumed))

    def entered(
        self,
        loop: str,
        step: int,
        item: Any,
        tracked: Mapping[str, Any],
        site: Callsite | None,
    ) -> None:
        """A body begins, with `step` steps complete. `site`: where its loop is."""
        frame = None if site is None else site.frame(sys._getframe())
        scope = _scope(frame)
        for name in site.targets() if site else ():
            scope.pop(name, None)
        states = capture_rng()
        frameworks: Any = states.pop("frameworks")
        self._write(
            Entered(
                process=self.part.process,
                run=self._run,
                loop=loop,
                step=step,
                item=digest_of(item),
                random={name: digest_of(state) for name, state in (states | frameworks).items()},
                variables=survey(scope, _parts(tracked)),
                is_global=frame is not None and frame.f_locals is frame.f_globals,
            )
        )
        self._began = time.monotonic()
        if step == self.part.die_in_step:
            threading.Thread(target=self._die, daemon=True).start()

    def completed(self, loop: str, step: int, metrics: Mapping[str, float]) -> None:
        """A body has ended; `step` steps are complete."""
        self._write(
            Completed(
                process=self.part.process,
                run=self._run,
                loop=loop,
                step=step,
                metrics={name: repr(value) for name, value in metrics.items()},
                seconds=time.monotonic() - self._began,
            )
        )

    def is_over(self, step: int) -> bool:
        """Whether the program has done its steps."""
        return step >= self.part.steps

    def _die(self) -> None:
        time.sleep(self.part.die_after_s)
        os.kill(os.getpid(), signal.Signals[self.part.signal])

    def _write(self, line: Line) -> None:
        # One write: a kill cuts off a line, if it does, and never mixes two.
        os.write(self._trace, msgspec.json.encode(line) + b"\n")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._trace)


def _scope(frame: FrameType | None) -> dict[str, Any]:
    """Variables that the loop's frame can reach by name."""
    if frame is None:
        return {}
    names = [name for name in frame.f_code.co_names if name in frame.f_globals]
    return {**{name: frame.f_globals[name] for name in names}, **frame.f_locals}


def _parts(value: Any) -> list[object]:
    """`value`, and what the containers in it hold."""
    if isinstance(value, Mapping):
        inner = list(value.values())
    else:
        inner = list(value) if isinstance(value, list | tuple) else []
    return [value, *(part for item in inner for part in _parts(item))]
