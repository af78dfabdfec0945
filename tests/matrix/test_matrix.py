"""The kill matrix over docs/loop.md: every program, ended at every place, goes on to the same
bits.

Compared are the final state leaf by leaf with all random states, number, data and loss of
each step, and what the program prints at its end. What is run where:

                            no workers               two workers
    killed                  every ninth place        slow: every 12th
    stopped (SIGTERM)       one of each; slow: 12th  slow: one, in a tail
    stopped, then killed    ends of stretches
    crashed (exception)     one of each kind
    killed again and again  once                     slow: every other program, once
    real: SIGKILL           slow: of half the kinds  slow: one, in a body       } a quarter of
    real: SIGTERM           slow: one, in a body     slow: one of each kind     } programs each

A stretch is of places of one kind in a row: its end is the last batch of an epoch, for one.
Which places and kinds are taken goes by the program's number, so that programs with neighbouring
numbers together cover all; see `one_of_each_kind`. In `make exhaustive` it is every place,
wherever only some are taken here, and every program.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.matrix.check import (
    check_at,
    check_over_and_over,
    compare,
    crashed,
    in_front_of_another_kind,
    killed,
    left_alone,
    one_of_each_kind,
    stopped,
    stopped_then_killed,
)
from tests.matrix.job import INSIDE, OUTSIDE
from tests.matrix.processes import read_result, run
from tests.matrix.programs import PROGRAMS
from tests.support.exhaustive import EXHAUSTIVE
from tests.support.nursery import ROOT, nurseries

NUMBERS = {name: number for number, name in enumerate(PROGRAMS)}
KINDS = (*INSIDE, *OUTSIDE)


def some(places: int, number: int, of: int) -> range:
    """One in so many of them, another one for the next program."""
    return range(places) if EXHAUSTIVE else range(number % of, places, of)


every_program = pytest.mark.parametrize("name", PROGRAMS)


@every_program
def test_every_ninth_place(name: str) -> None:
    program, number = PROGRAMS[name], NUMBERS[name]
    whole = left_alone(program, workers=0)
    check_at(program, whole, some(len(whole.places), number, 9), killed)
    check_at(program, whole, in_front_of_another_kind(whole.places), stopped_then_killed)
    for make in (stopped, crashed):
        check_at(program, whole, one_of_each_kind(whole.places, number, KINDS), make)
    check_over_and_over(program, whole)


@pytest.mark.slow
@every_program
def test_a_signal_at_every_twelfth_place(name: str) -> None:
    program, number = PROGRAMS[name], NUMBERS[name]
    whole = left_alone(program, workers=0)
    check_at(program, whole, some(len(whole.places), number, 12), stopped)


@pytest.mark.slow
@every_program
def test_every_twelfth_place_with_two_workers(name: str) -> None:
    """A loader's workers are started and ended for each: the most costly test of all."""
    program, number = PROGRAMS[name], NUMBERS[name]
    whole = left_alone(program, workers=2)
    check_at(program, whole, some(len(whole.places), number, 12), killed)
    check_at(program, whole, one_of_each_kind(whole.places, number, ["tail"]), stopped)
    if number % 2:
        check_over_and_over(program, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "workers"),
    [
        (name, workers)
        for number, name in enumerate(PROGRAMS)
        for workers in (0, 2)
        if EXHAUSTIVE or number % 4 == workers
    ],
)
def test_real_processes(name: str, workers: int, tmp_path: Path) -> None:
    """SIGKILL, and SIGTERM that must end in status 75; then the same command again, from
    another folder and with another hash seed."""
    program, number = PROGRAMS[name], NUMBERS[name] + workers
    whole = left_alone(program, workers)
    first, second = nurseries()
    places = left_alone(program, workers, attempt=0).places
    kill, stop = (["body"], INSIDE) if workers else (KINDS[number // 4 % 2 :: 2], ["body"])
    ends = [("SIGKILL", at, -9) for at in one_of_each_kind(places, number, kill)]
    ends += [("SIGTERM", at, 75) for at in one_of_each_kind(places, number + 1, stop)]
    for signal, at, status in ends:
        what = f"{signal} at place {at} ({places[at]})"
        folder = tmp_path / f"{signal}{at}"
        log, result = folder / "log.txt", folder / "result"
        code = run(first, folder, name, workers=workers, attempt=0, end=(signal, at))
        assert code == status, f"{what}:\n{log.read_text()[-3000:]}"
        code = run(second, folder, name, workers=workers, attempt=1, result=result)
        assert code == 0, f"{what}:\n{log.read_text()[-3000:]}"
        compare(whole.steps, whole.bits(), *read_result(result), what)


def test_every_rule_of_the_docs_has_a_program() -> None:
    table = (ROOT / "docs" / "loop.md").read_text().partition("## Every rule")[2]
    rules = {int(number) for number in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}
    found: set[int] = set()
    for name, program in PROGRAMS.items():
        line = re.match(r"Rules? ([\d, ]+): ", program.__doc__ or "")
        assert line, f"{name}: no rules in its docstring"
        own = list(map(int, line[1].split(",")))
        assert name.startswith(f"rule_{own[0]:02}_")
        found.update(own)
    assert found == rules
    assert len(rules) == 30
