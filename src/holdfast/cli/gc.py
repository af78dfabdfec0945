"""`holdfast gc`: remove what unfinished saves left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from holdfast.cli.options import json_option, opened, whole_run
from holdfast.cli.render import Column, plural, print_json, shown, table
from holdfast.core.units import format_size

if TYPE_CHECKING:
    from holdfast.stores.base import ObjectInfo

# A longer list of objects is what --json is for.
_SHORT = 24


@click.command(
    short_help="Remove what unfinished saves left.",
    epilog="""\b
Examples:
  holdfast gc runs/mnist --dry-run
  holdfast gc runs/mnist
  holdfast gc runs/mnist --take-over   # its writer's machine is gone

\b
A job that starts does this by itself. Exit status 11: a process writes it.""",
)
@click.argument("address", metavar="RUN")
@click.option("--dry-run", is_flag=True, help="Show what would go and why; remove nothing.")
@click.option(
    "--take-over", is_flag=True, help="Even if a process writes the run: it can save no more."
)
@json_option
def gc(address: str, dry_run: bool, take_over: bool, as_json: bool) -> None:
    """Remove objects that no checkpoint needs: what saves left that were killed.

    Checkpoints are never touched. Only a run's writer can tell its unfinished save from
    what a dead one left, so this refuses beside a process that writes the run, or that
    may do so on another machine.
    """
    address = whole_run(address)
    with opened(address) as run:
        found = run.collect_orphans(dry_run=dry_run, take_over=take_over)
    if as_json:
        rows = [{"key": o.key, "nbytes": o.size_bytes, "why": [_why(o.key)]} for o in found]
        freed = sum(info.size_bytes for info in found)
        value = {"run": address, "dry_run": dry_run, "removed": rows, "freed_bytes": freed}
        print_json({"ok": True, **value})
    else:
        print(orphans_text(address, found, dry_run=dry_run))


def orphans_text(
    address: str, found: Sequence[ObjectInfo], *, dry_run: bool, width: int | None = None
) -> str:
    """Each object and why it goes; then how many of what, and how much."""
    if not found:
        return shown(f"Nothing to remove: every object in {address} is needed.")
    more = len(found) - _SHORT
    listed = found[:_SHORT] if more > 1 else found
    rows = [[info.key, format_size(info.size_bytes), _why(info.key)] for info in listed]
    columns = [Column("OBJECT", elastic=True), Column("SIZE", right=True), Column("WHY")]
    text = table(columns, rows, width)
    if len(listed) < len(found):
        text += f"\n… {plural(more, 'object')} more (--json shows all)"
    counts = Counter(info.key.partition("/")[0] for info in found)
    # "packs", "manifests", …: the folders' names are plurals.
    kinds = ", ".join(plural(counts[kind], kind.removesuffix("s")) for kind in sorted(counts))
    size = format_size(sum(info.size_bytes for info in found))
    total = f"Would remove {kinds}, free {size}." if dry_run else f"Removed {kinds}, freed {size}."
    return f"{text}\n{shown(total)}"


def _why(key: str) -> str:
    if key.startswith("packs/"):
        return "no checkpoint needs it"
    if key.startswith("segments/"):
        return "the log does not need it"
    return "never committed"
