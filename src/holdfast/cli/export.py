"""`holdfast export`: a checkpoint's tensors as one file for other programs."""

from __future__ import annotations

from pathlib import Path

import click

from holdfast.cli.options import json_option, opened, selector_of, watched
from holdfast.cli.render import checkpoint_json, plural, print_json, shown
from holdfast.core.address import parse_reference
from holdfast.core.units import format_size


@click.command(
    short_help="Write a checkpoint's tensors as one .safetensors file.",
    epilog="""\b
Examples:
  holdfast export runs/mnist@best:val_loss model.safetensors --only model
  holdfast export runs/mnist all.safetensors

\b
For the whole checkpoint, with plain values and files, see 'holdfast restore'.""",
)
@click.argument("reference", metavar="REF")
@click.argument("file", metavar="FILE")
@click.option("--only", default="", metavar="NAME", help="Only what is below this name.")
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@json_option
def export(reference: str, file: str, only: str, force: bool, as_json: bool) -> None:
    """Write the tensors and arrays of a checkpoint to FILE, in the safetensors format.

    With --only model they are named as model.state_dict() names them, for
    safetensors.torch.load_model(model, FILE). Tied tensors are there once. Every byte
    is verified; a damaged checkpoint leaves no file.
    """
    wanted = parse_reference(reference)
    with opened(wanted.address) as run:
        info = run.info(selector_of(wanted))
        with watched(f"exporting {wanted.address}"):
            names = run.export_tensors(info.id, file, only=only, replace=force)
    nbytes = Path(file).stat().st_size
    if as_json:
        written = {"file": file, "nbytes": nbytes, "tensors": names}
        print_json({"ok": True, "checkpoint": checkpoint_json(info), **written})
    else:
        what = f"{plural(len(names), 'tensor')} of {info.ref}"
        print(shown(f"{what} written to {file}, {format_size(nbytes)}, every byte verified."))
