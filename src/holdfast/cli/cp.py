"""`holdfast cp`: copy checkpoints to another address."""

from __future__ import annotations

from collections.abc import Sequence

import click

from holdfast.cli.options import json_option, opened, selector_of, watched, whole_run
from holdfast.cli.transfer import report, transfer_options
from holdfast.core.address import Reference, no_checkpoint, parse_reference
from holdfast.errors import BadAddress


@click.command(
    short_help="Copy checkpoints to another address.",
    epilog="""\b
Examples:
  holdfast cp runs/mnist@best:val_loss backup/mnist
  holdfast cp runs/mnist@100 runs/mnist@200 backup/mnist
  holdfast cp runs/mnist backup/mnist            # the latest
  holdfast cp runs/mnist --all backup/mnist --bandwidth 100MB/s

\b
Exit status: 0 all copied, 3 not all, 4 damage, 11 a process writes TARGET.""",
)
@click.argument("words", metavar="REF... TARGET", nargs=-1, required=True)
@click.option("--all", "every", is_flag=True, help="Every checkpoint of the run.")
@transfer_options
@json_option
def cp(
    words: tuple[str, ...],
    every: bool,
    verify: bool,
    bandwidth: int | None,
    take_over: bool,
    as_json: bool,
) -> int:
    """Copy checkpoints of a run to TARGET, the address of a copy of that run.

    TARGET is made where there is none. A copied checkpoint has the same id, and its
    metrics, tags and note; every byte is verified on the way, and it appears when it is
    whole. Packs that TARGET has are not copied again, so a copy that was interrupted
    goes on. A job can be started on TARGET as on the run itself.
    """
    if len(words) < 2:
        raise click.UsageError("name what to copy, and the address to copy it to")
    *references, target = words
    wanted = _of_one_run(references, every=every)
    address, to = wanted[0].address, whole_run(target)
    with opened(address) as run:
        refs = [info.id for info in run.checkpoints()] if every else map(selector_of, wanted)
        ids = [run.info(ref).id for ref in refs]
        if not ids:
            raise no_checkpoint(address)
        with watched(f"copying {address}"):
            results = run.copy(ids, to, verify=verify, bandwidth=bandwidth, take_over=take_over)
    return report(address, to, results, as_json=as_json)


def _of_one_run(references: Sequence[str], *, every: bool) -> list[Reference]:
    wanted = [parse_reference(text) for text in references]
    if every and (len(wanted) > 1 or wanted[0].explicit):
        raise BadAddress(
            "--all copies every checkpoint of one run", hint="Write the run's address alone."
        )
    if any(one.address != wanted[0].address for one in wanted):
        raise BadAddress("the checkpoints are not of one run", hint="Copy run by run.")
    return wanted
