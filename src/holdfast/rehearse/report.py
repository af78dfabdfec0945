"""What a rehearsal found, in words and as plain values."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from holdfast.errors import DIFFERENT
from holdfast.rehearse.compare import Difference, variable_of

Verdict = Literal["equal", "different", "incomplete"]

_WIDTH = 78

USUAL_CAUSES = (
    "an object that is not tracked, in another module or in a closure",
    "random numbers from a generator that is not tracked",
    "data that run.batches does not hand out",
    "an operation of the device that is not deterministic",
)
_OF_MANY_RANKS = (
    "a model that is tracked without its DistributedDataParallel, which knows the order in which "
    "more than two ranks are summed: run.track(model=ddp)"
)


@dataclass(frozen=True)
class Act:
    """One process of the rehearsal."""

    start: int | None
    """The step of the checkpoint that it went on from, 0 without one; None: it came to no
    loop."""
    end: str
    """How it ended."""
    seconds: float

    def line(self) -> str:
        """For people."""
        start = "never at its loop" if self.start is None else f"from step {self.start:,}"
        return f"{start:<16} {self.end:<48} {self.seconds:6.1f} s"


@dataclass(frozen=True)
class Cause:
    """Why the two runs differ."""

    name: str
    """Of the variable, metric, random state, or leaf; "PYTHONHASHSEED"."""
    kind: str
    """In words: "number", "StepLR", "random generator of numpy", …"""
    step: int
    why: str
    remedy: str = ""
    rank: int = 0
    """Where it was seen, of several that train together."""


@dataclass
class Report:
    """The outcome; `to_tree` gives all of it as plain values."""

    command: list[str]
    seed: int
    verdict: Verdict = "incomplete"
    problem: str = ""
    """Why it is incomplete, or how a process failed."""
    steps: int = 0
    ranks: int = 1
    """How many train together."""
    acts: list[Act] = field(default_factory=list[Act])
    causes: list[Cause] = field(default_factory=list[Cause])
    differences: list[Difference] = field(default_factory=list[Difference])
    ignored: list[Difference] = field(default_factory=list[Difference])
    """Differ between two equal starts: clocks, for instance. Or named in `ignore`."""
    compared: dict[str, int] = field(default_factory=dict[str, int])
    """How many of each kind were compared."""
    tolerance: float = 0.0
    environment: dict[str, Any] = field(default_factory=dict[str, Any])
    """Versions, hardware and revision, as the program's checkpoints record them."""
    data: str = ""
    """Digest of all items that the program was given, in order."""
    output: str = ""
    """The end of what the program wrote when it was left alone."""

    @property
    def exit_code(self) -> int:
        return {"equal": 0, "different": DIFFERENT, "incomplete": 3}[self.verdict]

    def to_tree(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "exit_code": self.exit_code}


def causes(
    differences: Sequence[Difference],
    *,
    hash_dependent: Sequence[Difference] = (),
    unrepeatable: Sequence[Difference] = (),
    seldom: Sequence[Difference] = (),
    ranks: int = 1,
) -> list[Cause]:
    """What to tell a person, the likeliest cause first.

    `differences` are those of restoring; `hash_dependent` those that vanish with an equal
    PYTHONHASHSEED; `unrepeatable` those between two equal starts from one checkpoint; `seldom`
    those that no other start from it has shown.
    """
    found: list[Cause] = []
    found += [
        Cause(
            one.name,
            "run",
            one.step,
            "started from zero although there was a checkpoint",
            "Give the Run the same address at every start.",
        )
        for one in differences
        if one.kind == "start"
    ]
    variables: dict[str, Difference] = {}
    for one in differences:
        if one.kind == "variable":
            variables.setdefault(variable_of(one.name), one)
    found += [_of_variable(name, one) for name, one in variables.items()]
    if hash_dependent:
        first = min(hash_dependent, key=lambda one: one.step)
        found.append(
            Cause(
                "PYTHONHASHSEED",
                "order",
                first.step,
                f"{_title(first)} depends on the hash seed, which differs at every start: the "
                "program goes through a set, or another order made of hashes",
                "Sort it: for name in sorted(names).",
            )
        )
    for some, differs in (
        (unrepeatable, "differs between two equal starts from one checkpoint"),
        (seldom, "differed once, and in none of the other starts from the same checkpoint"),
    ):
        if some:
            first = min(some, key=lambda one: one.step)
            found.append(
                Cause(
                    first.name,
                    "not repeatable",
                    first.step,
                    f"{_title(first)} {differs}: the program is not repeatable, interrupted or not",
                    "Usual causes: operations that are not deterministic "
                    "(torch.use_deterministic_algorithms), random numbers that are not seeded.",
                )
            )
    if not found and differences:
        found.append(_of_first(differences, ranks))
    return found


def _of_variable(name: str, one: Difference) -> Cause:
    is_value = one.what in ("number", "text") or one.what.endswith("[]")
    is_array = not is_value and one.what.endswith("]")
    whole = one.name == name
    # What comes out of a `state_dict` has the class of the object for its kind.
    is_plain = is_value or is_array or one.what == "set"
    in_object = one.by_framework and is_plain and one.name.startswith(f"{name}.")
    kind = "local variable" if is_value and whole and not one.is_global else one.what
    if is_value:
        why = f"is {one.killed} after a resume, and {one.alone} without"
    else:
        why = "is not tracked: after a resume it is not what it was"
    if whole and one.is_global and (is_value or is_array):
        remedy = f"run.track(more=holdfast.Variables(globals(), {name!r}))"
    elif whole and is_value:
        remedy = f"Keep it in the box: state = run.box({name}=…), then use state.{name}."
    elif whole and is_array:
        remedy = (
            f"If it is filled in place: run.track({name}={name}). If it is assigned anew: keep it "
            "in the box."
        )
    else:
        remedy = f"run.track({name}={name})"
        if in_object:
            remedy = f"Give it state_dict and load_state_dict, and track it: {remedy}."
        elif is_value:
            remedy = f"Track what holds it, or keep it in run.box: {remedy}."
    shown = is_value or in_object or one.what.startswith("random generator")
    return Cause(one.name if shown else name, kind, one.step, why, remedy, one.rank)


def _of_first(differences: Sequence[Difference], ranks: int) -> Cause:
    first = min(differences, key=lambda one: (one.step, _ORDER.index(one.kind)))
    usual = [*USUAL_CAUSES, _OF_MANY_RANKS] if ranks > 2 else USUAL_CAUSES
    remedy = f"Usual causes: {'; '.join(usual)}."
    if first.kind == "data":
        remedy = (
            "The loop is given other data after a resume. Take it from run.batches(loader), and "
            "track what makes its order and its augmentation."
        )
    name = _loop(first.name) if first.kind in ("data", "place") else first.name
    return Cause(name, first.kind, first.step, f"{_title(first)} differs", remedy, first.rank)


_ORDER = ("start", "place", "random", "data", "variable", "metric", "state")


def _loop(place: str) -> str:
    """Of "epochs#0/batches#0" the kind of the innermost."""
    return place.rpartition("/")[2].partition("#")[0]


def _title(one: Difference) -> str:
    return {
        "metric": f"metric {one.name!r}",
        "data": f"the data of run.{_loop(one.name)}",
        "random": f"the random state of {one.name}",
        "state": f"{one.name}",
        "place": f"the order of the loops ({_loop(one.name)})",
    }.get(one.kind, one.name)


def text_of(report: Report) -> str:
    """The verdict, for people, at most 80 columns wide where names allow it."""
    lines: list[str] = [""]
    if report.verdict == "equal":
        counts = ", ".join(_counted(count, name) for name, count in report.compared.items())
        near = f"within {report.tolerance:g}" if report.tolerance else "bit for bit"
        lines += _wrapped(f"EQUAL, {near}: {counts}.", 0)
    elif report.verdict == "different":
        lines += ["DIFFERENT:", *(f"  {line}" for line in report.problem.splitlines())]
        for cause in report.causes:
            where = f"on rank {cause.rank} at" if cause.rank else "at"
            lines.append(f"  {cause.name} ({cause.kind}), first seen {where} step {cause.step:,}")
            lines += _wrapped(cause.why, 4) + _wrapped(cause.remedy, 4)
        lines += _consequences(report.differences)
    else:
        first, *rest = report.problem.splitlines()
        lines += [*_wrapped(f"INCOMPLETE: {first}", 0), *(f"  {line}" for line in rest)]
    if report.ignored:
        names = ", ".join(sorted({one.name for one in report.ignored}))
        told = f"Not compared, since they differ at every start or were named: {names}."
        lines += ["", *_wrapped(told, 0)]
    return "\n".join(lines)


def _counted(count: int, name: str) -> str:
    """
    >>> _counted(1, "metrics"), _counted(1, "leaves"), _counted(1200, "values")
    ('1 metric', '1 leaf', '1,200 values')
    """
    one = "leaf" if name == "leaves" else name.removesuffix("s")
    return f"{count:,} {one if count == 1 else name}"


def _wrapped(text: str, indent: int) -> list[str]:
    margin = " " * indent
    return textwrap.wrap(text, _WIDTH, initial_indent=margin, subsequent_indent=margin)


def _consequences(differences: Sequence[Difference]) -> list[str]:
    rest = [one for one in differences if one.kind in ("data", "metric", "state")]
    if not rest:
        return []
    shown: list[str] = []
    for one in rest[:8]:
        values = f": {one.killed} instead of {one.alone}" if one.alone else ""
        line = f"    step {one.step:>6,}  {_title(one)}{values}"
        shown += textwrap.wrap(line, _WIDTH, subsequent_indent=" " * 17, break_long_words=False)
    more = [f"    and {len(rest) - 8} more"] if len(rest) > 8 else []
    return ["", "  What differs from then on:", *shown, *more]
