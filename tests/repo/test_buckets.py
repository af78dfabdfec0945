"""The commit protocol on buckets: real servers, real requests, real processes that race."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from contextlib import closing

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from holdfast import CheckpointManager
from holdfast.repo import keys
from holdfast.repo.repo import Repo
from holdfast.stores.base import Store
from holdfast.stores.object import ObjectStore
from tests.kill.driver import ROOT
from tests.repo.support import check
from tests.repo.test_state_machine import RepoMachine
from tests.support.servers.service import Place

ROUNDS = 20


AZURE = pytest.param("azure", marks=pytest.mark.slow)
CEPH = pytest.param("ceph", marks=pytest.mark.ceph)


@pytest.fixture(params=["s3", "gcs", AZURE, CEPH])
def place(request: pytest.FixtureRequest) -> Place:
    return request.getfixturevalue(request.param)


def test_histories_against_a_dict(place: Place) -> None:
    """Saves, tags, pins, prunes, forks, gc, crashes. More of them: the same in memory."""
    numbers = itertools.count()

    class OnABucket(RepoMachine):
        def new_store(self, name: str) -> Store:
            prefix = f"{place.prefix}/{next(numbers)}-{name}"
            return ObjectStore(place.address.replace(place.prefix, prefix))

    few = settings(
        max_examples=4,
        stateful_step_count=15,
        phases=[Phase.generate],  # what fails in memory, too, is made small there
        derandomize=True,
    )
    run_state_machine_as_test(OnABucket, settings=few)


# -- two processes -----------------------------------------------------------------------

# Each "go" is one round: it opens the run and saves, twice if it can, and tells what was
# saved. It lets go of the run when it hears "next".
RACER = """
import sys
import holdfast
from holdfast import errors
address, mine, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
print("ready", flush=True)
for number, _ in enumerate(sys.stdin):
    told = []
    try:
        with holdfast.CheckpointManager(address, keep=None, take_over=how == "take over") as ckpts:
            for step in range(number * 20 + mine * 10, number * 20 + mine * 10 + 2):
                ckpts.save(step, {"step": step, "by": mine}).result()
                told.append(str(step))
            print(*told, flush=True)
            sys.stdin.readline()
    except errors.HoldfastError as error:
        print(*told, type(error).__name__, flush=True)
        sys.stdin.readline()
    print("done", flush=True)
"""


PUTTER = """
import sys
from holdfast.stores.object import ObjectStore
store = ObjectStore(sys.argv[1])
print("ready", flush=True)
for number, _ in enumerate(sys.stdin):
    print(store.put_new(f"log/{number}", [sys.argv[2].encode()]), flush=True)
"""


class Racers:
    """Two processes that do the same at the same time."""

    def __init__(self, address: str, how: str, program: str = RACER) -> None:
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", program, address, str(mine), how],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
            for mine in (0, 1)
        ]
        assert self.heard() == [["ready"], ["ready"]]

    def say(self, line: str) -> None:
        for process in self.processes:
            assert process.stdin
            process.stdin.write(line + "\n")
        for process in self.processes:
            assert process.stdin
            process.stdin.flush()

    def heard(self) -> list[list[str]]:
        found: list[list[str]] = []
        for process in self.processes:
            assert process.stdout
            found.append(process.stdout.readline().split())
        return found

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            assert process.stdin
            assert process.stdout
            process.stdin.close()
            process.stdout.close()


def rounds(racers: Racers) -> list[list[list[str]]]:
    """What both told in each round."""
    told: list[list[list[str]]] = []
    for _ in range(ROUNDS):
        racers.say("go")
        told.append(racers.heard())
        racers.say("next")
        assert racers.heard() == [["done"], ["done"]]
    return told


def saved(told: list[list[list[str]]]) -> list[int]:
    return sorted(int(word) for pair in told for words in pair for word in words if word.isdigit())


def check_log(store: Store) -> None:
    """Each entry that is left continues the one before it."""
    repo = Repo(store)
    head = repo.head()
    assert head is not None
    assert head.damage == ()
    numbers = sorted(keys.entry_number(info.key) or 0 for info in store.list(keys.LOG))
    assert numbers == [*range(numbers[0], head.number + 1)]


def test_of_two_processes_that_open_a_run_one_gets_it(place: Place) -> None:
    """And the other is told that it is held, each time."""
    with CheckpointManager(place.address) as first:
        first.acquire()  # they race for a run, not to begin one
    with closing(Racers(place.address, "politely")) as racers:
        told = rounds(racers)
    for pair in told:
        assert sorted(words[-1].isdigit() for words in pair) == [False, True], pair
        assert sorted(map(len, pair)) == [1, 2], pair
        assert [words for words in pair if not words[-1].isdigit()] == [["RunHeld"]]
    store = ObjectStore(place.address)
    assert sorted(check(store)) == saved(told)
    check_log(store)


@pytest.mark.parametrize("server", [pytest.param("s3", marks=pytest.mark.slow), "gcs"])
def test_of_two_processes_that_take_a_run_over_the_last_keeps_it(
    request: pytest.FixtureRequest, server: str
) -> None:
    """Whatever was told to be saved is there, and nothing else; who was overtaken is told."""
    place = request.getfixturevalue(server)
    with closing(Racers(place.address, "take over")) as racers:
        told = rounds(racers)
    losers = [words[-1] for pair in told for words in pair if not words[-1].isdigit()]
    assert set(losers) == {"Fenced"}
    assert all(any(len(words) == 2 and words[-1].isdigit() for words in pair) for pair in told)
    store = ObjectStore(place.address)
    assert sorted(check(store)) == saved(told)
    check_log(store)


def test_of_two_processes_that_create_an_object_one_does(place: Place) -> None:
    store = ObjectStore(place.address)
    with closing(Racers(place.address, "", PUTTER)) as racers:
        for number in range(ROUNDS):
            racers.say("go")
            results = [words == ["True"] for words in racers.heard()]
            assert sorted(results) == [False, True]
            winner = results.index(True)
            assert store.get(f"log/{number}", max_bytes=9) == str(winner).encode()
