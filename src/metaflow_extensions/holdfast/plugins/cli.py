"""`python flow.py checkpoint …`. Imported by every command of every flow."""

import sys

from metaflow._vendor import click


@click.group()
def cli():
    pass


@cli.group(help="Checkpoints that the tasks of this flow have saved.")
def checkpoint():
    pass


def _choosing(command):
    for option in (
        click.option("--step", default="", help="Only of this step."),
        click.option("--run-id", default="", help="Only of this run."),
    ):
        command = option(command)
    return click.pass_obj(command)


def _on_tasks(obj, command, options=(), run_id="", step=""):
    from holdfast.cli.flow import on_tasks
    from holdfast.metaflow.task import datastore_root

    root = datastore_root(obj.flow_datastore)
    sys.exit(on_tasks(command, root, obj.flow.name, options, run_id=run_id, step=step))


@checkpoint.command(help="List the tasks that have saved, or what those of a run or a step have.")
@click.option("--json", is_flag=True, help="Print JSON instead of text.")
@_choosing
def ls(obj, run_id, step, json):
    _on_tasks(obj, "ls", ["--json"] if json else [], run_id, step)


@checkpoint.command(help="Show one checkpoint: `url` of what `save` has returned.")
@click.argument("url")
def show(url):
    from holdfast.cli import main

    sys.exit(main(["show", url]))


@checkpoint.command(help="Read every byte and check its digest.")
@_choosing
def verify(obj, run_id, step):
    _on_tasks(obj, "verify", (), run_id, step)


@checkpoint.command(help="Remove the checkpoints that no rule keeps: --keep 'last=1'.")
@click.option("--keep", required=True, help="See `holdfast prune --help`.")
@click.option("--dry-run", is_flag=True, help="Show what would go; remove nothing.")
@_choosing
def prune(obj, run_id, step, keep, dry_run):
    options = ["--keep", keep, *(["--dry-run"] if dry_run else [])]
    _on_tasks(obj, "prune", options, run_id, step)


@checkpoint.command(help="Remove what saves that were killed have left.")
@click.option("--dry-run", is_flag=True, help="Show what would go; remove nothing.")
@_choosing
def gc(obj, run_id, step, dry_run):
    _on_tasks(obj, "gc", ["--dry-run"] if dry_run else [], run_id, step)
