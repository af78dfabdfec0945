"""`holdfast pin`: a checkpoint that stays."""

from __future__ import annotations

import click

from holdfast.cli.options import json_option, opened, selector_of
from holdfast.cli.render import checkpoint_json, kept_by, print_json, shown
from holdfast.core.address import parse_reference
from holdfast.errors import UsageError


@click.command(
    short_help="Keep a checkpoint whatever the rules say.",
    epilog="""\b
Examples:
  holdfast pin runs/mnist@41200
  holdfast pin runs/mnist@best:val_loss --reason "used in the report"
  holdfast pin runs/mnist@41200 --release""",
)
@click.argument("reference", metavar="REF")
@click.option("--reason", default="", metavar="TEXT", help="Why; prune and rm show it.")
@click.option("--release", is_flag=True, help="Leave the checkpoint to the rules again.")
@json_option
def pin(reference: str, reason: str, release: bool, as_json: bool) -> None:
    """Pin a checkpoint: no rule removes it until it is released.

    Safe beside a job that is writing the run.
    """
    wanted = parse_reference(reference)
    if release and reason:
        raise UsageError(
            "--reason is for a new pin, and --release takes pins away",
            hint="Write one of them.",
        )
    with opened(wanted.address) as run:
        before = run.info(selector_of(wanted))
        info = run.unpin(before.id) if release else run.pin(before.id, reason)
    if as_json:
        print_json({"ok": True, "checkpoint": checkpoint_json(info)})
    elif not release:
        print(shown(f"{info.ref} is pinned: no rule removes it."))
    elif info.pinned:
        print(shown(f"{info.ref} is still pinned: a forked run needs its data."))
    elif before.pinned:
        print(shown(f"{info.ref} is released: {kept_by(info)}."))
    else:
        print(shown(f"{info.ref} was not pinned."))
