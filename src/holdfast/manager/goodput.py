"""Where a run's time went: what its history comes to.

Pure, but for `of_run`. Each writer of the run is an *attempt*: it starts up, goes on with the
loop, and ends. Every second of an attempt's loop whose steps a later attempt had to do once more
is lost to replay, in the attempt that lost it. docs/goodput.md defines the parts. Lines may be
missing, in any order, and of hosts whose clocks differ: durations are taken within one attempt,
and no time between two attempts is less than nothing, so the parts always come to `wall_s`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec

from holdfast.core.interval import Failures
from holdfast.core.process import is_alive
from holdfast.errors import CorruptionError
from holdfast.manager.history import (
    BeatEvent,
    EndEvent,
    Event,
    FallbackEvent,
    NoticeEvent,
    SaveEvent,
    StartEvent,
)
from holdfast.repo.repo import Repo

PLANNED = frozenset({"finished", "interrupted", "closed"})
"""Ends that somebody wanted: what follows is a pause, and they are no failures."""
CRASHED = "crashed"
"""There is no word of its end: SIGKILL, or the machine went away."""
RUNNING = "running"
UNKNOWN = "unknown"
"""It may be running, on another machine."""

_OWN = PLANNED | {"preempted", "error"}  # what a process says of itself
_LATEST_S = 1e12


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One process's part of a run. Times are Unix times, `_s` besides them seconds."""

    epoch: int
    host: str
    pid: int
    began_s: float
    """The process began."""
    start_s: float
    """Its loop went on."""
    end_s: float
    """It ended, or was last heard of."""
    from_step: int
    to_step: int
    """The last one that is known to be completed."""
    kept_step: int
    """Up to which nothing was done once more."""
    end: str
    """Why it ended, "crashed", "running" or "unknown"."""
    text: str
    """More of that, for people."""
    exit_code: int | None
    signal: int
    startup_s: float
    productive_s: float
    saving_s: float
    replay_s: float
    """Its part whose steps were done once more by a later one."""
    down_s: float
    """Until the next one began, as far as it was down for certain, and what it hung."""
    unknown_s: float
    """Until the next one began, but it may have been training for a part of it."""
    paused_s: float
    """Until the next one began, after an end that was planned."""

    @property
    def replayed_steps(self) -> int:
        return self.to_step - self.kept_step

    @property
    def planned(self) -> bool:
        return self.end in PLANNED


class Goodput(msgspec.Struct, frozen=True, kw_only=True):
    """Where the time went from the first process's start to the last one's end. The parts are
    `productive_s`, `saving_s`, `replay_s`, `restart_s` and `unknown_s`: they come to `wall_s`."""

    attempts: tuple[Attempt, ...]
    """In their order."""
    wall_s: float
    """Without pauses."""
    productive_s: float
    """The loop went on, with steps that were kept."""
    saving_s: float
    """It stood still for a save."""
    replay_s: float
    """It did what had to be done once more."""
    restart_s: float
    """`down_s` and `startup_s`."""
    down_s: float
    """Nothing ran, or what ran hung."""
    startup_s: float
    """A process ran, but its loop did not go on yet; the first one's, too."""
    unknown_s: float
    """It trained in vain, or was down: when a process was killed is not always known."""
    paused_s: float
    """In no part: between an end that was planned and the next start."""
    replayed_steps: int
    failures: dict[str, int]
    """Ends that were not planned, by their kind."""
    notices: int
    fallbacks: int

    @property
    def fraction(self) -> float | None:
        """Of the time; None where there was none."""
        return min(self.productive_s / self.wall_s, 1.0) if self.wall_s > 0 else None


@dataclass
class _Told:
    """The events of one writer."""

    starts: list[StartEvent] = field(default_factory=list[StartEvent])
    ends: list[EndEvent] = field(default_factory=list[EndEvent])
    beats: list[BeatEvent] = field(default_factory=list[BeatEvent])
    saves: list[SaveEvent] = field(default_factory=list[SaveEvent])


def goodput(
    events: Iterable[Event], *, now_s: float | None = None, running: int | None = None
) -> Goodput | None:
    """What `events` come to, in any order; None where no start was recorded.

    The writer `running`, an epoch, may be alive: its attempt goes on until `now_s`, or, if that
    is None, nothing is known of its end.
    """
    events = [event for event in events if abs(event.time_s) <= _LATEST_S]
    told = _by_writer(events)
    attempts = _attempts(told, now_s, running)
    if not attempts:
        return None
    down = sum(one.down_s for one in attempts)
    startup = sum(one.startup_s for one in attempts)
    parts = {
        "productive_s": sum(one.productive_s for one in attempts),
        "saving_s": sum(one.saving_s for one in attempts),
        "replay_s": sum(one.replay_s for one in attempts),
        "restart_s": down + startup,
        "unknown_s": sum(one.unknown_s for one in attempts),
    }
    going = {RUNNING, UNKNOWN}
    failed = Counter(one.end for one in attempts if not one.planned and one.end not in going)
    return Goodput(
        attempts=tuple(attempts),
        wall_s=sum(parts.values()),
        **parts,
        down_s=down,
        startup_s=startup,
        paused_s=sum(one.paused_s for one in attempts),
        replayed_steps=sum(one.replayed_steps for one in attempts),
        failures=dict(sorted(failed.items())),
        notices=sum(isinstance(event, NoticeEvent) for event in events),
        fallbacks=sum(isinstance(event, FallbackEvent) for event in events),
    )


def of_run(repo: Repo, events: Iterable[Event], now_s: float) -> Goodput | None:
    """What the `events` of a run come to, whose writer may be alive."""
    head = None
    with suppress(CorruptionError):  # of the log
        head = repo.head()
    holder = head.entry.holder if head else None
    alive = is_alive(holder) if holder else False
    running = None if head is None or alive is False else head.entry.epoch
    return goodput(events, now_s=now_s if alive else None, running=running)


def failures(events: Iterable[Event], *, running: int | None = None) -> Failures:
    """How often the loop ended without being asked to by its program or its user, and for how
    long it went on in all. An attempt that says nothing of its end has failed, but for that of
    the writer `running`, an epoch."""
    found = goodput(events, now_s=-_LATEST_S, running=running)
    if found is None:
        return Failures(0, 0.0)
    observed = sum(one.end_s - one.start_s for one in found.attempts)
    return Failures(sum(found.failures.values()), observed)


def _by_writer(events: Iterable[Event]) -> dict[int, _Told]:
    told: dict[int, _Told] = {}
    for event in events:
        writer = told.setdefault(event.epoch, _Told())
        match event:
            case StartEvent():
                writer.starts.append(event)
            case EndEvent():
                writer.ends.append(event)
            case BeatEvent():
                writer.beats.append(event)
            case SaveEvent():
                writer.saves.append(event)
            case _:
                pass
    return dict(sorted(told.items()))


def _attempts(told: dict[int, _Told], now_s: float | None, running: int | None) -> list[Attempt]:
    started = [epoch for epoch, writer in told.items() if writer.starts]
    spans = [_Span(epoch, told[epoch], epoch == running, now_s) for epoch in started]
    attempts: list[Attempt] = []
    kept: int | None = None  # what later ones went on from
    following: _Span | None = None
    for at in reversed(range(len(spans))):
        span, previous = spans[at], spans[at - 1] if at else None
        attempts.append(
            span.attempt(
                previous,
                following,
                kept,
                doubtful=following is not None and _trained_between(told, span, following),
            )
        )
        kept = span.from_step if kept is None else min(kept, span.from_step)
        following = span
    return attempts[::-1]


def _trained_between(told: dict[int, _Told], span: _Span, following: _Span) -> bool:
    """Whether a writer that has left no start may have trained: its lines were lost."""
    between = range(span.epoch + 1, following.epoch)
    if len(between) > len(told):
        return True
    return any(epoch not in told or told[epoch].saves or told[epoch].beats for epoch in between)


class _Span:
    """What is known of one attempt alone."""

    def __init__(self, epoch: int, told: _Told, live: bool, now_s: float | None) -> None:
        self.epoch = epoch
        self.start = start = min(told.starts, key=lambda start: (start.time_s, start.began_s))
        self.from_step = start.step
        self.start_s = start.time_s
        self.began_s = min(start.began_s, self.start_s)
        self.saves = sorted(
            (save for save in told.saves if save.time_s >= self.start_s),
            key=lambda save: save.time_s,
        )
        own = [end for end in told.ends if not (end.pid and start.pid and end.pid != start.pid)]
        self.end = _cause(own)
        marks = [(beat.time_s, beat.step) for beat in told.beats if beat.time_s >= self.start_s]
        marks += [(save.time_s, save.step) for save in self.saves]
        marks.sort()
        self.marks = _rising([(self.start_s, start.step), *marks])
        last_s = max((save.time_s + _after(save) for save in self.saves), default=self.start_s)
        self.heard_s = max(last_s, self.marks[-1][0])
        """When it was last heard of, but for its end."""
        self.end_s = self.heard_s
        self.why = UNKNOWN if live else CRASHED
        if self.end is not None:
            self.why = self.end.why
            self.end_s = max(self.heard_s, min(end.time_s for end in own))
        elif live and now_s is not None:
            self.why = RUNNING
            self.end_s = max(self.heard_s, now_s)
        self.counted = any(end.step and end.why in _OWN for end in own)
        """It said itself at which step it ended; another one knows that with a delay."""
        end_step = max((end.step for end in own), default=0)
        if end_step > self.marks[-1][1]:
            self.marks.append((self.end_s, end_step))
        self.to_step = self.marks[-1][1]

    def attempt(
        self, previous: _Span | None, following: _Span | None, kept: int | None, *, doubtful: bool
    ) -> Attempt:
        hung = self.end_s - self.heard_s if self.why == "hang" and self.start.beat_s else 0.0
        worked_s = self.end_s - hung
        kept_step = self.to_step if kept is None else min(kept, self.to_step)
        cut_s = worked_s
        # Where the process did not say its last step, it ended behind some that nobody counted.
        uncounted = self.end is not None and not self.counted and kept == self.to_step
        if kept_step < self.to_step or uncounted:
            cut_s = min(max(self._time_of(kept_step), self.start_s), worked_s)
        stalls = sum(save.stall_s for save in self.saves if save.time_s <= cut_s)
        saving = min(stalls, cut_s - self.start_s)
        began_s = self.began_s
        if previous is not None and previous.end_s <= self.start_s:
            began_s = max(began_s, previous.end_s)  # it waited for the one before to end
        gap = 0.0
        if following is not None:
            gap = max(following.began_s - self.end_s, 0.0)
        paused = gap if self.why in PLANNED else 0.0
        unknown = 0.0
        if not paused:
            beat_s = self.start.beat_s
            if doubtful or (self.end is None and not beat_s):
                unknown = gap
            elif self.end is None:
                unknown = min(gap, beat_s)
        return Attempt(
            epoch=self.epoch,
            host=self.start.host,
            pid=self.start.pid,
            began_s=began_s,
            start_s=self.start_s,
            end_s=self.end_s,
            from_step=self.from_step,
            to_step=self.to_step,
            kept_step=max(kept_step, self.from_step),
            end=self.why,
            text=self.end.text if self.end else "",
            exit_code=self.end.exit_code if self.end else None,
            signal=self.end.signal if self.end else 0,
            startup_s=self.start_s - began_s,
            productive_s=cut_s - self.start_s - saving,
            saving_s=saving,
            replay_s=worked_s - cut_s,
            down_s=hung + gap - paused - unknown,
            unknown_s=unknown,
            paused_s=paused,
        )

    def _time_of(self, step: int) -> float:
        """When `step` was completed; if it was saved, when training went on after that."""
        for save in reversed(self.saves):
            if save.step == step:
                return save.time_s + _after(save)
        before_s, before = self.marks[0]
        for time_s, completed in self.marks:
            if completed >= step:
                share = (step - before) / (completed - before) if completed > before else 1.0
                return before_s + max(share, 0.0) * (time_s - before_s)
            before_s, before = time_s, completed
        return self.end_s


def _after(save: SaveEvent) -> float:
    """For how long the training stood still once the state was looked at."""
    return save.stall_s - save.waited_s


def _rising(marks: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """Steps never go back within an attempt."""
    rising: list[tuple[float, int]] = []
    most = 0
    for time_s, step in marks:
        most = max(most, step)
        rising.append((time_s, most))
    return rising


def _cause(ends: Sequence[EndEvent]) -> EndEvent | None:
    """Of several, which are about one end, the one that says most: a supervisor that killed the
    process knows better than that one, and that one better than one who saw it go."""
    if not ends:
        return None

    def order(end: EndEvent) -> tuple[int, float]:
        rank = 0 if end.why in ("hang", "timeout") else 1 if end.why in _OWN else 2
        return rank, end.time_s

    return min(ends, key=order)
