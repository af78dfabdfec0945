"""`holdfast import`: a checkpoint made from a file of another make."""

from __future__ import annotations

from typing import Literal

import click

from holdfast.cli.options import json_option, watched, whole_run
from holdfast.cli.render import checkpoint_json, plural, print_json, shown
from holdfast.core.address import shell_word
from holdfast.core.units import format_size
from holdfast.errors import UsageError

_SHORT = 24


@click.command(
    "import",
    short_help="Make a checkpoint from a file of another make.",
    epilog="""\b
Examples:
  holdfast import model.safetensors runs/finetune
  holdfast import old.pt runs/finetune --only state_dict --as model
  holdfast import checkpoints/step_400 runs/old --step 400 --skip-objects
  holdfast import model.ubj runs/boost --tag production

\b
Then run.track(model=model) of a program whose run is runs/finetune starts
from it. See 'holdfast show FILE' for what a file holds.""",
)
@click.argument("source", metavar="FILE")
@click.argument("target", metavar="RUN")
@click.option("--as", "name", default="", metavar="NAME", help="Put it below this name.")
@click.option("--only", default="", metavar="PATH", help="Only what is below this path of FILE.")
@click.option("--step", type=click.IntRange(min=0), help="Completed steps. In a new run 0.")
@click.option(
    "--tensors",
    type=click.Choice(["torch", "numpy"]),
    help="Whose tensors they are, where FILE does not say.",
)
@click.option("--skip-objects", is_flag=True, help="Leave out what is no plain value.")
@click.option("--metric", "metrics", multiple=True, metavar="NAME=X", help="E.g. val_loss=0.3.")
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="A name for the checkpoint.")
@click.option("--keep", metavar="RULE", help="Then remove what this rule does not keep.")
@json_option
def import_(
    source: str,
    target: str,
    name: str,
    only: str,
    step: int | None,
    tensors: Literal["torch", "numpy"] | None,
    skip_objects: bool,
    metrics: tuple[str, ...],
    tags: tuple[str, ...],
    keep: str | None,
    as_json: bool,
) -> None:
    """Make a checkpoint of RUN from FILE, or from a folder of another make.

    Nothing in FILE is run. What its format lets check is checked first. Tensors become
    leaves and plain values stay values; a state_dict is put below NAME ("model"), and
    restores into a module. What is no plain value is refused, and named.
    """
    from holdfast.run.importing import import_checkpoint

    address = whole_run(target)
    with watched(f"importing {source}"):
        done = import_checkpoint(
            source,
            address,
            step=step,
            name=name,
            only=only,
            tensors=tensors,
            skip_objects=skip_objects,
            metrics=dict(map(_metric, metrics)),
            tags=tags,
            keep=keep,
        )
    if as_json:
        value = {
            "file": source,
            "kind": done.kind,
            "names": list(done.names),
            "tensors": done.tensors,
            "tensor_bytes": done.nbytes,
            "skipped": [{"path": path, "class": kind} for path, kind in done.skipped],
        }
        print_json({"ok": True, "checkpoint": checkpoint_json(done.info), **value})
        return
    names = ", ".join(done.names[:_SHORT]) + (", …" if len(done.names) > _SHORT else "")
    what = f"{plural(done.tensors, 'tensor')}, {format_size(done.nbytes)}"
    print(shown(f"{source} ({done.kind}) imported as {done.info.ref}: {names}; {what}."))
    for path, kind in done.skipped[:_SHORT]:
        print(shown(f"left out: {path or '(all of it)'} ({kind})"))
    if len(done.skipped) > _SHORT:
        print(f"… {len(done.skipped) - _SHORT:,} more left out (--json shows all)")
    print(shown(f"Look at it: holdfast show {shell_word(done.info.ref)}"))


def _metric(text: str) -> tuple[str, float]:
    name, equals, value = text.rpartition("=")
    try:
        if equals and name:
            return name, float(value)
    except ValueError:
        pass
    raise UsageError(f"--metric {text!r} is no name and number", hint="--metric val_loss=0.3")
