"""`holdfast average`: the mean of checkpoints, as a new checkpoint or a file."""

from __future__ import annotations

from pathlib import Path

import click

from holdfast.cli.options import json_option, watched, whole_run
from holdfast.cli.render import checkpoint_json, plural, print_json, shown
from holdfast.core.units import format_size

_SHOWN = 5  # of what differs; --json has all of it


def _weights(context: click.Context, option: click.Parameter, text: str | None) -> list[float]:
    try:
        return [float(word) for word in text.split(",")] if text is not None else []
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of numbers like 1,2,3") from None


@click.command(
    short_help="Average checkpoints into a new one, or into a file.",
    epilog="""\b
Examples:
  holdfast average runs/mnist@last=5 --to runs/mnist-avg
  holdfast average runs/mnist@best=3:val_loss --export avg.safetensors
  holdfast average runs/mnist@last=5 --only model --export model.safetensors
  holdfast average runs/a@best runs/b@best --weights 2,1 --to runs/ab

\b
After the @ may also stand all, every=N and within=DUR. Running statistics of
BatchNorm have to be computed anew for averaged weights.""",
)
@click.argument("references", metavar="REF...", nargs=-1, required=True)
@click.option("--to", metavar="RUN", help="The run that gets the average as a new checkpoint.")
@click.option("--export", metavar="FILE", help="A .safetensors file instead.")
@click.option("--weights", callback=_weights, metavar="W,W,...", help="One for each checkpoint.")
@click.option("--only", multiple=True, metavar="NAME", help="Only what is below this name.")
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@json_option
def average(
    references: tuple[str, ...],
    to: str | None,
    export: str | None,
    weights: list[float],
    only: tuple[str, ...],
    force: bool,
    as_json: bool,
) -> None:
    """Average the floating-point tensors of checkpoints.

    Sums are 64-bit floats, and the mean is rounded once. All else is as in the last
    checkpoint; what is not the same in all is named. Every byte is verified.
    """
    if (to is None) == (export is None):
        raise click.UsageError("say where it goes: --to RUN or --export FILE")
    if to is not None and force:
        raise click.UsageError("--force is about --export FILE")
    from holdfast.manager import average as average_of

    target = None if to is None else whole_run(to)
    with watched("averaging"):
        made = average_of(
            references, target, export=export, weights=weights or None, only=only, replace=force
        )
    nbytes = made.info.nbytes if made.info else Path(export or "").stat().st_size
    if as_json:
        value = {
            "ok": True,
            "of": [checkpoint_json(info) for info in made.of],
            "weights": list(made.weights),
            "averaged": list(made.averaged),
            "differing": list(made.differing),
            "checkpoint": checkpoint_json(made.info) if made.info else None,
            "file": export,
            "nbytes": nbytes,
        }
        print_json(value)
        return
    what = f"{plural(len(made.averaged), 'tensor')} of {plural(len(made.of), 'checkpoint')}"
    where = made.info.ref if made.info else str(export)
    print(shown(f"{what} averaged in {where}, {format_size(nbytes)}, every byte verified:"))
    for info, weight in zip(made.of, made.weights, strict=True):
        print(shown(f"  {info.ref}" + (f"  weight {weight:g}" if weights else "")))
    if made.differing:
        names = ", ".join(made.differing[:_SHOWN])
        more = len(made.differing) - _SHOWN
        rest = f" and {more:,} more" if more > 0 else ""
        print(shown(f"Not the same in all, and as in {made.of[-1].ref}: {names}{rest}."))
