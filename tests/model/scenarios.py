"""The bounded configurations that are explored, and the bugs that each of them shows.

A process that is never scheduled again is as good as dead, and what holds in every state
holds in those where it stopped. So "a crash at every step" is in every scenario in which
somebody else goes on; `crashes` are for processes that come back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .entries import Bug, Entry, Pin, Prune, Record, Settings, Touch, Transaction
from .programs import Start, churn, collector, foreign_collector, forker, guest, writer


class Thread(NamedTuple):
    """A program in a process. Threads of one process share what is in flight."""

    process: str
    program: Start
    restart: Start | None = None
    """What runs after a crash of the process; without it the process stays dead."""


# Two checkpoints, saved by A in epoch 1.
C0 = Record("c0", ("p0",))
C1 = Record("c1", ("p1",))
FIRST = Entry(1, "first", None, (), 1, "A", "A", "open", (C0,))
SECOND = Entry(2, "second", (1, "first"), (), 1, "A", "A", "save", (C0, C1))


@dataclass(frozen=True)
class Scenario:
    """A bounded configuration."""

    name: str
    threads: Sequence[Thread]
    catches: Sequence[Bug] = ()
    """Bugs that this scenario shows."""
    sees: Sequence[tuple[str, str]] = ()
    """Ends of programs that must occur: else the scenario does not test what it is for."""
    settings: Settings = field(default_factory=Settings)
    log: Sequence[Entry] = (FIRST, SECOND)
    packs: Sequence[str] = ("p0", "p1")
    child_log: Sequence[Entry] = ()
    faults: int = 0
    """How many requests on the log fail. A failed put has not arrived: it lands at any
    later moment or never (a lost reply is one that lands at once)."""
    duplicates: bool = False
    """Whether a fault may also be a put that arrives once more, later (its reply is
    right): HTTP clients and proxies repeat requests."""
    spoils: bool = False
    """Whether a fault may also be a put that creates its entry with other bytes, or lands so
    later."""
    unreadable: bool = False
    """Whether a fault may also be a read that fails."""
    listing_spans: int = 99
    """Most entries that are created while one listing goes on."""
    collects: bool = False
    """Whether anyone lists packs. If not, the moment at which a pack is written does not
    matter, and it is written at once."""
    crashes: int = 0
    disk: bool = False
    """Whether what is visible may be lost with the power until it is synced."""


def _writer(name: str, saves: int, *, keep: int = 2, collect: bool = False) -> Thread:
    return Thread(name, writer(saves, keep=keep, collect=collect))


def _a(saves: int, *, keep: int = 2, reuse: bool = True) -> Thread:
    """The writer that opened the run before the scenario begins."""
    return Thread("A", writer(saves, opened=SECOND, keep=keep, reuse=reuse))


def _guest(name: str, *changes: Transaction) -> Thread:
    return Thread(name, guest(*changes))


def _others(turns: int, *, slowly: bool = False) -> Thread:
    return Thread("others", churn(turns, slowly=slowly))


COMMITTED, UNKNOWN, FENCED = "Result.COMMITTED", "Result.UNKNOWN", "Result.FENCED"
NOT_FOUND, NOTHING_TO_DO = "Result.NOT_FOUND", "Result.NOTHING_TO_DO"

SCENARIOS = (
    Scenario(
        "take over",
        [_a(2), _writer("B", 2)],
        faults=3,
        settings=Settings(atomic_reads=True, tidy=True),
        sees=[("A", FENCED), ("A", COMMITTED), ("A", UNKNOWN), ("B", COMMITTED), ("B", UNKNOWN)],
        catches=[
            Bug.NO_FENCING,
            Bug.NO_READ_BACK,
            Bug.RETRY_WITH_NEW_ID,
            Bug.UNKNOWN_CLEANS_UP,
            Bug.DELETE_BEFORE_ENTRY,
        ],
    ),
    Scenario(
        "take over, twice",
        [_a(1), _writer("B", 1), _writer("C", 1)],
        faults=1,
        settings=Settings(atomic_reads=True, tidy=True),
        sees=[("A", FENCED), ("B", FENCED), ("B", COMMITTED), ("C", FENCED), ("C", COMMITTED)],
        catches=[Bug.EPOCH_OF_NEWEST],
    ),
    Scenario(
        "take over, every read a step of its own",
        [_a(2), _writer("B", 1)],
        faults=2,
        duplicates=True,
        unreadable=True,
        sees=[("A", FENCED), ("A", UNKNOWN), ("B", "log unreadable"), ("B", COMMITTED)],
        catches=[Bug.PRUNE_PARENT],
    ),
    Scenario(
        "overtaken, with a short lineage",
        [_a(1), _writer("B", 1, keep=3), _others(3)],
        faults=1,
        settings=Settings(atomic_reads=True, tidy=True, ancestors=1),
        sees=[("A", FENCED), ("A", UNKNOWN), ("B", COMMITTED)],
        catches=[
            Bug.SHORT_LINEAGE_MEANS_LOST,
            Bug.ANOTHERS_MEANS_LOST,
            Bug.NO_CHECK_AFTER_CREATE,
        ],
    ),
    Scenario(
        "unknown, retired meanwhile",
        [_a(2, reuse=False), _guest("pruner", Prune(1, ("c1",))), _others(2)],
        faults=1,
        settings=Settings(atomic_reads=True, ancestors=0),
        sees=[("A", COMMITTED), ("A", UNKNOWN), ("pruner", COMMITTED)],
        catches=[Bug.RETRY_REUSES_PACKS, Bug.SHORT_LINEAGE_MEANS_LOST],
    ),
    Scenario(
        "a late write brings the parent back",
        [_a(2), _others(4)],
        faults=2,
        sees=[("A", COMMITTED), ("A", UNKNOWN)],
        duplicates=True,
        unreadable=True,
        catches=[Bug.PARENT_CHECK_AFTER_CREATE, Bug.READS_AFTER_LISTING],
    ),
    Scenario(
        "listings that are no snapshots",
        [_a(2), _others(4)],
        faults=1,
        listing_spans=1,
        settings=Settings(mixed_lists=True),
        sees=[("A", COMMITTED), ("A", UNKNOWN)],
        catches=[Bug.PARENT_CHECK_AFTER_CREATE],
    ),
    Scenario(
        "one listing that takes too long",
        [_a(1), _others(5, slowly=True)],
        settings=Settings(mixed_lists=True),
        sees=[("A", COMMITTED), ("A", UNKNOWN)],
        catches=[Bug.NO_PARENT_CHECK],
    ),
    Scenario(
        "one listing that takes too long, from the first entry on",
        [Thread("A", writer(1, opened=FIRST)), _others(5)],
        log=[FIRST],
        packs=["p0"],
        settings=Settings(mixed_lists=True),
        sees=[("A", COMMITTED), ("A", UNKNOWN)],
        catches=[Bug.KEEP_FIRST_ENTRY],
    ),
    Scenario(
        "a new run",
        [_writer("A", 1), _writer("B", 1)],
        faults=1,
        log=(),
        packs=(),
        sees=[("A", COMMITTED), ("A", FENCED), ("B", COMMITTED), ("B", FENCED)],
        catches=[Bug.EPOCH_OF_NEWEST],
    ),
    Scenario(
        "a new run, overtaken",
        [_writer("A", 1), _writer("B", 0), _others(2)],
        log=(),
        packs=(),
        sees=[("A", COMMITTED), ("A", FENCED)],
        catches=[Bug.PARENT_CHECK_AFTER_CREATE],
    ),
    Scenario(
        "an entry arrives wrong",
        [_a(2), _writer("B", 1)],
        faults=2,
        spoils=True,
        settings=Settings(tidy=True),
        sees=[("A", COMMITTED), ("A", FENCED), ("A", UNKNOWN), ("B", COMMITTED)],
        catches=[
            Bug.LEAVE_OUT_WHAT_IS_THERE,
            Bug.LEAVE_OUT_UNKNOWN,
            Bug.DELETE_SPOILED,
            Bug.PRUNE_BY_NUMBER,
            Bug.LEFT_OUT_MEANS_LOST,
        ],
    ),
    Scenario(
        "an entry arrives wrong beside a guest",
        [_a(1), _guest("tagger", Pin("c0", "tag")), _writer("B", 0)],
        faults=1,
        spoils=True,
        sees=[
            ("A", COMMITTED),
            ("A", UNKNOWN),
            ("tagger", COMMITTED),
            ("tagger", "log unreadable"),
        ],
        catches=[Bug.LEAVE_OUT_WHAT_IS_THERE, Bug.LEAVE_OUT_UNKNOWN, Bug.DELETE_SPOILED],
    ),
    Scenario(
        "the first entry arrives wrong",
        [_writer("A", 1), _writer("B", 1)],
        faults=2,
        spoils=True,
        log=(),
        packs=(),
        sees=[("A", COMMITTED), ("A", FENCED), ("B", COMMITTED), ("B", FENCED)],
        catches=[Bug.LEAVE_OUT_WHAT_IS_THERE, Bug.DELETE_SPOILED],
    ),
    Scenario(
        "retention beside a save",
        [_a(2), _guest("pruner", Prune(1)), _guest("tagger", Pin("c0", "tag"))],
        faults=2,
        settings=Settings(atomic_reads=True),
        sees=[
            ("A", COMMITTED),
            ("pruner", COMMITTED),
            ("pruner", NOTHING_TO_DO),
            ("tagger", COMMITTED),
            ("tagger", NOT_FOUND),
        ],
        catches=[
            Bug.NO_RECHECK_AFTER_REBASE,
            Bug.STALE_RETENTION,
            Bug.REUSED_NAMES,
            Bug.DELETE_BEFORE_ENTRY,
        ],
    ),
    Scenario(
        "collecting orphans",
        [
            _a(2),
            Thread("A", collector(1)),
            _writer("B", 1, collect=True),
            Thread("C", foreign_collector()),
        ],
        faults=1,
        collects=True,
        settings=Settings(atomic_reads=True),
        sees=[
            ("A", COMMITTED),
            ("A", "collected"),
            ("A", FENCED),
            ("B", "collected"),
            ("C", "refused"),
        ],
        catches=[
            Bug.GC_BY_ANOTHER_PROCESS,
            Bug.GC_IGNORES_EPOCH,
            Bug.GC_IGNORES_FLIGHT,
            Bug.GC_READS_BEFORE_LISTING,
            Bug.GC_LOOKS_AT_FLIGHT_LAST,
            Bug.PACKS_BEFORE_OPEN,
        ],
    ),
    Scenario(
        "fork, twice",
        [
            _a(2, keep=1, reuse=False),
            Thread("F", forker("c1", release=True)),
            Thread("G", forker("c1")),
        ],
        child_log=(Entry(1, "child", None, (), 0, "", "", "open", ()),),
        settings=Settings(atomic_reads=True),
        sees=[
            ("A", COMMITTED),
            ("F", "release: Result.COMMITTED"),
            ("F", "pin: Result.NOT_FOUND"),
            ("F", "fork: Result.FENCED"),
            ("G", "forked"),
            ("G", "not empty"),
        ],
        catches=[
            Bug.PIN_WITHOUT_RECHECK,
            Bug.REFER_BEFORE_PIN,
            Bug.FAILED_FORK_UNPINS,
            Bug.UNPIN_BEFORE_CHILD,
            Bug.EPOCH_OF_NEWEST,
        ],
    ),
    Scenario(
        "power loss",
        [
            Thread("A", writer(2, opened=SECOND), writer(1, collect=True)),
            Thread("A", collector(1)),
            _guest("pruner", Prune(1)),
        ],
        crashes=2,
        disk=True,
        collects=True,
        settings=Settings(atomic_reads=True),
        sees=[("A", COMMITTED), ("A (restarted)", "collected"), ("pruner", COMMITTED)],
        catches=[Bug.GC_WITHOUT_SYNC, Bug.BUILD_WITHOUT_SYNC],
    ),
    Scenario(
        "restart",
        [
            Thread("A", writer(2, opened=SECOND), writer(1, collect=True)),
            _guest("pruner", Prune(1)),
        ],
        crashes=1,
        faults=1,
        collects=True,
        settings=Settings(atomic_reads=True),
        sees=[("A", COMMITTED), ("A (restarted)", "collected"), ("pruner", COMMITTED)],
    ),
)


def _told_by_one_listing(scenario: Scenario) -> Scenario:
    settings = dataclasses.replace(scenario.settings, one_listing=True)
    name = f"{scenario.name}, told by one listing"
    return dataclasses.replace(scenario, name=name, settings=settings)


SCENARIOS += tuple(
    _told_by_one_listing(scenario)
    for scenario in SCENARIOS
    if not scenario.settings.atomic_reads and scenario.log
)


def _larger(name: str, **changes: Any) -> Scenario:
    scenario = next(scenario for scenario in SCENARIOS if scenario.name == name)
    return dataclasses.replace(scenario, name=f"{name}, larger", **changes)


# Up to two million states each: minutes in all.
LARGE_SCENARIOS = (
    _larger("overtaken, with a short lineage", faults=2),
    _larger("unknown, retired meanwhile", faults=2),
    _larger("a late write brings the parent back", threads=[_a(2), _others(5)]),
    _larger("listings that are no snapshots", faults=2),
    _larger(
        "retention beside a save",
        threads=[
            _a(1),
            _writer("B", 1),
            _guest("pruner", Prune(1)),
            _guest("tagger", Pin("c0", "tag")),
        ],
        faults=1,
    ),
    _larger("take over, twice", faults=2),
    _larger("an entry arrives wrong", faults=3),
    _larger("an entry arrives wrong beside a guest", duplicates=True),
    _larger("collecting orphans", faults=2),
    _larger("fork, twice", faults=1),
    _larger("power loss", settings=Settings()),
    Scenario(
        "a late write brings the parent back, for a guest",
        [_a(1), _guest("guest", Touch()), _others(3)],
        faults=1,
        sees=[("A", COMMITTED), ("guest", COMMITTED), ("guest", UNKNOWN)],
    ),
)
