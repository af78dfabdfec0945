"""Does what the machine decides: starts, watches, signals, waits. The only place with a clock."""

from __future__ import annotations

import contextlib
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from holdfast.core import process as identity
from holdfast.core.records import Holder
from holdfast.errors import UsageError
from holdfast.manager.heartbeat import VARIABLE
from holdfast.supervise import machine, slurm
from holdfast.supervise.beats import Beats
from holdfast.supervise.console import Console
from holdfast.supervise.machine import Action, Event, Settings
from holdfast.supervise.processes import (
    Command,
    become_subreaper,
    catches,
    descendants,
    look,
    send,
)
from holdfast.supervise.recording import record
from holdfast.supervise.stacks import save_stacks

LOOK_S = 0.25
_PREFIX = "holdfast-run-"
_FORWARDED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
_FROM_KEYS = (signal.SIGINT, signal.SIGQUIT)


@dataclass(frozen=True)
class Outcome:
    """How it ended."""

    status: int
    """The command's last, or why it was ended."""
    attempts: int
    hangs: int
    stacks: str
    """The folder with the stacks of what hung; "" if nothing did."""
    checkpoints: dict[str, int]
    """Address -> step of the newest one that was heard of."""


def supervise(
    command: Sequence[str],
    settings: Settings,
    *,
    log_folder: str | os.PathLike[str] | None = None,
    status: bool = True,
) -> Outcome:
    """Run `command` until it is done, as `settings` say.

    Lines go to stderr, the stacks of a command that hangs to `log_folder`. In the main thread
    only, since it takes over signals, and in a process of its own, since it reaps every child.
    Raises UsageError for what makes no sense.
    """
    if not command:
        raise UsageError("there is no command to run", hint="… -- python train.py")
    if threading.current_thread() is not threading.main_thread():
        raise UsageError(
            "a command can only be supervised from the main thread", hint="Start a process for it."
        )
    become_subreaper()
    console = Console(sys.stderr, status=status)
    job = slurm.job_of(os.environ) if settings.requeue else ""
    if settings.requeue and not job:
        console.say("not the first task of a Slurm job: --requeue has no effect")
    with _temporary_folder() as folder, _signals() as wakes:
        return _Shell(
            list(command),
            replace(settings, requeue=bool(job)),
            folder=folder,
            logs=_log_folder() if log_folder is None else Path(log_folder),
            job=job,
            console=console,
            wakes=wakes,
        ).run()


class _Shell:
    def __init__(
        self,
        words: list[str],
        settings: Settings,
        *,
        folder: Path,
        logs: Path,
        job: str,
        console: Console,
        wakes: int,
    ) -> None:
        self._words = words
        self._settings = settings
        self._folder = folder
        self._logs = logs
        self._job = job
        self._console = console
        self._wakes = wakes
        self._chance = random.Random()  # many supervisors must not agree on their jitter
        self._state = machine.begin(time.monotonic())
        self._command: Command | None = None
        self._beats = Beats(folder)
        self._exit: int | None = None
        self._ended_s = 0.0
        """When the last attempt ended, Unix time."""
        self._saved_s: float | None = None
        self._newest: dict[str, int] = {}
        self._kept = set[int]()
        """Warnings that nothing had a handler for when they came, as while a program imports."""
        self._stacked = ""
        self._strangers = descendants()

    def run(self) -> Outcome:
        try:
            while self._exit is None:
                self._look()
                self._wait()
            state = self._state
            return Outcome(self._exit, state.attempt, state.hangs, self._stacked, state.newest)
        finally:
            self._console.erase()
            if self._command is not None and self._exit is None:  # an error of ours
                self._command.kill()
                self._command.clear(0.0)

    def _handle(self, event: Event) -> None:
        self._state, actions = machine.handle(self._settings, self._state, event)
        for action in actions:
            self._do(action)

    def _look(self) -> None:
        now_s = time.monotonic()
        life = self._beats.read() if self._command is not None else machine.Life()
        self._handle(machine.Watched(now_s, life))
        for number in sorted(self._kept):
            if self._command is not None and self._warn(self._command, number):
                self._kept.remove(number)
                self._handle(machine.PassedOn(number))
        if self._state.newest != self._newest:
            self._newest, self._saved_s = self._state.newest, now_s
        self._console.draw(self._state, now_s, self._saved_s)

    def _wait(self) -> None:
        """Until a signal, or the time to look again."""
        pause_s = LOOK_S
        if self._state.phase == "waiting":
            pause_s = min(pause_s, max(0.0, self._state.start_at_s - time.monotonic()))
        select.select([self._wakes], [], [], pause_s)
        self._heed()
        if (command := self._command) is not None:
            command.reap()
            if command.status is not None:
                self._ended(command, command.status)

    def _heed(self) -> None:
        """Take the signals that have come."""
        for number in self._received():
            if number != signal.SIGCHLD:
                self._handle(machine.Signalled(time.monotonic(), number))

    def _received(self) -> Iterator[int]:
        with contextlib.suppress(BlockingIOError):
            while numbers := os.read(self._wakes, 256):
                yield from numbers

    def _ended(self, command: Command, status: int) -> None:
        self._ended_s = time.time()
        for process in command.clear(self._settings.grace_s, self._heed):
            self._console.say(f"process {process.pid} cannot be killed (state {process.state})")
        life = self._beats.read()
        self._command = None
        shutil.rmtree(self._folder / str(self._state.attempt), ignore_errors=True)
        self._handle(machine.Exited(time.monotonic(), status, life, self._chance.random()))

    # -- doing -----------------------------------------------------------------------

    def _do(self, action: Action) -> None:
        match action:
            case machine.Say():
                self._console.say(action.text)
            case machine.Start():
                self._start(action.attempt)
            case machine.SaveStacks():
                self._handle(machine.Dumped(time.monotonic(), self._stacks(action.hang)))
            case machine.Forward():
                self._forward(action.number)
            case machine.Send():
                if self._command is not None:
                    self._command.send(action.number)
            case machine.Kill():
                if self._command is not None:
                    self._command.kill()
            case machine.Record():
                text = f"stacks in {self._logs}" if action.why == "hang" and self._stacked else ""
                record(action, self._ended_s, text)
            case machine.Requeue():
                self._console.say(slurm.requeue(self._job))
            case machine.Exit():
                self._exit = action.status

    def _start(self, attempt: int) -> None:
        self._console.erase()
        folder = self._folder / str(attempt)
        try:
            folder.mkdir()
        except OSError as error:
            self._console.say(f"no folder for heartbeats: {error}")
        self._beats = Beats(folder)
        environment = {**os.environ, VARIABLE: str(folder)}
        try:
            self._command = Command(
                self._words, environment, foreground=_has_terminal(), strangers=self._strangers
            )
        except OSError as error:
            # No memory or no pids, say, which may pass: as if the command had failed.
            self._console.say(f"could not start a process: {error}")
            self._handle(machine.Started(time.monotonic(), 0))
            self._handle(machine.Exited(time.monotonic(), 1, jitter=self._chance.random()))
            return
        self._handle(machine.Started(time.monotonic(), self._command.pid))

    def _stacks(self, hang: int) -> str:
        folder = self._logs / f"hang-{hang}"
        answers = self._folder / str(self._state.attempt)
        processes = [] if self._command is None else self._command.processes()
        if not save_stacks(processes, answers, folder):
            return ""
        self._stacked = str(self._logs)
        return str(folder)

    def _forward(self, number: int) -> None:
        command = self._command
        if command is None:
            return
        if number in _FROM_KEYS and _has_terminal():
            return  # the terminal has sent it to our whole process group
        if number not in (signal.SIGUSR1, signal.SIGUSR2) or not Path("/proc/self/status").exists():
            command.send(number)
        elif not self._warn(command, number):
            self._kept.add(number)
            self._console.say(f"nothing handles {signal.Signals(number).name} yet: kept back")

    def _warn(self, command: Command, number: int) -> bool:
        """Whether anything has a handler for the signal, and has been sent it. It would end a
        program that has none, as `torchrun` and shells: then those that train are told."""
        if catches(command.pid, number):
            command.send(number)
            return True
        self._beats.read()
        told = [look(pid) for pid in self._beats.pids() if catches(pid, number)]
        for process in filter(None, told):
            send(process, number)
        return any(told)


def _has_terminal() -> bool:
    """Whether we are what the terminal's keys belong to. The command then stays in our process
    group: Ctrl-C, Ctrl-Z and debuggers work as without us."""
    try:
        return os.isatty(0) and os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False


def _log_folder() -> Path:
    """A folder of this supervisor's in the user's state folder (XDG Base Directory)."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    name = time.strftime("%Y-%m-%d-%H%M%S")
    return Path(state, "holdfast", "run", f"{name}-{os.getpid()}")


@contextlib.contextmanager
def _signals() -> Iterator[int]:
    """Take the signals over; a file descriptor that gives the numbers of those that came.

    As PID 1 of a container this matters twice: the kernel drops signals that such a process
    has no handler for.
    """
    hears, tells = os.pipe()
    os.set_blocking(hears, False)
    os.set_blocking(tells, False)
    before_fd = signal.set_wakeup_fd(tells, warn_on_full_buffer=False)
    before: dict[int, Any] = {}
    for name in (*_FORWARDED, "SIGCHLD"):
        number = signal.Signals[name]
        # Ignored before we came (nohup, a shell's background job): the command ignores it, too.
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, lambda *_: None)
    try:
        yield hears
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before_fd)
        os.close(hears)
        os.close(tells)


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    """For heartbeats; those of supervisors that were killed are removed."""
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError, msgspec.DecodeError):
            holder = msgspec.json.decode((left / "holder.json").read_bytes(), type=Holder)
            if identity.is_alive(holder) is False:
                shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "holder.json").write_bytes(msgspec.json.encode(identity.current()))
        yield folder
