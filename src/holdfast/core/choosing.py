"""Several checkpoints of a run, in the words of references and of `keep=`.

    all                every one that is listed
    last=5             the five newest, one per step
    best=3:val_loss    the three best by a metric
    every=1000         the lowest step of each 1000
    within=2h          saved at most that long before the newest
    41200, gold, 9f3c, latest, best:val_loss    one, as after the `@` of a reference

Several words, separated by blanks or in a list, choose all that any of them names. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from holdfast.core.address import Selector, available, parse_selector, select
from holdfast.core.records import Record
from holdfast.core.retention import Best, KeepPolicy, ordered, parse_keep, wanted_by
from holdfast.errors import BadAddress, BadPolicy, CheckpointNotFound

Choice: TypeAlias = str | int | Iterable[str | int]
"""What `parse_choice` reads: words in one text, a step, or a list of them."""

WORDS = (
    "all, last=N, best=K:metric[:max|:min], every=N, within=DUR, a step, a tag, the start of an "
    "id, latest, best:metric"
)


@dataclass(frozen=True)
class Chosen:
    """What a choice says, before anybody looked at a run."""

    everything: bool = False
    policies: tuple[KeepPolicy, ...] = ()
    """One for each rule word."""
    selectors: tuple[Selector, ...] = ()


def parse_choice(choice: Choice) -> Chosen:
    """Read the words. Raises BadAddress, BadPolicy.

    >>> parse_choice("last=2 gold").selectors
    (Named(name='gold'),)
    """
    words: list[str | int] = []
    for part in [choice] if isinstance(choice, str | int) else choice:
        words += part.split() if isinstance(part, str) else [part]
    if not words:
        raise BadAddress("no checkpoint is named", hint=f"Name some: {WORDS}.")
    everything = False
    policies: list[KeepPolicy] = []
    selectors: list[Selector] = []
    for word in words:
        if word == "all":
            everything = True
        elif isinstance(word, str) and "=" in word:
            policies.append(_rule(word))
        else:
            selectors.append(parse_selector(word))
    return Chosen(everything, tuple(policies), tuple(selectors))


def _rule(word: str) -> KeepPolicy:
    try:
        policy = parse_keep(word)
    except BadPolicy as error:
        reason = error.message.partition(": ")[2]
        raise BadPolicy(f"cannot read {word!r}: {reason}", hint=f"Write {WORDS}.") from None
    if policy.size_bytes is not None:
        raise BadPolicy(f"{word!r} is a limit, and names no checkpoints", hint=f"Write {WORDS}.")
    return policy


def choose(records: Sequence[Record], chosen: Chosen, rules: Sequence[Best] = ()) -> list[Record]:
    """The records that any word names, in the order of their commits, each once.

    `rules` as for `address.select`. Raises CheckpointNotFound for a word that names none.
    """
    if chosen.everything:
        return ordered(records)
    ids: set[str] = set()
    for policy in chosen.policies:
        found = wanted_by(records, policy)
        if not found:  # of a run that has some, only a metric can be missing
            raise CheckpointNotFound(
                f"no checkpoint has a finite metric {policy.best[0].metric!r}"
                if policy.best
                else "there is no checkpoint",
                hint=available(records) if records else "",
            )
        ids.update(record.id for record in found)
    ids.update(select(records, selector, rules).id for selector in chosen.selectors)
    return [record for record in ordered(records) if record.id in ids]
