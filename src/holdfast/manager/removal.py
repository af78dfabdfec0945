"""Removing checkpoints by name."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from holdfast.core.records import Record
from holdfast.core.retention import Best, Decision, ordered, protected
from holdfast.errors import CheckpointProtected
from holdfast.repo.lending import is_fork_pin

_NOT_NAMED = "not named"


def plan_removal(
    records: Sequence[Record],
    named: Collection[str],
    rules: Sequence[Best] = (),
    *,
    intact: str | None = None,
    damaged: Collection[str] = (),
    force: bool = False,
) -> list[Decision]:
    """What becomes of each of `records` when those with the ids `named` are to go, and why.

    What no retention rule would remove (the newest intact one, the best by `rules`,
    pinned and tagged ones) stays unless `force`; what a forked run needs stays in any
    case. `intact` is the newest one whose every byte is right, `damaged` those after it.
    """
    reasons = protected(records, rules, damaged=damaged)
    decisions: list[Decision] = []
    for record in ordered(records):
        if record.id not in named:
            decisions.append(Decision(record, True, (_NOT_NAMED,)))
            continue
        lent = [f"needed by {pin}" for pin in record.pins if is_fork_pin(pin)]
        why = [r for r in reasons.get(record.id, ()) if not r.startswith("pinned: fork:")]
        if record.id == intact and "newest" not in why:
            why.insert(0, "newest intact")
        if lent or (why and not force):
            decisions.append(Decision(record, True, (*lent, *why)))
        elif why:
            decisions.append(Decision(record, False, ("forced", *why)))
        else:
            text = "named, damaged" if record.id in damaged else "named"
            decisions.append(Decision(record, False, (text,)))
    return decisions


def held_back(decisions: Sequence[Decision]) -> list[Decision]:
    """Those of a plan that were named and stay."""
    return [d for d in decisions if d.keep and d.why != (_NOT_NAMED,)]


def refuse(decisions: Sequence[Decision], address: str) -> None:
    """Raise CheckpointProtected, with each reason, if any that was named stays."""
    stay = held_back(decisions)
    if not stay:
        return
    named = len(stay) + sum(not d.keep for d in decisions)
    lines = [f"step {d.record.step:,}: {', '.join(d.why)}" for d in stay]
    which = "it" if named == 1 else f"{len(stay)} of these {named} checkpoints"
    verb = "is" if len(stay) == 1 else "are"
    lent = all(w.startswith("needed by") for d in stay for w in d.why[:1])
    raise CheckpointProtected(
        f"nothing was removed from {address}, since {which} {verb} protected:\n" + "\n".join(lines),
        hint="The forked run needs its data: remove that run first."
        if lent
        else "Take tags and pins away first, or say --force to remove it all the same.",
    )
