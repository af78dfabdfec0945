"""`python flow.py checkpoint …`: the commands, on the checkpoints of a Metaflow flow's tasks."""

from __future__ import annotations

from collections.abc import Sequence

import click

from holdfast.cli.app import fail, main
from holdfast.cli.runs import find_runs
from holdfast.errors import HoldfastError, NoStore
from holdfast.metaflow.places import FOLDER, Root, RunName, holds_models, key_part


def on_tasks(
    command: str,
    root: Root,
    flow: str,
    options: Sequence[str] = (),
    *,
    run_id: str = "",
    step: str = "",
) -> int:
    """Run `holdfast COMMAND ADDRESS OPTIONS` on what the tasks of a flow have saved, or those of
    one run or one step; the highest exit status. Prints; never raises what a command would.
    `prune` leaves models alone: `delete_model` names which one goes.
    """
    folder = root.address(FOLDER, key_part(flow))
    if command == "ls" and not run_id and not step:
        return main(["ls", folder, *options])  # one line for each
    statuses: list[int] = []
    for address in find_runs(folder):
        in_step, task, run, writer = address.partition("?")[0].split("/")[-4:]
        if step and in_step != key_part(step):
            continue
        if command == "prune" and holds_models(writer):
            continue
        if run_id and RunName.parse(run).run != run_id:
            continue
        if command != "gc" and _is_empty(address):
            continue
        if "--json" not in options:
            click.secho(f"{in_step}/{task} of run {RunName.parse(run).run}, {writer}", bold=True)
        statuses.append(main([command, address, *options]))
    if not statuses:
        error = NoStore(
            f"{flow} has no such checkpoints in {folder}",
            hint="`checkpoint ls` shows all, of the datastore that the flow is run with.",
        )
        return fail("--json" in options, error.message, error.hint, error.exit_code)
    return max(statuses)


def _is_empty(address: str) -> bool:
    """Whether all that was saved there has been deleted. What cannot be read is not empty."""
    from holdfast.manager.listing import Listing

    try:
        with Listing(address) as listing:
            return listing.latest() is None
    except HoldfastError:
        return False
