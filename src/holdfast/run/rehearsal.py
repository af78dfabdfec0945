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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import msgspec

from holdfast.core.group import ALONE, Ranks
from holdfast.core.rng import capture_rng
from holdfast.errors import UsageError
from holdfast.run.callsite import Callsite, stack_of
from holdfast.run.installed import is_installed
from holdfast.run.survey import Entry, digest_of, survey

VARIABLE = "HOLDFAST_REHEARSAL"
_PR_SET_PDEATHSIG = 1


class Part(msgspec.Struct, frozen=True):
    """What one process of a rehearsal is to do."""

    folder: str
    """Where the runs go, and the traces."""
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
    victim: int = 0
    """Of N ranks the one of this number modulo N+1 dies; for N all of them do."""


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
    by_framework: bool = False
    """Whether a framework goes through the loop. The variables are then those of the function
    that called it, and what its callbacks hold, by their classes."""


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


class Dying(msgspec.Struct, frozen=True, tag="dying"):
    """A process ends itself, as it was told to."""

    process: int
    run: str
    loop: str
    step: int


Line = Started | Entered | Completed | Dying


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


def trace_path(folder: str | os.PathLike[str], rank: int = 0) -> Path:
    """The file that all processes of one folder append to; each rank has its own."""
    return Path(folder, f"trace-{rank}.jsonl")


def ranks_in(folder: str | os.PathLike[str]) -> int:
    """How many ranks have written there."""
    return len(list(Path(folder).glob("trace-*.jsonl")))


def read_trace(folder: str | os.PathLike[str], rank: int = 0) -> Iterator[Line]:
    """The lines that the processes of `folder` have written as this rank. A last line that a kill
    cut off is left out."""
    path = trace_path(folder, rank)
    if not path.exists():
        return
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            yield msgspec.json.decode(line, type=Line)


class Beside(NamedTuple):
    """What is in the hands of a framework that goes through a loop."""

    callbacks: Sequence[object]
    """All that it calls; those of the program's own classes are looked at."""
    known: Sequence[object]
    """What the adapter answers for: the model, the trainer."""


class Recorder:
    """Writes the trace of one run in one process, and ends that process on time."""

    def __init__(self, part: Part, address: str) -> None:
        self.part = part
        self.ranks = ALONE
        """This process's, from `meet` on."""
        self._run = Path(address).name
        self._trace: int | None = None
        self._began = 0.0
        self._look: Callable[[], Beside] | None = None

    def meet(self, ranks: Ranks) -> None:
        """Before anything is told: who trains together. Raises UsageError."""
        self.ranks = ranks
        if ranks.size > 1:
            if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
                raise UsageError(
                    "torchrun starts the ranks again by itself, and a rehearsal wants to",
                    hint="Leave --max-restarts out for the rehearsal.",
                )
            _die_with_parent()

    def look_at(self, look: Callable[[], Beside]) -> None:
        """A framework goes through the loops that follow and that no `for` of the program's goes
        through; `look` says what is beside it."""
        self._look = look

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
        by_framework = self._look is not None if frame is None else not _is_own(frame)
        beside = self._look() if by_framework and self._look is not None else Beside((), ())
        if by_framework:
            # What a framework's function holds is its own matter.
            frame = next((one for one in stack_of(sys._getframe()) if _is_own(one)), None)
        scope = _scope(frame)
        for name in site.targets() if site and not by_framework else ():
            scope.pop(name, None)
        known = [*_parts(tracked), *beside.known]
        named = {id(value) for value in scope.values()}
        callbacks = [one for one in beside.callbacks if id(one) not in named]
        variables = survey(scope, [*known, *callbacks], own=by_framework)
        variables += survey(_by_class(callbacks), known, own=True)
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
                variables=variables,
                is_global=frame is not None and frame.f_locals is frame.f_globals,
                by_framework=by_framework,
            )
        )
        self._began = time.monotonic()
        victim = self.part.victim % (self.ranks.size + 1)
        if step == self.part.die_in_step and victim in (self.ranks.rank, self.ranks.size):
            dying = Dying(self.part.process, self._run, loop, step)
            threading.Thread(target=self._die, args=(dying,), daemon=True).start()

    def completed(self, loop: str, step: int, metrics: Mapping[str, float]) -> None:
        """A body has ended; `step` steps are complete."""
        if self.ranks.rank:
            metrics = {}  # a checkpoint has those of rank 0, and all go on with them
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

    def _die(self, dying: Dying) -> None:
        time.sleep(self.part.die_after_s)
        self._write(dying)
        os.kill(os.getpid(), signal.Signals[self.part.signal])

    def _write(self, line: Line) -> None:
        if self._trace is None:
            path = trace_path(self.part.folder, self.ranks.rank)
            self._trace = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        # One write: a kill cuts off a line, if it does, and never mixes two.
        os.write(self._trace, msgspec.json.encode(line) + b"\n")

    def close(self) -> None:
        trace, self._trace = self._trace, None
        if trace is not None:
            with contextlib.suppress(OSError):
                os.close(trace)


def _die_with_parent() -> None:
    """A rank has a session of its own, where a rehearsal that gives up does not reach it: it is
    to die with its launcher."""
    if sys.platform != "linux":
        return
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def _is_own(frame: FrameType) -> bool:
    """Whether a frame is of the program's own code."""
    module = str(frame.f_globals.get("__name__", ""))
    return module.partition(".")[0] != "holdfast" and not is_installed(module)


def _by_class(callbacks: Iterable[object]) -> dict[str, object]:
    found: dict[str, object] = {}
    counts = Counter[str]()
    for callback in callbacks:
        name = type(callback).__name__
        counts[name] += 1
        if not is_installed(type(callback).__module__):
            found[name if counts[name] == 1 else f"{name}-{counts[name]}"] = callback
    return found


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
