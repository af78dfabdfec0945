"""Where the checkpoints of a task are: a folder in the flow's own datastore.

    <datastore root>/mf.holdfast/<flow>/<step>/<task>/<run>/<writer>

Each `<writer>` is a Holdfast run: `main` is the task's own process in all of its attempts,
others belong to ranks and subprocesses that save, so that these never meet; `loop` is its `Run`;
`models` and `models-…` hold its models. `<task>` is the same
in every run of the flow (`task`, `task-3` for the fourth of a foreach), and a run that resumes
another one says so in its name (`<run>..<origin>`): one listing of `<task>` shows the runs and
who goes on from whom.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from holdfast.errors import UsageError

FOLDER = "mf.holdfast"
MAIN = "main"
LOOP = "loop"
"""The writer that is a `Run` of the task's: its checkpoints are not `save`'s."""
MODELS = "models"

_PLAIN = re.compile(rb"[A-Za-z0-9_-]")
_ESCAPED = re.compile(rb"\.([0-9a-f]{2})")
# Stores take no part of a key that begins with a dot or a dash, or is empty.
_BEGINS = "_="
"""What no other part begins with: "=" is escaped."""


def key_part(text: str) -> str:
    """`text` as one part of a key, fit for a folder and for every bucket.

    >>> key_part("sfn-12.a/b"), text_of(key_part("sfn-12.a/b"))
    ('sfn-12.2ea.2fb', 'sfn-12.a/b')
    >>> key_part("Übung"), text_of("_=.c3.9cbung")
    ('_=.c3.9cbung', 'Übung')
    """
    parts = (bytes([byte]) for byte in text.encode())
    part = "".join(p.decode() if _PLAIN.fullmatch(p) else f".{p.hex()}" for p in parts)
    return part if part and part[0] not in ".-" else _BEGINS + part


def text_of(part: str) -> str:
    """What `key_part` was given. Raises ValueError for what it does not make."""
    escaped = part.removeprefix(_BEGINS).encode()
    text = _ESCAPED.sub(lambda found: bytes.fromhex(found[1].decode()), escaped).decode()
    if key_part(text) != part:
        raise ValueError(f"{part!r} is the name of nothing here")
    return text


def is_loop(writer: str) -> bool:
    """Whether a folder beside `main` is that of a `Run`: `loop`, `loop-2`, …"""
    return writer.partition("-")[0] == LOOP


def holds_models(writer: str) -> bool:
    """Whether what that writer has saved are models, not checkpoints."""
    return writer.partition("-")[0] == MODELS


class RunName(NamedTuple):
    """A run of a flow, and the one that it resumes ("" for none)."""

    run: str
    origin: str = ""

    @property
    def part(self) -> str:
        """Both as one part of a key.

        >>> RunName("9", "7").part
        '9..7'
        """
        return key_part(self.run) + (f"..{key_part(self.origin)}" if self.origin else "")

    @classmethod
    def parse(cls, part: str) -> RunName:
        """The inverse of `part`. Raises ValueError for what is none."""
        run, dots, origin = part.partition("..")
        return cls(text_of(run), text_of(origin) if dots else "")


@dataclass(frozen=True)
class Root:
    """A datastore's root as Holdfast addresses it."""

    url: str
    """A folder, or `s3://bucket/prefix` without a slash at the end."""
    query: str = ""
    """What follows it: `?endpoint=http://…`, or nothing."""

    def address(self, *parts: str) -> str:
        """The address of what lies below."""
        if "://" not in self.url:
            return os.path.join(self.url, *parts)
        return "/".join((self.url, *parts)) + self.query


@dataclass(frozen=True)
class Place:
    """The task of a flow that its checkpoints belong to, in one run.

    >>> Place("Train", "fit", RunName("7", "5"), foreach=(3,)).parts
    ('mf.holdfast', 'Train', 'fit', 'task-3', '7..5')
    """

    flow: str
    step: str
    run: RunName
    foreach: tuple[int, ...] = ()
    """The indexes of the foreach branches that the task is in, outermost first."""
    iterations: tuple[int, ...] = ()
    """How often each of the loops around the step has come round."""

    @property
    def task(self) -> str:
        """What tells it from others of its step, in every run of the flow."""
        name = "task"
        if self.foreach:
            name += "-" + ".".join(map(str, self.foreach))
        if self.iterations:
            name += "-i" + ".".join(map(str, self.iterations))
        return name

    @property
    def parts(self) -> tuple[str, ...]:
        return (*self.task_parts, self.run.part)

    @property
    def task_parts(self) -> tuple[str, ...]:
        """Where this task is in all runs."""
        return (FOLDER, key_part(self.flow), key_part(self.step), self.task)


def lineage(
    run: RunName, runs: Sequence[RunName], origins: Callable[[], Mapping[str, str]] = dict
) -> Iterator[list[RunName]]:
    """The runs of `runs` that a resumed `run` may go on from: nearest relatives first.

    A run that is resumed and those that resumed it belong together: `resume` without a run id
    names the same origin each time, and the second one must not lose what the first has done.

    >>> runs = [RunName("1"), RunName("2", "1"), RunName("3", "1")]
    >>> [[r.run for r in family] for family in lineage(RunName("4", "3"), runs)]
    [['3'], ['1', '2']]

    `origins` is asked for the origin of a run that is not in `runs`.

    >>> [[r.run for r in family] for family in lineage(RunName("5", "4"), runs, lambda: {"4": "3"})]
    [[], ['3'], ['1', '2']]
    """
    seen = {run.run}
    origin = run.origin
    while origin and origin not in seen:
        family = [r for r in runs if origin in (r.run, r.origin) and r.run not in seen]
        seen.update((origin, *(r.run for r in family)))
        yield family
        named = [r.origin for r in family if r.run == origin]
        origin = named[0] if named else origins().get(origin, "")


def root_of(kind: str, root: str, **settings: str) -> Root:
    """The root of a datastore of Metaflow's, by its type; `settings` are options of the address
    (`endpoint`, `region`, `account`), empty ones left out.

    >>> root_of("s3", "s3://bucket/metaflow/", endpoint="http://127.0.0.1:9000").address("a")
    's3://bucket/metaflow/a?endpoint=http://127.0.0.1:9000'

    Raises UsageError for a type that Holdfast cannot write to.
    """
    query = "&".join(f"{name}={value}" for name, value in settings.items() if value)
    query = f"?{query}" if query else ""
    root = root.rstrip("/")
    if kind in ("local", "spin"):
        return Root(os.path.abspath(root))
    if kind in ("s3", "gs"):
        return Root(root, query)
    if kind == "azure":
        return Root(root if "://" in root else f"az://{root}", query)
    raise UsageError(
        f"checkpoints cannot be kept in a datastore of type {kind!r}",
        hint="Run the flow with --datastore=local, s3, gs or azure.",
    )
