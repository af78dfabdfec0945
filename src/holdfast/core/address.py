"""References: how one checkpoint is named, in code and on the command line.

    runs/mnist                 the latest (the newest commit)
    runs/mnist@latest          the same
    runs/mnist@best            the best by the run's own metric
    runs/mnist@best:val_loss   the lowest val_loss
    runs/mnist@best:acc:max    the highest acc
    runs/mnist@41200           step 41,200 (its newest commit)
    runs/mnist@gold            a tag
    runs/mnist@9f3c            an id, by 4 or more of its first characters

Only the last `@` of the last path segment separates: `/home/a@b/run` and
`s3://key@host` are whole addresses. A folder whose own name has an `@` is written
with a slash at the end: `runs/a@b/`, `runs/a@b/@latest`.

A number is always a step, never an id: when a step is gone, `@41200` is an error and
not another checkpoint whose id starts so. `short_ids` gives ids that are no numbers.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from holdfast.core.records import Record
from holdfast.core.retention import (
    Best,
    Mode,
    looks_higher_better,
    ordered,
    ranking,
    split_metric,
)
from holdfast.errors import BadAddress, CheckpointNotFound, NoStore

SELECTORS = "@latest, @best, @best:metric[:max|:min], @<step>, @<tag> or @<id prefix>"
SHORTEST_ID = 4
_LONGEST_NAME = 60
_ID_PREFIX = re.compile(rf"[0-9a-f]{{{SHORTEST_ID},64}}")
_ID = re.compile(r"[0-9a-f]{64}")
# Thousands may be grouped, since that is how we print steps.
_STEP = re.compile(r"[0-9]{1,18}|[0-9]{1,3}(?:[,_][0-9]{3}){1,5}")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,63}")
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://([^/]*)(.*)", re.DOTALL)
_RESERVED = frozenset({"latest", "newest", "oldest", "last", "first", "none", "all"})


@dataclass(frozen=True)
class Latest:
    """The newest commit: after going back to an earlier step, not the highest step."""

    def __str__(self) -> str:
        return "latest"


@dataclass(frozen=True)
class BestBy:
    """The best by a metric; None where the reference leaves it to the run."""

    metric: str | None = None
    mode: Mode | None = None

    def __str__(self) -> str:
        return ":".join(["best", *filter(None, (self.metric, self.mode))])


@dataclass(frozen=True)
class AtStep:
    """The newest commit at a step."""

    step: int

    def __str__(self) -> str:
        return str(self.step)


@dataclass(frozen=True)
class Named:
    """A tag, or else the start of an id."""

    name: str

    def __str__(self) -> str:
        return self.name


Selector: TypeAlias = Latest | BestBy | AtStep | Named


@dataclass(frozen=True)
class Reference:
    """A run's address and which of its checkpoints is meant."""

    address: str
    selector: Selector
    explicit: bool = True
    """Whether there was an `@`: a command about whole runs takes "no @" as all."""

    def __str__(self) -> str:
        return f"{self.address}@{self.selector}"


# -- parsing ------------------------------------------------------------------


def parse_reference(text: str) -> Reference:
    """The reference that `text` writes down. Raises BadAddress.

    >>> parse_reference("s3://b/x@best:val_loss")
    Reference(address='s3://b/x', selector=BestBy(metric='val_loss', mode=None), explicit=True)
    """
    address, chosen = split_reference(text)
    if chosen is None:
        return Reference(address, Latest(), explicit=False)
    try:
        return Reference(address, parse_selector(chosen))
    except BadAddress as error:
        raise BadAddress(
            f"{text!r}: {error.message}",
            hint=f"{error.hint} If the folder's own name has an '@', end it with '/'.",
        ) from None


def split_reference(text: str) -> tuple[str, str | None]:
    """The address in `text`, and what follows its `@`; None without one. Raises BadAddress.

    >>> split_reference("runs/mnist@last=3"), split_reference("runs/a@b/")
    (('runs/mnist', 'last=3'), ('runs/a@b', None))
    """
    start, end = _last_segment(text)
    at = text.rfind("@", start, end)
    return (_address(text, text), None) if at < 0 else (_address(text[:at], text), text[at + 1 :])


def _last_segment(text: str) -> tuple[int, int]:
    """Where the last path segment of `text` starts and ends."""
    start = 0
    if match := _SCHEME.fullmatch(text):
        scheme, authority, _ = match.groups()
        start = len(scheme) + 3
        # The authority of a URL may hold credentials (key@host); memory:// has none,
        # there the first segment is a name like any other.
        if scheme.lower() != "memory":
            start += len(authority)
    return max(start, text.rfind("/", start) + 1), len(text)


def _address(address: str, text: str) -> str:
    if "\0" in address:
        raise BadAddress(f"{text!r} has a NUL character in it", hint="Take it out.")
    match = _SCHEME.fullmatch(address)
    root, path = (address[: match.start(3)], match[3]) if match else ("", address)
    if not match and address.startswith("/"):
        root, path = "/", address[1:]
    path = path.rstrip("/")
    if not root + path:
        raise BadAddress(f"{text!r} names no run", hint="Write runs/mnist or runs/mnist@latest.")
    return root + path


def parse_selector(text: str | int | None) -> Selector:
    """What follows the `@`, or a step; None is the latest. Raises BadAddress.

    >>> parse_selector("41,200"), parse_selector("best:acc:max")
    (AtStep(step=41200), BestBy(metric='acc', mode='max'))
    """
    if text is None:
        return Latest()
    if isinstance(text, bool) or not isinstance(text, int | str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise BadAddress(f"{text!r} names no checkpoint", hint=f"Write {SELECTORS}.")
    if isinstance(text, int):
        if text < 0:
            raise BadAddress(
                f"{text} is not a step: steps are counted from 0", hint=f"Write {SELECTORS}."
            )
        return AtStep(text)
    text = text.removeprefix("@")
    if text == "latest":
        return Latest()
    if text == "best":
        return BestBy()
    if text.startswith("best:"):
        try:
            metric, mode = split_metric(text.removeprefix("best:"))
        except ValueError as error:
            raise BadAddress(
                f"cannot read '@{text}': {error}", hint=f"Write {SELECTORS}."
            ) from None
        if not metric:
            raise BadAddress(f"'@{text}' names no metric", hint="Write @best:val_loss.")
        return BestBy(metric, mode)
    if _STEP.fullmatch(text):
        return AtStep(int(re.sub("[,_]", "", text)))
    if _TAG.fullmatch(text) and not text.isdigit():
        return Named(text)
    raise BadAddress(f"'@{text}' names no checkpoint", hint=f"Write {SELECTORS}.")


def validate_tag(name: str) -> str:
    """`name` itself if it can be a tag. Raises BadAddress.

    Whatever else a reference may say is no tag: a step, an id, "latest", "best…".
    """

    def refused(reason: str) -> BadAddress:
        return BadAddress(
            f"{name!r} cannot be a tag: {reason}",
            hint="Use letters, digits and . _ + - (64 at most), e.g. 'paper-v1'.",
        )

    if not _TAG.fullmatch(name):
        raise refused("it is empty, too long, or has characters that a reference cannot hold")
    lower = name.lower()
    if _STEP.fullmatch(name):
        raise refused("it would be read as a step")
    if lower in _RESERVED or lower.startswith("best"):
        raise refused("that name is kept for references")
    if _ID_PREFIX.fullmatch(lower):
        raise refused("it would be read as the start of an id (letters a-f and digits only)")
    return name


# -- selecting ----------------------------------------------------------------


def select(
    records: Sequence[Record],
    selector: Selector,
    rules: Sequence[Best] = (),
) -> Record:
    """The one of `records` that `selector` names.

    `rules` are the run's own `best` rules: the first is what "@best" means, and each
    gives the mode of "@best:metric" for its metric. Without them "@best" takes the
    only metric there is. Raises CheckpointNotFound, which names what exists; BadAddress
    if it must be said which metric, or whether higher is better.
    """
    run = ordered(records)
    if not run:
        raise CheckpointNotFound("the run has no checkpoint")
    match selector:
        case Latest():
            return run[-1]
        case AtStep(step):
            found = [record for record in run if record.step == step]
            if not found:
                raise CheckpointNotFound(f"no checkpoint at step {step:,}", hint=available(run))
            return found[-1]
        case BestBy(metric, mode):
            return _select_best(run, metric, mode, rules)
        case Named(name):
            return _select_named(run, name)


def newest_that(selector: Selector) -> Callable[[Record], bool] | None:
    """What `select` looks for, where that is the newest record with a property of its own;
    None where it must see all records."""
    match selector:
        case Latest():
            return lambda record: True
        case AtStep(step):
            return lambda record: record.step == step
        case Named(name) if _ID.fullmatch(name):  # no tag looks like one
            return lambda record: record.id == name
        case _:
            return None


def _select_best(
    run: Sequence[Record],
    metric: str | None,
    mode: Mode | None,
    rules: Sequence[Best],
) -> Record:
    names = sorted({name for record in run for name in record.metrics})
    if metric is None:
        if rules:
            metric, mode = rules[0].metric, rules[0].mode
        elif len(names) == 1:
            metric = names[0]
        elif not names:
            raise CheckpointNotFound("no checkpoint has a metric", hint=available(run))
        else:
            raise BadAddress(
                "'@best' does not say by which metric", hint=f"Logged: {some_of(names)}."
            )
    mode = mode or next((rule.mode for rule in rules if rule.metric == metric), None)
    if mode is None:
        if looks_higher_better(metric):
            raise BadAddress(
                f"'@best:{metric}' does not say whether higher or lower is better",
                hint=f"Write @best:{metric}:max or @best:{metric}:min.",
            )
        mode = "min"
    best = ranking(run, metric, mode)
    if not best:
        raise CheckpointNotFound(
            f"no checkpoint has a finite metric {metric!r}", hint=available(run)
        )
    return best[0]


def _select_named(run: Sequence[Record], name: str) -> Record:
    tagged = [record for record in run if name in record.tags]
    if tagged:
        return tagged[-1]
    if not _ID_PREFIX.fullmatch(name.lower()):
        raise CheckpointNotFound(f"no checkpoint has the tag {name!r}", hint=available(run))
    found = [record for record in run if record.id.startswith(name.lower())]
    if not found:
        raise CheckpointNotFound(
            f"no checkpoint has the tag or an id that starts with {name!r}", hint=available(run)
        )
    if len(found) > 1:
        short = short_ids(record.id for record in run)
        ids = ", ".join(f"{short[r.id]} (step {r.step:,})" for r in found[:4])
        raise CheckpointNotFound(
            f"{len(found)} ids start with {name!r}", hint=f"Write more of it: {ids}."
        )
    return found[0]


def no_checkpoint(address: str, *, elsewhere: str = "") -> NoStore:
    """The error for a run that is not there, or has no checkpoint yet. `elsewhere`: the folder
    has only what one node keeps of the run there."""
    hint = "Check the address: `holdfast ls FOLDER` lists the runs below a folder."
    if elsewhere:
        hint = f"It has what one node keeps of the run in {printable(elsewhere)}."
    return NoStore(f"there is no checkpoint in {printable(address)}", hint=hint)


def available(records: Sequence[Record]) -> str:
    """What a reference could have said, in one line."""
    run = ordered(records)
    # A step that was saved twice is where its newest commit is.
    steps = list(dict.fromkeys(f"{record.step:,}" for record in reversed(run)))[::-1]
    parts = [f"There are steps {some_of(steps, newest=True)}"]
    if tags := sorted({tag for record in run for tag in record.tags}):
        parts.append(f"tags {some_of(tags)}")
    if names := sorted({name for record in run for name in record.metrics}):
        parts.append(f"metrics {some_of(names)}")
    return "; ".join(parts) + "."


def some_of(words: Sequence[str], *, newest: bool = False) -> str:
    """Up to eight of `words`; of steps the newest, which people mean most often."""
    words = [_brief(word) for word in words]
    if len(words) <= 8:
        return ", ".join(words)
    if newest:
        return ", ".join([words[0], "…", *words[-6:]])
    return ", ".join([*words[:7], f"… ({len(words)} in all)"])


def printable(text: str) -> str:
    """A name or an address, which anyone may have chosen, for one line of a message."""
    return text if text.isprintable() else repr(text)[1:-1]


def shell_word(text: str) -> str:
    """An address or a reference in a command that is printed to be pasted.

    >>> shell_word("runs/mnist@best"), shell_word("s3://b/x?region=r&endpoint=e")
    ('runs/mnist@best', "'s3://b/x?region=r&endpoint=e'")
    """
    return shlex.quote(printable(text))


def _brief(word: str) -> str:
    """A tag or a metric's name in a list of some."""
    word = printable(word)
    return word if len(word) <= _LONGEST_NAME else word[:_LONGEST_NAME] + "…"


def short_ids(
    ids: Iterable[str], among: Iterable[str] = (), *, shortest: int = 8
) -> dict[str, str]:
    """For each of `ids` the shortest start that names it among them, and `among`, in a
    reference.

    Never all digits, which would be read as a step, and at least `shortest` long.

    >>> short_ids(["9f3c01", "9f3d02", "123456"], shortest=3)
    {'123456': '123456', '9f3c01': '9f3c', '9f3d02': '9f3d'}
    """
    wanted = set(ids)
    starts = {id[:shortest] for id in wanted}
    run = sorted({*wanted, *(id for id in among if id[:shortest] in starts)})
    short: dict[str, str] = {}
    for i, id in enumerate(run):
        if id not in wanted:
            continue
        # In sorted order only the neighbours can share the longest start.
        shared = max((_shared(id, run[j]) for j in (i - 1, i + 1) if 0 <= j < len(run)), default=0)
        length = max(shortest, shared + 1)
        while length < len(id) and id[:length].isdigit():
            length += 1
        short[id] = id[:length]
    return short


def _shared(a: str, b: str) -> int:
    """How many characters two ids have in common at their start."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
