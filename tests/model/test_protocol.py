"""The protocol holds in every interleaving; without any one of its rules it does not."""

from __future__ import annotations

import dataclasses

import pytest

from tests.support.exhaustive import EXHAUSTIVE

from .entries import Bug
from .explore import search
from .scenarios import LARGE_SCENARIOS, SCENARIOS, Scenario
from .world import World

CASES = [(scenario, bug) for scenario in SCENARIOS for bug in scenario.catches]


def _without(scenario: Scenario, bug: Bug) -> Scenario:
    settings = dataclasses.replace(scenario.settings, bugs=frozenset({bug}))
    return dataclasses.replace(scenario, settings=settings)


def _check_holds(scenario: Scenario) -> None:
    found = search(World(scenario))
    print(f"{scenario.name}: {found}")
    assert found.violation is None, f"{scenario.name}: {found}"
    missed = set(scenario.sees) - found.endings
    assert not missed, f"{scenario.name} never gets to {sorted(missed)}"


def _check_shows(scenario: Scenario, bug: Bug) -> None:
    found = search(World(_without(scenario, bug)))
    print(f"{bug.value}, in {scenario.name!r}: {found}")
    assert found.violation is not None, f"nothing shows {bug.name} in {scenario.name!r}"


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_protocol_holds(scenario: Scenario) -> None:
    _check_holds(scenario)


@pytest.mark.parametrize(
    ("scenario", "bug"), CASES, ids=[f"{bug.name}-{scenario.name}" for scenario, bug in CASES]
)
def test_every_rule_matters(scenario: Scenario, bug: Bug) -> None:
    _check_shows(scenario, bug)


LARGE = LARGE_SCENARIOS if EXHAUSTIVE else LARGE_SCENARIOS[::5]


def test_every_bug_is_shown() -> None:
    assert {bug for _, bug in CASES} == set(Bug)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "scenario", LARGE_SCENARIOS[:: 1 if EXHAUSTIVE else 5], ids=lambda scenario: scenario.name
)
def test_protocol_holds_in_large_scenarios(scenario: Scenario) -> None:
    _check_holds(scenario)


# -- the explorer itself -----------------------------------------------------------------

# Small enough for a search that merges only equal histories.
SMALL = {
    "take over": {"faults": 1},
    "take over, every read a step of its own": {"faults": 1, "unreadable": False},
    "retention beside a save": {"faults": 0},
    "one listing that takes too long": {},
    "power loss": {"crashes": 1},
}


@pytest.mark.parametrize("name", SMALL)
def test_merging_is_sound(name: str) -> None:
    """Equal local variables at the same place mean equal futures (see `explore`)."""
    scenario = next(scenario for scenario in SCENARIOS if scenario.name == name)
    scenario = dataclasses.replace(scenario, **SMALL[name])
    worlds = World(scenario), World(scenario, merge=False)
    merged, apart = (search(world) for world in worlds)
    assert merged.violation is None
    assert apart.violation is None
    assert merged.endings == apart.endings
    assert merged.states < apart.states
    seen, seen_apart = (
        {world.outside(state) for state in found.visited}
        for world, found in zip(worlds, (merged, apart), strict=True)
    )
    assert seen == seen_apart
    for bug in scenario.catches:
        faulty = _without(scenario, bug)
        assert len(search(World(faulty)).trace) == len(search(World(faulty, merge=False)).trace)


def test_a_search_never_leaves_states_out() -> None:
    with pytest.raises(OverflowError, match="more than 100 states"):
        search(World(SCENARIOS[0]), most_states=100)
