"""`holdfast restore`: a checkpoint as plain files."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import click

from holdfast.cli.options import json_option, opened, selector_of
from holdfast.cli.render import checkpoint_json, print_json, shown
from holdfast.core.address import parse_reference
from holdfast.core.units import format_size
from holdfast.errors import UsageError


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
    if target.exists() and not target.is_dir():
        raise UsageError(f"{folder} is not a folder", hint="Name a new folder.")
    if not force and target.is_dir() and any(target.iterdir()):
        raise UsageError(
            f"{folder} is not empty",
            hint="Name a new folder, or replace what has the same name with --force.",
        )
    with opened(wanted.address) as run:
        info = run.info(selector_of(wanted))
        # On the target's file system, so that moving is a rename; what is there stays
        # whole until the last byte has been verified.
        near = target if target.is_dir() else target.absolute().parent
        near.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".holdfast-restore-", dir=near) as scratch:
            run.export(info.id, Path(scratch) / "new")
            written = move_into(Path(scratch) / "new", target)
    if as_json:
        files = [{"path": str(path), "nbytes": path.stat().st_size} for path in written]
        value = {"ok": True, "checkpoint": checkpoint_json(info), "folder": folder, "files": files}
        print_json(value)
        return
    print(f"{shown(info.ref)} written to {shown(folder)}, every byte verified:")
    for path in written:
        name = shown(str(path.relative_to(target)))
        print(f"  {format_size(path.stat().st_size):>8}  {name}")


def move_into(source: Path, target: Path) -> list[Path]:
    """Move the files below `source` to the same places below `target`; where they are now.

    Replaces files, never a folder, and follows no link out of `target`.
    """
    if not target.exists():
        os.rename(source, target)
        return sorted(path for path in target.rglob("*") if path.is_file())
    files = sorted(path for path in source.rglob("*") if path.is_file())
    places = [target / path.relative_to(source) for path in files]
    for place in places:
        folders = [p for p in place.parents if target in p.parents]
        blocked = [p for p in folders if p.is_symlink() or (p.exists() and not p.is_dir())]
        if place.is_dir() and not place.is_symlink():
            blocked.append(place)
        if blocked:
            raise UsageError(f"{blocked[0]} is in the way", hint="Move it, or name another folder.")
    for path, place in zip(files, places, strict=True):
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)
    shutil.rmtree(source)
    return places
