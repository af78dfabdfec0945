"""`holdfast prune`: apply a retention rule now."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from textwrap import wrap
from typing import Any

import click

from holdfast.cli.options import json_option, opened, whole_run
from holdfast.cli.render import (
    Column,
    checkpoint_json,
    plural,
    print_json,
    shown,
    table,
    table_width,
    terminal_width,
)
from holdfast.core.address import no_checkpoint, short_ids
from holdfast.core.retention import Decision, parse_keep
from holdfast.core.units import format_ago, format_size
from holdfast.errors import BadPolicy

# Columns of the table, and how much of a reason should fit on a line.
_SAVED, _SIZE = 2, 3
_ROOM = 20


@click.command(
    short_help="Remove checkpoints that no rule keeps.",
    epilog="""\b
Examples:
  holdfast prune runs/mnist --keep "last=3 best=2:val_loss" --dry-run
  holdfast prune runs/mnist --keep "last=3 every=1000"
  holdfast prune runs/mnist --keep "last=5 within=2d size=200GB" --json

\b
Rules (one is enough to keep a checkpoint; size= is applied last):
  last=N               the N newest
  best=K:METRIC[:max]  the K best by a metric
  every=N              the lowest step of each N steps
  within=DUR           those of the last DUR before the newest (90s 2h 7d)
  size=SIZE            at most so much in all (200GB)
The newest, the best by a rule, pinned and tagged ones always stay.""",
)
@click.argument("address", metavar="RUN")
@click.option("--keep", required=True, metavar="RULES", help="What to keep; see below.")
@click.option("--dry-run", is_flag=True, help="Show what would go and why; remove nothing.")
@json_option
def prune(address: str, keep: str, dry_run: bool, as_json: bool) -> None:
    """Remove the checkpoints of a run that no rule keeps.

    Asks nothing, so try --dry-run first. Safe beside a job that is writing the run.
    The newest checkpoint is verified first; if none is intact, nothing is removed.
    """
    address = whole_run(address)
    if parse_keep(keep).empty:
        raise BadPolicy(
            "--keep has no rule, so nothing would go", hint='For example: --keep "last=3"'
        )
    with opened(address) as run:
        decisions = run.prune(keep, dry_run=dry_run)
    if not decisions:
        raise no_checkpoint(address)
    if as_json:
        print_json({"ok": True, "run": address, **_json(address, decisions, keep, dry_run)})
    else:
        print(decisions_text(decisions, dry_run=dry_run, now_s=time.time()))


def freed_bytes(decisions: Iterable[Decision]) -> int:
    """Bytes of the packs that only removed checkpoints needed."""
    removed: dict[str, int] = {}
    kept: set[str] = set()
    for decision in decisions:
        if decision.keep:
            kept.update(decision.record.packs)
        else:
            removed.update(decision.record.packs)
    return sum(nbytes for pack, nbytes in removed.items() if pack not in kept)


def decisions_text(
    decisions: Sequence[Decision], *, dry_run: bool, now_s: float, width: int | None = None
) -> str:
    """Newest first: all of them in a dry run, else those that were removed; then the sum."""
    listed = [d for d in reversed(decisions) if dry_run or not d.keep]
    ids = short_ids([decision.record.id for decision in decisions])
    text = decision_rows(listed, ids, actions=dry_run, now_s=now_s, width=width)
    kept = sum(decision.keep for decision in decisions)
    removed, freed = len(decisions) - kept, format_size(freed_bytes(decisions))
    if not removed:
        total = f"Nothing to remove: {plural(kept, 'checkpoint')}, each with a reason to stay."
    elif dry_run:
        total = f"Would remove {plural(removed, 'checkpoint')}, keep {kept}, free {freed}."
    else:
        total = f"Removed {plural(removed, 'checkpoint')}, kept {kept}, freed {freed}."
    return f"{text}\n{total}" if listed else total


def decision_rows(
    listed: Sequence[Decision],
    ids: Mapping[str, str],
    *,
    actions: bool,
    now_s: float,
    width: int | None = None,
) -> str:
    """The table of `listed`, by their short `ids`, with WHY, and ACTION if that is asked for."""
    width = terminal_width() if width is None else width
    facts = [
        [
            ("keep" if decision.keep else "remove") if actions else "",
            f"{decision.record.step:,}",
            format_ago(now_s - decision.record.time_s),
            format_size(decision.record.nbytes),
            ids[decision.record.id],
        ]
        for decision in listed
    ]
    columns = [
        Column("ACTION"),
        Column("STEP", right=True),
        Column("SAVED"),
        Column("SIZE", right=True),
        Column("ID"),
    ]
    # Reasons are never cut: what does not fit goes on below. Where little would, time and
    # size give way.
    for given_up in (_SAVED, _SIZE):
        if width - table_width(columns, facts) - 2 < _ROOM:
            facts = [[*fact[:given_up], "", *fact[given_up + 1 :]] for fact in facts]
    room = max(10, width - table_width(columns, facts) - 2)
    rows: list[list[str]] = []
    for decision, fact in zip(listed, facts, strict=True):
        for line in wrap(shown(", ".join(decision.why)), room, break_on_hyphens=False):
            rows.append([*fact, line])
            fact = [""] * len(fact)
    columns.append(Column("WHY", elastic=True))
    return table(columns, rows, width)


def _json(address: str, decisions: Sequence[Decision], keep: str, dry_run: bool) -> dict[str, Any]:
    from holdfast.manager.info import info_of

    rows = [
        (d.keep, {**checkpoint_json(info_of(address, d.record)), "why": list(d.why)})
        for d in decisions
    ]
    return {
        "keep": keep,
        "dry_run": dry_run,
        "removed": [row for stays, row in rows if not stays],
        "kept": [row for stays, row in rows if stays],
        "freed_bytes": freed_bytes(decisions),
    }
