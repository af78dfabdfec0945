"""Ends a program at a place, starts it again, and compares it with one that was left alone.

In one process, which makes every place affordable; `processes` does the same with real ones.
"""

from __future__ import annotations

import copy
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tests.matrix.job import Job, Program, seeded
from tests.support.jobs import Killed, copied, fresh_address

Ending = Callable[[Job, int], None]


class Crashed(Exception):
    """An ordinary exception in the program."""


def killed(at: int) -> Ending:
    """The process is gone: nothing is closed or flushed by the program."""

    def ending(job: Job, number: int) -> None:
        if number == at:
            raise Killed

    return ending


def crashed(at: int) -> Ending:
    """An exception that nobody catches: `with` blocks are left by it."""

    def ending(job: Job, number: int) -> None:
        if number == at:
            raise Crashed

    return ending


def stopped(at: int) -> Ending:
    """SIGTERM, with all the time that the program needs to save and leave."""

    def ending(job: Job, number: int) -> None:
        if number == at:
            _receive(job)

    return ending


def stopped_then_killed(at: int) -> Ending:
    """SIGTERM, and SIGKILL at the next place: of an epoch's last batch the tail is pending."""

    def ending(job: Job, number: int) -> None:
        if number == at:
            _receive(job)
        elif number == at + 1:
            raise Killed

    return ending


def _receive(job: Job) -> None:
    """As the signal handler does. Outside the loops there is none: the process dies."""
    inside = False
    for run in job.runs:
        session = run._session
        if session.stopping.signals.installed and session.engine.inside(sys._getframe()):
            session.stopping.signals.receive(signal.SIGTERM)
            inside = True
    if not inside:
        raise Killed


ENDINGS: tuple[Callable[[int], Ending], ...] = (killed, stopped, stopped_then_killed, crashed)


def process(program: Program, job: Job) -> bool:
    """Run it like one process; True if it came to its end."""
    try:
        seeded(program, job)
    except (Killed, Crashed):
        return False
    except SystemExit as left:
        if left.code != 75:
            raise AssertionError(f"left with status {left.code}") from left
        return False
    return True


def left_alone(program: Program, workers: int, *, attempt: int = 1) -> Job:
    """The run that every other one must equal."""
    job = Job(fresh_address(), workers, attempt=attempt)
    assert process(program, job)
    job.put_away()
    assert job.steps
    return job


def check(program: Program, whole: Job, ending: Ending, what: str) -> None:
    """End the program as `ending` says, start it again, and compare."""
    first = Job(fresh_address(), whole.workers, ending, attempt=0)
    process(program, first)
    try:
        go_on(program, whole, Left(first.address, len(first.steps), first.kernel), what)
    finally:
        first.put_away()
    # Steps of the first process are those of the whole run.
    assert first.steps == whole.steps[: len(first.steps)], f"{what}: before the end"


@dataclass
class Left:
    """What a process leaves behind."""

    address: str
    steps: int
    kernel: dict[str, Any]


def go_on(program: Program, whole: Job, left: Left, what: str) -> None:
    """Start the program again, and compare."""
    again = Job(left.address, whole.workers, kernel=left.kernel)
    try:
        assert process(program, again), f"{what}: the second process did not come to its end"
    finally:
        again.put_away()
    compare(whole.steps, whole.bits(), again.steps, again.bits(), what)
    assert left.steps + len(again.steps) >= len(whole.steps), f"{what}: steps were left out"


def _check_killed(program: Program, whole: Job, places: Iterable[int]) -> None:
    """What a process killed at a place leaves is what its store held at that moment. So one
    process passes them all, and at each its store is copied: half the work."""
    wanted, left = set(places), dict[int, Left]()

    def leave(job: Job, number: int) -> None:
        if number in wanted:
            kernel = copy.deepcopy(job.kernel)
            left[number] = Left(copied(job.address), len(job.steps), kernel)

    first = Job(fresh_address(), whole.workers, leave, attempt=0)
    process(program, first)
    try:
        assert first.steps == whole.steps[: len(first.steps)], "before the end"
        for at in wanted:
            # In a first attempt some programs pass fewer.
            found = left.get(at) or Left(copied(first.address), len(first.steps), first.kernel)
            go_on(program, whole, found, f"killed at place {at} ({whole.places[at]})")
    finally:
        first.put_away()


def check_over_and_over(program: Program, whole: Job) -> None:
    """Killed in each process, a place later each time, until one comes to its end."""
    address = fresh_address()
    jobs: list[Job] = []
    kernel: dict[str, Any] = {}
    done = False
    try:
        while not done:
            job = Job(address, whole.workers, killed(len(jobs)), attempt=0, kernel=kernel)
            jobs.append(job)
            done = process(program, job)
        # The first ones know no better than that there is nothing to go on with.
        last = Job(address, whole.workers, kernel=kernel)
        jobs.append(last)
        assert process(program, last)
    finally:
        for job in jobs:
            job.put_away()
    compare(whole.steps, whole.bits(), last.steps, last.bits(), f"after {len(jobs)} processes")


def compare(
    steps: list[Any],
    bits: dict[str, Any],
    found_steps: list[Any],
    found: dict[str, Any],
    what: str,
) -> None:
    """Raises AssertionError with the names of what differs."""
    differing = [name for name in bits if name not in found or found[name] != bits[name]]
    differing += [name for name in found if name not in bits]
    expected = steps[len(steps) - len(found_steps) :]
    pairs = zip(found_steps, expected, strict=True) if len(found_steps) <= len(steps) else ()
    for ours, theirs in pairs:
        if ours != theirs:
            parts = ("number", "epoch", "batch", "data", "loss")
            names = [n for n, a, b in zip(parts, ours, theirs, strict=True) if a != b]
            differing.append(f"{', '.join(names)} of step {theirs[0]}")
            break
    if len(found_steps) > len(steps):
        differing.append(f"{len(found_steps)} steps instead of {len(steps)}")
    assert not differing, f"{what}: {differing[:8]} differ"


def check_at(
    program: Program, whole: Job, places: Iterable[int], make: Callable[[int], Ending]
) -> None:
    """End it at each of these places."""
    if make is killed:
        _check_killed(program, whole, places)
        return
    for at in places:
        check(program, whole, make(at), f"{make.__name__} at place {at} ({whole.places[at]})")


def in_front_of_another_kind(places: list[str]) -> list[int]:
    """The last of each stretch of places of one kind: the last batch of an epoch, the end of
    a prologue or of a tail."""
    return [at for at, kind in enumerate(places) if places[at + 1 : at + 2] != [kind]]


def one_of_each_kind(places: list[str], number: int, kinds: Iterable[str]) -> list[int]:
    """A place of each of `kinds`: its passing `number`, from the first one again after the
    last. Programs with neighbouring numbers together cover early and late ones."""
    chosen: list[int] = []
    for kind in kinds:
        passings = [at for at, found in enumerate(places) if found == kind]
        if passings:
            chosen.append(passings[number % len(passings)])
    return chosen
