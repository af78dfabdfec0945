"""`holdfast tag`: a name for a checkpoint."""

from __future__ import annotations

import click

from holdfast.cli.options import json_option, opened, selector_of
from holdfast.cli.render import checkpoint_json, kept_by, print_json, shown
from holdfast.core.address import parse_reference, shell_word, validate_tag
from holdfast.errors import CheckpointNotFound


@click.command(
    short_help="Give a checkpoint a name, or take it away.",
    epilog="""\b
Examples:
  holdfast tag runs/mnist@41200 gold
  holdfast tag runs/mnist@best:val_loss paper-v1
  holdfast tag runs/mnist gold --delete

\b
Afterwards runs/mnist@gold names it, and no rule removes it.""",
)
@click.argument("reference", metavar="REF")
@click.argument("name", metavar="NAME")
@click.option("--delete", is_flag=True, help="Take the tag away from the checkpoint that has it.")
@json_option
def tag(reference: str, name: str, delete: bool, as_json: bool) -> None:
    """Give a checkpoint a name. Tagged checkpoints are never removed by a rule.

    A tag names one checkpoint of a run: if another one had it, it moves. Safe beside a
    job that is writing the run.
    """
    wanted = parse_reference(reference)
    if not delete:
        validate_tag(name)
    with opened(wanted.address) as run:
        chosen = run.info(selector_of(wanted) if wanted.explicit or not delete else None)
        before = next((info for info in run.checkpoints() if name in info.tags), None)
        if delete:
            if before is not None and wanted.explicit and before.id != chosen.id:
                raise CheckpointNotFound(
                    f"{chosen.ref} has no tag {name!r}",
                    hint=f"It is at {before.ref}: "
                    f"holdfast tag {shell_word(wanted.address)} {name} --delete",
                )
            run.untag(name)
            info = run.info(before.id if before else None)
        else:
            info = run.tag(chosen.id, name)
    moved = before is not None and before.id != info.id
    if as_json:
        moved_from = before.id if before is not None and moved else None
        deed = {"deleted": True} if delete else {"moved_from": moved_from}
        print_json({"ok": True, "tag": name, **deed, "checkpoint": checkpoint_json(info)})
    elif delete:
        print(shown(f"{info.ref} has lost the tag {name}: {kept_by(info)}."))
    elif before is not None and moved:
        print(shown(f"{info.ref} has the tag {name} now, which {before.ref} had before."))
    elif before is not None:
        print(shown(f"{info.ref} has the tag {name} already."))
    else:
        print(shown(f"{info.ref} has the tag {name} now."))
