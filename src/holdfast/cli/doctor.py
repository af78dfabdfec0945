"""`holdfast doctor`: the health of a run, and its repair."""

from __future__ import annotations

from textwrap import wrap
from typing import TYPE_CHECKING, Any

import click

from holdfast.cli.options import json_option, opened, whole_run
from holdfast.cli.render import (
    Column,
    error_json,
    findings_json,
    plural,
    print_json,
    shown,
    table,
    table_width,
    terminal_width,
)
from holdfast.core.address import printable
from holdfast.errors import CorruptionError

if TYPE_CHECKING:
    from holdfast.manager.doctor import Health


@click.command(
    short_help="Look at the health of a run; repair its list.",
    epilog="""\b
Examples:
  holdfast doctor runs/mnist
  holdfast doctor runs/mnist --full      # reads every byte
  holdfast doctor runs/mnist --repair

\b
Exit status: 0 healthy, 4 damage is left, 10 nothing there, 11 a process
writes the run that was to be repaired.""",
)
@click.argument("address", metavar="RUN")
@click.option("--full", is_flag=True, help="Compare every byte with its digest, as verify does.")
@click.option("--repair", is_flag=True, help="Rebuild a damaged list from what is whole.")
@click.option("--take-over", is_flag=True, help="Repair even if a process writes the run.")
@json_option
def doctor(address: str, full: bool, repair: bool, take_over: bool, as_json: bool) -> int:
    """Look at a run: its log, checkpoints, leftovers, writer, file system, versions.

    Says for each finding what to do. Changes nothing but with --repair, which rebuilds
    the list of checkpoints from those that are whole, as a job does when it starts.
    """
    address = whole_run(address)
    with opened(address) as run:
        health = run.examine(full=full)
        repaired = repair and health.repairable
        if repaired:
            run.repair(take_over=take_over)
            health = run.examine(full=full)
    error = _damage(address, health)
    if as_json:
        print_json(
            {
                "ok": error is None,
                **error_json(error),
                "run": address,
                **_json(health, repair, repaired),
            }
        )
        return 4 if error else 0
    print(health_text(health))
    if repaired:
        print("The list of checkpoints was rebuilt.")
    elif repair:
        print("There is nothing to repair: the list of checkpoints is whole.")
    if error:
        raise error
    print(shown(f"{address} is healthy."))
    return 0


def health_text(health: Health, width: int | None = None) -> str:
    """A row for each finding; long ones go on below, and what to do after an arrow."""
    width = terminal_width() if width is None else width
    columns = [Column("CHECK"), Column("STATE")]
    facts = [[finding.check, _state(finding.state)] for finding in health.findings]
    room = max(10, width - table_width(columns, facts) - 2)
    rows: list[list[str]] = []
    for finding, fact in zip(health.findings, facts, strict=True):
        lines = wrap(shown(finding.what), room, break_on_hyphens=False)
        if finding.do:
            lines += wrap(
                shown(f"-> {finding.do}"), room, subsequent_indent="   ", break_on_hyphens=False
            )
        for line in lines:
            rows.append([*fact, line])
            fact = ["", ""]
    return table([*columns, Column("WHAT", elastic=True)], rows, width)


def _state(state: str) -> str:
    return state.upper() if state == "damage" else state


def _damage(address: str, health: Health) -> CorruptionError | None:
    damage = health.damage
    if not damage:
        return None
    do = next((finding.do for finding in damage if finding.do), "")
    do = do.replace(address, printable(address))
    return CorruptionError(f"{printable(address)} has {plural(len(damage), 'problem')}", hint=do)


def _json(health: Health, asked: bool, repaired: bool) -> dict[str, Any]:
    rows = findings_json(health.findings)
    return {"repaired": repaired if asked else None, "findings": rows}
