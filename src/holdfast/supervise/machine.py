"""What `holdfast run` does next: a pure function of its state and of what happened.

`handle(settings, state, event)` gives the next state and what is to be done, in order. No
process, clock, sleep or randomness is in here: times and jitter come with the events. The
shell gives one `Watched` several times a second, and every other event as it happens.

    waiting --Started--> running --Exited--> waiting, or ended
                          |  ^
    no heartbeat: dumping |  | (all from here on until Exited)
      --Dumped--> stopping --grace--> killed
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from holdfast.core.units import format_seconds
from holdfast.supervise.rules import PREEMPTED, TIMED_OUT, Rules, backoff_s, status_text

SUSPENDED_S = 5.0
"""The shell looks several times a second. Where it did not for longer, it was stopped itself
(Ctrl-Z, a laptop's lid), and the silence of that time is nobody's fault."""
UNHEARD_PROGRESS_S = 600.0
"""A command without a heartbeat shows no checkpoints: having run for so long is progress."""
SILENT_S = 600.0
"""A silence that is worth a line where no `--hang-timeout`, or `--start-timeout`, is given."""

Phase = Literal["waiting", "running", "dumping", "stopping", "killed", "ended"]


@dataclass(frozen=True)
class Settings:
    """What was asked for. Times are in seconds; None is "never"."""

    rules: Rules = field(default_factory=Rules)
    max_stuck: int = 3
    """So many restarts in a row without a new checkpoint end it."""
    longest_backoff_s: float = 300.0
    timeout_s: float | None = None
    """For each attempt."""
    total_timeout_s: float | None = None
    hang_timeout_s: float | None = None
    start_timeout_s: float | None = None
    """Until the first beat."""
    grace_s: float = 30.0
    """Between SIGTERM and SIGKILL."""
    requeue: bool = False
    """This is a batch job that can be put into its queue again."""


@dataclass(frozen=True)
class Begun:
    """A process that came to its loop."""

    address: str
    pid: int
    step: int
    over: bool = False
    """It has said itself that it left the loop."""


@dataclass(frozen=True)
class Life:
    """What the processes of an attempt have told so far."""

    beats: int = 0
    """Another number with each sign of life; 0: there was none."""
    in_loop: bool = False
    """A live process is where the next beat is to come soon."""
    address: str = ""
    phase: str = ""
    step: int = 0
    checkpoints: tuple[tuple[str, int], ...] = ()
    """The newest of each run: its address and step."""
    began: tuple[Begun, ...] = ()
    """The processes that came to their loop, each of which is its run's writer."""
    left: int = 0
    """The status with which a process ended because it was asked to stop."""
    notice: str = ""
    """Whose notice had asked for that: the machine goes away, or the time of the job is over."""


# -- what happens ------------------------------------------------------------------


@dataclass(frozen=True)
class Started:
    """An attempt has begun."""

    now_s: float
    pid: int


@dataclass(frozen=True)
class Watched:
    """Time went by."""

    now_s: float
    life: Life = Life()


@dataclass(frozen=True)
class Dumped:
    """Where the stacks are; "" if none could be saved."""

    now_s: float
    where: str


@dataclass(frozen=True)
class Exited:
    """The command has ended, and nothing of what it started is left."""

    now_s: float
    status: int
    """As a shell has it: 128 + the signal's number."""
    life: Life | None = None
    """What was told at the end; None: as before."""
    jitter: float = 0.5
    """Random, from 0 to 1."""


@dataclass(frozen=True)
class Signalled:
    """The supervisor received a signal that is for the command."""

    now_s: float
    number: int


@dataclass(frozen=True)
class PassedOn:
    """A warning that nothing had a handler for, in this attempt or one before, has one now and
    was passed on."""

    number: int


Event = Started | Watched | Dumped | Exited | Signalled | PassedOn

# -- what is to be done ------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """Start the command, for the attempt of this number; answered by Started."""

    attempt: int


@dataclass(frozen=True)
class SaveStacks:
    """Save where every thread is; answered by Dumped."""

    hang: int


@dataclass(frozen=True)
class Send:
    """Send the command a signal."""

    number: int


@dataclass(frozen=True)
class Forward(Send):
    """Send the command a signal that was received, as far as it has not got it already."""


@dataclass(frozen=True)
class Kill:
    """SIGKILL to all that the command has started."""


@dataclass(frozen=True)
class Say:
    """Print a line."""

    text: str


@dataclass(frozen=True)
class Record:
    """Tell the histories of the runs how their processes ended."""

    why: str
    """As of the end events of a run's history: "hang", "timeout", "killed" or "exited"."""
    status: int
    processes: tuple[Begun, ...]


@dataclass(frozen=True)
class Requeue:
    """Put the batch job into its queue again."""


@dataclass(frozen=True)
class Exit:
    """Leave with this status."""

    status: int


Action = Start | SaveStacks | Send | Kill | Say | Record | Requeue | Exit


@dataclass(frozen=True)
class State:
    """Where the supervisor is."""

    began_s: float
    phase: Phase = "waiting"
    attempt: int = 0
    start_at_s: float = 0.0
    attempt_s: float = 0.0
    """When the attempt began."""
    seen_s: float = 0.0
    """When the shell looked last."""
    alive_s: float = 0.0
    """When the newest sign of life came."""
    life: Life = Life()
    steps: Mapping[str, int] = field(default_factory=dict[str, int])
    """Address -> the newest checkpoint that was known when the attempt began."""
    why: str = ""
    """Why the attempt is being ended: "hang", "start", "timeout" or "total timeout"."""
    kill_at_s: float = 0.0
    asked: str = ""
    """The signal that asked to end it all."""
    warned: int = 0
    """The signal that said that the end is near."""
    stuck: int = 0
    """Attempts in a row that brought no new checkpoint."""
    hangs: int = 0
    said: frozenset[str] = frozenset()
    """Lines that are said once in an attempt."""

    @property
    def restarts(self) -> int:
        return max(0, self.attempt - 1)

    @property
    def newest(self) -> dict[str, int]:
        """Address -> its newest checkpoint, of this attempt or an earlier one."""
        newest = dict(self.steps)
        for address, step in self.life.checkpoints:
            newest[address] = max(step, newest.get(address, step))
        return newest


def begin(now_s: float) -> State:
    """Before the first attempt, which is due at once."""
    return State(began_s=now_s, start_at_s=now_s)


def handle(settings: Settings, state: State, event: Event) -> tuple[State, list[Action]]:
    """The state after the event, and what is to be done."""
    if state.phase == "ended":
        return state, []
    match event:
        case Started():
            return _started(state, event)
        case Watched():
            return _watched(settings, state, event)
        case Dumped():
            return _dumped(settings, state, event)
        case Signalled():
            return _signalled(settings, state, event)
        case PassedOn():
            line = Say(f"{signal.Signals(event.number).name} is handled now: passed on")
            return replace(state, warned=event.number), [line]
        case Exited():
            return _exited(settings, state, event)


def _started(state: State, event: Started) -> tuple[State, list[Action]]:
    known = state.newest
    after = replace(
        state,
        phase="running",
        attempt_s=event.now_s,
        alive_s=event.now_s,
        seen_s=event.now_s,
        life=Life(),
        steps=known,
        why="",
        said=frozenset(),
    )
    line = f"attempt {state.attempt} began (pid {event.pid})"
    if known:
        line += f", goes on from {_steps(known)}"
    return after, [Say(line)]


def _watched(settings: Settings, state: State, event: Watched) -> tuple[State, list[Action]]:
    now_s = event.now_s
    asleep_s = now_s - state.seen_s if now_s - state.seen_s > SUSPENDED_S else 0.0
    if state.phase == "waiting":
        if settings.total_timeout_s and now_s - state.began_s >= settings.total_timeout_s:
            return _end(state, TIMED_OUT, "--total-timeout is over")
        if now_s < state.start_at_s:
            return replace(state, seen_s=now_s), []
        attempt = state.attempt + 1
        return replace(state, attempt=attempt, seen_s=now_s), [Start(attempt)]
    alive_s = now_s if event.life.beats != state.life.beats else state.alive_s + asleep_s
    state = replace(state, seen_s=now_s, alive_s=alive_s, life=event.life)
    if state.phase == "stopping" and now_s >= state.kill_at_s:
        kill = Say(f"not ended {format_seconds(settings.grace_s)} after SIGTERM: killing it")
        return replace(state, phase="killed"), [kill, Kill()]
    if state.phase != "running" or state.asked:
        return state, []
    return _judged(settings, state, now_s)


def _judged(settings: Settings, state: State, now_s: float) -> tuple[State, list[Action]]:
    """An attempt runs undisturbed: has it done so for too long?"""
    total_s, attempt_s, silent_s = (
        now_s - state.began_s,
        now_s - state.attempt_s,
        now_s - state.alive_s,
    )
    if settings.total_timeout_s and total_s >= settings.total_timeout_s:
        return _stop(settings, state, now_s, "total timeout", "--total-timeout is over")
    if settings.timeout_s and attempt_s >= settings.timeout_s:
        text = f"attempt {state.attempt} took longer than {format_seconds(settings.timeout_s)}"
        return _stop(settings, state, now_s, "timeout", text)
    heard = state.life.beats != 0
    hang_s = settings.hang_timeout_s
    if heard and state.life.in_loop and hang_s and silent_s >= hang_s:
        state = replace(state, phase="dumping", why="hang", hangs=state.hangs + 1)
        return state, [SaveStacks(state.hangs)]
    if not heard and settings.start_timeout_s and silent_s >= settings.start_timeout_s:
        state = replace(state, phase="dumping", why="start", hangs=state.hangs + 1)
        return state, [SaveStacks(state.hangs)]
    if heard and state.life.in_loop and not hang_s and silent_s >= SILENT_S:
        line = f"no heartbeat for {format_seconds(SILENT_S)} (--hang-timeout would start it again)"
        return _once(state, "silent", line)
    # It is known to beat, for one before it has saved.
    if not heard and state.newest and not settings.start_timeout_s and silent_s >= SILENT_S:
        line = f"no heartbeat since it began, {format_seconds(SILENT_S)} ago"
        return _once(state, "silent start", f"{line} (--start-timeout would start it again)")
    if not heard and hang_s and attempt_s >= max(hang_s, 60.0):
        line = "no heartbeat so far, so --hang-timeout waits: it comes from the loop of a "
        return _once(state, "unheard", line + "holdfast.Run, or from saves")
    return state, []


def _once(state: State, key: str, line: str) -> tuple[State, list[Action]]:
    if key in state.said:
        return state, []
    return replace(state, said=state.said | {key}), [Say(line)]


def _stop(
    settings: Settings, state: State, now_s: float, why: str, text: str
) -> tuple[State, list[Action]]:
    after = replace(state, phase="stopping", why=why, kill_at_s=now_s + settings.grace_s)
    return after, [Say(f"{text}: sending SIGTERM"), Send(signal.SIGTERM)]


def _dumped(settings: Settings, state: State, event: Dumped) -> tuple[State, list[Action]]:
    if state.phase != "dumping":
        return state, []
    silent = format_seconds(event.now_s - state.alive_s)
    what = f"no heartbeat for {silent}"
    if state.why == "start":
        what = f"no heartbeat {silent} after the start"
    stacks = f"stacks in {event.where}" if event.where else "no stacks could be saved"
    return _stop(settings, state, event.now_s, state.why, f"{what}: {stacks}")


def _signalled(settings: Settings, state: State, event: Signalled) -> tuple[State, list[Action]]:
    name = signal.Signals(event.number).name
    near = event.number in (signal.SIGUSR1, signal.SIGUSR2)
    if state.phase == "waiting":
        # Nothing runs: what was saved is saved, and a new attempt would find the same signal.
        requeue: list[Action] = [Requeue()] if near and settings.requeue else []
        after, actions = _end(state, 128 + event.number, f"received {name} between two attempts")
        return after, [*actions[:-1], *requeue, actions[-1]]
    if event.number == signal.SIGINT and state.asked == "SIGINT":
        line = Say("received SIGINT again: killing it")
        return replace(state, phase="killed"), [line, Kill()]
    if near:
        state = replace(state, warned=event.number)
    else:
        state = replace(state, asked=state.asked or name)
    return state, [Say(f"received {name}: passed on"), Forward(event.number)]


def _exited(settings: Settings, state: State, event: Exited) -> tuple[State, list[Action]]:
    state = replace(state, life=event.life or state.life)
    if state.life.left and (0 < event.status < 128 or event.status == 128 + state.warned):
        # What the training ended with. A launcher, such as `torchrun`, makes 1 of it, or dies
        # of SIGUSR1 itself: Slurm sends that to every process of a step.
        event = replace(event, status=state.life.left)
    after, actions = _decided(settings, state, event)
    return after, [*_recorded(state, event.status), *actions]


def _recorded(state: State, status: int) -> list[Action]:
    """What the processes could not say themselves. One that ends well, or with a save after a
    signal, has said so."""
    began = state.life.began
    if state.why:
        why = "timeout" if "timeout" in state.why else "hang"
    elif status in (0, PREEMPTED):
        return []
    else:
        why = "killed" if status > 128 else "exited"
        began = tuple(process for process in began if not process.over)
    return [Record(why, status, began)] if began else []


def _decided(settings: Settings, state: State, event: Exited) -> tuple[State, list[Action]]:
    status, now_s = event.status, event.now_s
    newest = state.newest
    ended = f"attempt {state.attempt} {status_text(status)} after "
    ended += format_seconds(now_s - state.attempt_s)
    if newest:
        ended += f" (last checkpoint: {_steps(newest)})"
    if state.asked:
        return _end(state, status, f"{ended}; {state.asked} had asked for it")
    if state.why == "total timeout":
        return _end(state, TIMED_OUT, ended)
    # Slurm signals every process of a step, also one that is just starting again, and dies of it.
    died_of_it = bool(state.warned and newest) and status == 128 + state.warned
    if settings.requeue and (status == PREEMPTED or died_of_it):
        after, actions = _end(state, status, f"{ended}; putting the job into its queue again")
        return after, [*actions[:-1], Requeue(), actions[-1]]
    if state.warned and status in (PREEMPTED, 128 + state.warned):
        name = signal.Signals(state.warned).name
        return _end(state, status, f"{ended}; {name} had asked for it")
    if state.life.notice and status == state.life.left and not settings.rules.names(status):
        # Another attempt would hear the same and stop at its first boundary.
        return _end(state, status, f"{ended}; the notice of {state.life.notice} had asked for it")
    if not state.why and settings.rules.verdict(status) == "stop":
        return _end(state, status, ended)
    stuck = 0 if _progressed(state, now_s) else state.stuck + 1
    if stuck > settings.max_stuck:
        line = f"{ended}; no new checkpoint in {_plural(settings.max_stuck)}: giving up"
        return _end(state, status or 1, line)
    wait_s = backoff_s(max(0, stuck - 1), event.jitter, settings.longest_backoff_s)
    after = replace(
        state,
        phase="waiting",
        stuck=stuck,
        start_at_s=now_s + wait_s,
        seen_s=now_s,
        steps=newest,
        life=Life(),
        warned=0,
    )
    return after, [Say(f"{ended}; starting again in {format_seconds(wait_s)}")]


def _progressed(state: State, now_s: float) -> bool:
    if state.life.beats == 0:
        return now_s - state.attempt_s >= UNHEARD_PROGRESS_S
    if not state.steps and state.attempt == 1:
        # What it went on from and what it saved cannot be told apart, and the first is a
        # checkpoint of an earlier job; either way a restart is worth it.
        return bool(state.life.checkpoints)
    return any(step > state.steps.get(address, -1) for address, step in state.life.checkpoints)


def _end(state: State, status: int, line: str) -> tuple[State, list[Action]]:
    return replace(state, phase="ended"), [Say(line), Exit(status)]


def _steps(newest: Mapping[str, int]) -> str:
    if len(newest) == 1:
        return f"step {next(iter(newest.values())):,}"
    return ", ".join(f"step {step:,} of {address}" for address, step in sorted(newest.items()))


def _plural(restarts: int) -> str:
    return "1 restart" if restarts == 1 else f"{restarts:,} restarts"
