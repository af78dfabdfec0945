"""`holdfast gc`: remove what unfinished saves left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from holdfast.cli.options import json_option, opened, whole_run
from holdfast.cli.render import plural, print_json, shown
from holdfast.core.units import format_size

if TYPE_CHECKING:
    from holdfast.stores.base import ObjectInfo


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
@click.option("--dry-run", is_flag=True, help="Show what would go; remove nothing.")
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
        rows = [{"key": info.key, "nbytes": info.size_bytes} for info in found]
        freed = sum(info.size_bytes for info in found)
        value = {"run": address, "dry_run": dry_run, "removed": rows, "freed_bytes": freed}
        print_json({"ok": True, **value})
    else:
        print(orphans_text(address, found, dry_run=dry_run))


def orphans_text(address: str, found: Sequence[ObjectInfo], *, dry_run: bool) -> str:
    """How many of what, and how much."""
    if not found:
        return shown(f"Nothing to remove: every object in {address} is needed.")
    counts = Counter(info.key.partition("/")[0] for info in found)
    # "packs", "manifests", …: the folders' names are plurals.
    kinds = ", ".join(plural(counts[kind], kind.removesuffix("s")) for kind in sorted(counts))
    size = format_size(sum(info.size_bytes for info in found))
    if dry_run:
        return shown(f"Would remove {kinds} that no checkpoint needs, and free {size}.")
    return shown(f"Removed {kinds} that no checkpoint needed, and freed {size}.")
