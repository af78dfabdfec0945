"""`holdfast restore`: a checkpoint as plain files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click

from holdfast.cli.options import json_option, opened, selector_of, watched
from holdfast.cli.render import checkpoint_json, print_json, shown
from holdfast.core.address import parse_reference
from holdfast.core.units import format_size


@click.command(
    short_help="Write a checkpoint as plain files.",
    epilog="""\b
Examples:
  holdfast restore runs/mnist out                  # the latest
  holdfast restore runs/mnist@best:val_loss out
  holdfast restore runs/mnist@41200 out --force    # over an older one

\b
To go on training, start the job again: it resumes by itself.""",
)
@click.argument("reference", metavar="REF")
@click.argument("folder", metavar="DIR")
@click.option("--force", is_flag=True, help="Replace files of the same name in DIR.")
@json_option
def restore(reference: str, folder: str, force: bool, as_json: bool) -> None:
    """Write a checkpoint to DIR as files that need no Holdfast to be read.

    state.safetensors has every tensor and array, state.json the rest and what
    belongs where, files/ the tracked files. Every byte is verified first; a damaged
    checkpoint leaves DIR as it was.
    """
    wanted = parse_reference(reference)
    target = Path(folder)
    with opened(wanted.address) as run:
        info = run.info(selector_of(wanted))
        with watched(f"restoring {wanted.address}"):
            written = files_of(run.export(info.id, target, replace=force))
    if as_json:
        files = [{"path": str(path), "nbytes": path.stat().st_size} for path in written]
        value = {"ok": True, "checkpoint": checkpoint_json(info), "folder": folder, "files": files}
        print_json(value)
        return
    print(f"{shown(info.ref)} written to {shown(folder)}, every byte verified:")
    for path in written:
        name = shown(str(path.relative_to(target)))
        print(f"  {format_size(path.stat().st_size):>8}  {name}")


def files_of(written: Iterable[Path]) -> list[Path]:
    """Each of `written`, and of a folder the files below it."""
    found: list[Path] = []
    for path in written:
        below = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        found.extend(below)
    return found
