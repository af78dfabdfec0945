"""`holdfast init`: a job file in which a stop signal reaches the training."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import click

from holdfast.cli.options import json_option
from holdfast.cli.render import print_json, shown
from holdfast.core.address import printable
from holdfast.core.units import parse_duration
from holdfast.errors import UsageError

if TYPE_CHECKING:
    from holdfast.jobs.job import Job

_OF_ONE = {
    "slurm": ("partition", "array"),
    "k8s": ("image", "storage", "claim", "service_account"),
}


@click.command(
    short_help="Print a job file for Slurm or Kubernetes.",
    epilog="""\b
Examples:
  holdfast init slurm --time 1d --gpus 4 -- torchrun train.py
  holdfast init slurm --array 0-9 -o sweep.sh -- python train.py
  holdfast init k8s --image team/train:1 --run /runs/gpt -- python train.py
  holdfast init k8s --image train:1 --run s3://bucket/gpt -- python train.py""",
)
@click.argument("kind", type=click.Choice(tuple(_OF_ONE)))
@click.option("--name", metavar="NAME", help="Of the job; else the script's.")
@click.option("--time", metavar="TIME", help="The time limit, such as 36h or 2d.")
@click.option("--nodes", type=click.IntRange(1, 100_000), default=1, metavar="N", help="How many.")
@click.option("--gpus", type=click.IntRange(0, 1000), default=0, metavar="N", help="Of each node.")
@click.option(
    "--grace",
    default="90s",
    show_default=True,
    metavar="TIME",
    help="From the signal to the end: longer than a save.",
)
@click.option("--run", "address", default="", metavar="RUN", help="The run's address.")
@click.option("--partition", metavar="NAME", help="slurm: where it runs.")
@click.option("--array", metavar="INDEXES", help="slurm: a job array, such as 0-9%4.")
@click.option("--image", metavar="IMAGE", help="k8s: with Python, Holdfast and the script.")
@click.option("--storage", metavar="SIZE", help="k8s: of a new volume.  [default: 100Gi]")
@click.option("--claim", metavar="NAME", help="k8s: a volume claim that is there already.")
@click.option("--service-account", metavar="NAME", help="k8s: who may use the bucket.")
@click.option("-o", "--output", metavar="FILE", help="Write it there instead of printing it.")
@click.option("--force", is_flag=True, help="Overwrite FILE.")
@json_option
@click.argument("command", nargs=-1, required=True)
def init(
    kind: str,
    name: str | None,
    time: str | None,
    nodes: int,
    gpus: int,
    grace: str,
    address: str,
    output: str | None,
    force: bool,
    as_json: bool,
    command: tuple[str, ...],
    **of_one: str | None,
) -> None:
    """Print a job file that runs a command under `holdfast run`.

    KIND is slurm (a script for sbatch) or k8s (a manifest for kubectl). Stop signals reach
    the training, there is time for a save, and the job comes again until it is done. Each
    line says what it is for.
    """
    from holdfast.jobs.job import Job, name_of

    for other, options in _OF_ONE.items():
        wrong = next((o for o in options if other != kind and of_one[o] is not None), None)
        if wrong:
            raise click.UsageError(f"--{wrong.replace('_', '-')} is for {other}")
    job = Job(
        command,
        name=name_of(command) if name is None else name,
        time_s=None if time is None else _seconds(time, "--time"),
        nodes=nodes,
        gpus=gpus,
        grace_s=math.ceil(_seconds(grace, "--grace")),
        run=address,
    )
    given = {option: value for option, value in of_one.items() if value is not None}
    text = _slurm(job, **given) if kind == "slurm" else _kubernetes(job, **given)
    if output is not None:
        _write(output, text, force=force)
    if as_json:
        print_json({"ok": True, "kind": kind, "file": output, "text": text})
    elif output is None:
        print(text, end="")
    else:
        how = "sbatch" if kind == "slurm" else "kubectl apply -f"
        print(shown(f"Wrote {output}. Start it with: {how} {output}"))


def _slurm(job: Job, *, partition: str = "", array: str = "") -> str:
    from holdfast.jobs.job import check_array, check_word
    from holdfast.jobs.slurm import slurm_script

    if partition:
        check_word(partition, "partition")
    if array:
        check_array(array)
    return slurm_script(job, partition=partition, array=array)


def _kubernetes(
    job: Job, *, image: str = "", storage: str = "", claim: str = "", service_account: str = ""
) -> str:
    from holdfast.jobs.job import STORAGE, check_image, check_name, check_storage
    from holdfast.jobs.kubernetes import kubernetes_manifest

    if not image:
        raise click.UsageError("k8s needs --image")
    return kubernetes_manifest(
        job,
        image=check_image(image),
        storage=check_storage(storage or STORAGE),
        claim=check_name(claim, "claim") if claim else "",
        account=check_name(service_account, "service account") if service_account else "",
    )


def _seconds(text: str, option: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise click.UsageError(f"{option}: {error}") from None


def _write(path: str, text: str, *, force: bool) -> None:
    try:
        with open(path, "w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError(
            f"{printable(path)} exists", hint="Name another file, or overwrite it with --force."
        ) from None
