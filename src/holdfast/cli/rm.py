"""`holdfast rm`: remove checkpoints by name."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import click

from holdfast.cli.options import json_option, opened, selector_of
from holdfast.cli.prune import decision_rows, freed_bytes
from holdfast.cli.render import checkpoint_json, error_json, plural, print_json
from holdfast.core.address import Reference, parse_reference, printable, short_ids
from holdfast.core.retention import Decision
from holdfast.core.units import format_size
from holdfast.errors import BadAddress, CheckpointProtected


@click.command(
    short_help="Remove checkpoints by name.",
    epilog="""\b
Examples:
  holdfast rm runs/mnist@41200 --dry-run
  holdfast rm runs/mnist@41200 runs/mnist@41300
  holdfast rm runs/mnist@latest --force   # the job goes on from what is left

\b
To remove by rules, see 'holdfast prune'. A whole run is a folder: remove it.""",
)
@click.argument("references", metavar="REF...", nargs=-1, required=True)
@click.option("--force", is_flag=True, help="Also the newest, the best, pinned and tagged ones.")
@click.option("--dry-run", is_flag=True, help="Show what would go and why; remove nothing.")
@json_option
def rm(references: tuple[str, ...], force: bool, dry_run: bool, as_json: bool) -> int:
    """Remove the checkpoints that are named: all of them, or none.

    What no rule would remove (the newest intact one, the best by the run's rule, pinned
    and tagged ones) goes only with --force; what a forked run needs, never. Asks nothing,
    so try --dry-run first. Safe beside a job that is writing the run.
    """
    wanted = _of_one_run(references)
    address = wanted[0].address
    with opened(address) as run:
        ids = {run.info(selector_of(one)).id for one in wanted}
        decisions = run.remove(sorted(ids), force=force, dry_run=dry_run)
    named = [decision for decision in decisions if decision.record.id in ids]
    freed = freed_bytes(decisions)
    short = short_ids([decision.record.id for decision in decisions])
    error = _refusal(named, address) if dry_run else None
    if as_json:
        value = _json(address, named, freed, dry_run)
        print_json({"ok": error is None, **error_json(error), "run": address, **value})
        return error.exit_code if error else 0
    print(removal_text(named, short, freed, dry_run=dry_run, now_s=time.time()))
    if error:
        raise error
    return 0


def _of_one_run(references: Sequence[str]) -> list[Reference]:
    wanted = [parse_reference(text) for text in references]
    for text, one in zip(references, wanted, strict=True):
        if not one.explicit:
            raise BadAddress(
                f"{text!r} names a run; rm removes checkpoints",
                hint=f"Write {one.address}@41200 or {one.address}@latest. A whole run is a "
                "folder: remove that.",
            )
        if one.address != wanted[0].address:
            raise BadAddress("the checkpoints are not of one run", hint="Remove run by run.")
    return wanted


def removal_text(
    named: Sequence[Decision],
    ids: Mapping[str, str],
    freed: int,
    *,
    dry_run: bool,
    now_s: float,
    width: int | None = None,
) -> str:
    """Newest first: those that were named, with what happens to each; then the sum."""
    text = decision_rows(named[::-1], ids, actions=dry_run, now_s=now_s, width=width)
    count = plural(sum(not decision.keep for decision in named), "checkpoint")
    if not dry_run:
        return f"{text}\nRemoved {count}, freed {format_size(freed)}."
    if any(decision.keep for decision in named):
        return text
    return f"{text}\nWould remove {count}, free {format_size(freed)}."


def _refusal(named: Sequence[Decision], address: str) -> CheckpointProtected | None:
    """The error that the same command without --dry-run ends with."""
    from holdfast.manager.removal import refuse

    try:
        refuse(named, printable(address))
    except CheckpointProtected as error:
        return error
    return None


def _json(address: str, named: Sequence[Decision], freed: int, dry_run: bool) -> dict[str, Any]:
    from holdfast.manager.info import info_of

    rows = [
        (d.keep, {**checkpoint_json(info_of(address, d.record)), "why": list(d.why)})
        for d in named[::-1]
    ]
    return {
        "dry_run": dry_run,
        "removed": [row for stays, row in rows if not stays],
        "kept": [row for stays, row in rows if stays],
        "freed_bytes": freed,
    }
