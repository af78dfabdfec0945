"""`holdfast export`: a checkpoint in the form that another program loads."""

from __future__ import annotations

import click

from holdfast.cli.options import json_option, opened, selector_of, watched
from holdfast.cli.render import checkpoint_json, plural, print_json, shown
from holdfast.core.address import parse_reference
from holdfast.core.units import format_list, format_size
from holdfast.manager.exported import FORMATS


@click.command(
    short_help="Write a checkpoint in the form that another program loads.",
    epilog="""\b
Examples:
  holdfast export runs/mnist@best:val_loss model.safetensors --only model
  holdfast export runs/mnist state.pt --to pt
  holdfast export runs/tune@best:val_loss tuned --to hf
  holdfast export runs/lora adapter --to peft --files base-model

\b
For the whole checkpoint, with plain values and files, see 'holdfast restore'.""",
)
@click.argument("reference", metavar="REF")
@click.argument("target", metavar="TARGET")
@click.option(
    "--to",
    "kind",
    type=click.Choice(FORMATS),
    default="safetensors",
    help="The format; safetensors if there is no --to.",
)
@click.option("--only", default="", metavar="NAME", help="Only what is below this name.")
@click.option(
    "--files",
    metavar="FOLDER",
    help="hf, peft: config and tokenizer files, if they are not in the checkpoint.",
)
@click.option("--adapter", default="", metavar="NAME", help="peft: which of several adapters.")
@click.option(
    "--shard-size",
    metavar="SIZE",
    help="safetensors, hf: files of at most this, such as 5GB, and an index; in a folder.",
)
@click.option("--force", is_flag=True, help="Replace files of the same names.")
@json_option
def export(
    reference: str,
    target: str,
    kind: str,
    only: str,
    files: str | None,
    adapter: str,
    shard_size: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write a checkpoint to TARGET, for programs that know nothing of Holdfast.

    \b
    safetensors  its tensors and arrays: a file
    pt           the state as tensors and plain values: a file for torch.load
    dcp          the same: a folder for torch.distributed.checkpoint
    hf           a model: a folder for Transformers' from_pretrained
    peft         an adapter: a folder for PeftModel.from_pretrained

    With --only model tensors are named as model.state_dict() names them. Every byte is
    verified; a damaged checkpoint leaves nothing.
    """
    wanted = parse_reference(reference)
    with opened(wanted.address) as run:
        info = run.info(selector_of(wanted))
        with watched(f"exporting {wanted.address}"):
            done = run.export_as(
                info.id,
                kind,
                target,
                only=only,
                files=files,
                adapter=adapter,
                shard_size=shard_size,
                replace=force,
            )
    if as_json:
        paths = [str(path) for path in done.files]
        written = {"file": target, "format": kind, "files": paths, "nbytes": done.nbytes}
        named = {"tensors": done.tensors, "left_out": done.left_out}
        print_json({"ok": True, "checkpoint": checkpoint_json(info), **written, **named})
        return
    what = f"{plural(len(done.tensors), 'tensor')} of {info.ref}"
    where = target if len(done.files) == 1 else f"{target}, {len(done.files)} files"
    print(shown(f"{what} written to {where}, {format_size(done.nbytes)}, every byte verified."))
    if done.left_out:
        lines = format_list([shown(line) for line in done.left_out], most=8)
        print(f"Left out, for there is no form for it:{lines}")
