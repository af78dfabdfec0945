"""The programs of the matrix with `hold=True`: in the midst of a place what is held is made a
checkpoint, the process is gone, and another one goes on to the same bits.

A place of one kind for each program, another kind for the next program; slow: one of each.
"""

from __future__ import annotations

from typing import Any

import pytest

import holdfast
from tests.matrix.check import Ending, check_at, left_alone, one_of_each_kind
from tests.matrix.job import INSIDE, Job
from tests.matrix.programs import PROGRAMS
from tests.support.jobs import Killed

_run = Job.run


def _holding(job: Job, *, sub: str = "", **options: Any) -> holdfast.Run:
    """The process that ends saves nothing by a schedule."""
    if job.attempt == 0:
        options |= {"every": None, "hold": True}
    return _run(job, sub=sub, **options)


def held(at: int) -> Ending:
    """What the watching thread does when the loop does not come back."""

    def ending(job: Job, number: int) -> None:
        if number == at:
            for run in job.runs:
                run._session.stopping._commit_held()
            raise Killed

    return ending


every_program = pytest.mark.parametrize(
    # That one prints which checkpoints there are: with `hold=` others.
    "name",
    [name for name in PROGRAMS if name != "rule_16_metrics_after_a_loop"],
)


def check_held(name: str, kinds: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    program, number = PROGRAMS[name], list(PROGRAMS).index(name)
    whole = left_alone(program, workers=0)
    monkeypatch.setattr(Job, "run", _holding)
    check_at(program, whole, one_of_each_kind(whole.places, number, kinds), held)


@every_program
def test_a_held_state_goes_on_to_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_held(name, (INSIDE[list(PROGRAMS).index(name) % len(INSIDE)],), monkeypatch)


@pytest.mark.slow
@every_program
def test_a_place_of_each_kind(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_held(name, INSIDE, monkeypatch)
