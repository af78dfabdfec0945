"""`holdfast sync`: keep a copy of a run like the run."""

from __future__ import annotations

import click

from holdfast.cli.options import json_option, opened, watched, whole_run
from holdfast.cli.transfer import report, transfer_options


@click.command(
    short_help="Make a copy of a run like the run.",
    epilog="""\b
Examples:
  holdfast sync runs/mnist backup/mnist --dry-run
  holdfast sync runs/mnist backup/mnist
  holdfast sync runs/mnist backup/mnist --delete --bandwidth 100MB/s

\b
Exit status: 0 all is there, 3 not all, 4 damage, 11 a process writes TARGET.""",
)
@click.argument("source", metavar="RUN")
@click.argument("target", metavar="TARGET")
@click.option("--delete", is_flag=True, help="Remove from TARGET what the run no longer lists.")
@click.option("--dry-run", is_flag=True, help="Show what would be done and why; change nothing.")
@transfer_options
@json_option
def sync(
    source: str,
    target: str,
    delete: bool,
    dry_run: bool,
    verify: bool,
    bandwidth: int | None,
    take_over: bool,
    as_json: bool,
) -> int:
    """Bring TARGET, a copy of a run, up to date with the run.

    Then TARGET has every checkpoint that the run lists, in the same order, with its
    metrics, tags and note. What TARGET has and the run does not stays, unless --delete
    is given. Safe beside the job that writes the run, but not beside one that writes
    TARGET.
    """
    address, to = whole_run(source), whole_run(target)
    with opened(address) as run, watched(f"copying {address}"):
        results = run.sync(
            to,
            delete=delete,
            dry_run=dry_run,
            verify=verify,
            bandwidth=bandwidth,
            take_over=take_over,
        )
    return report(address, to, results, as_json=as_json, dry_run=dry_run)
