"""`holdfast doctor`: the place that a job runs in; the health of a run, and its repair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from textwrap import wrap
from typing import TYPE_CHECKING

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
from holdfast.core.retention import parse_keep
from holdfast.errors import CorruptionError, NoStore, UnsafePlace

if TYPE_CHECKING:
    from holdfast.manager.doctor import Finding, Health


@click.command(
    short_help="Look at where jobs run, and at the health of a run.",
    epilog="""\b
Examples:
  holdfast doctor                        # in the job, before it trains
  holdfast doctor runs/mnist
  holdfast doctor runs/mnist --full      # reads every byte
  holdfast doctor runs/mnist --repair

\b
Exit status: 0 healthy, 4 damage is left, 6 a stop or a full disk would lose
work here, 10 nothing there, 11 a process writes the run that was to be
repaired.""",
)
@click.argument("address", metavar="[RUN]", default="")
@click.option("--full", is_flag=True, help="Compare every byte with its digest, as verify does.")
@click.option("--repair", is_flag=True, help="Rebuild a damaged list from what is whole.")
@click.option("--take-over", is_flag=True, help="Repair even if a process writes the run.")
@click.option("--keep", metavar="RULES", help="Whether these fit on the disk; else the run's own.")
@json_option
def doctor(
    address: str, full: bool, repair: bool, take_over: bool, keep: str | None, as_json: bool
) -> int:
    """Look at the place: signals, parents, grace, space; and at a run: its log,
    checkpoints, leftovers, writer, file system, versions.

    Says for each finding what to do. Changes nothing but with --repair, which rebuilds
    the list of checkpoints from those that are whole, as a job does when it starts.
    """
    from holdfast.jobs import gather
    from holdfast.jobs.findings import findings

    if not address and (full or repair or take_over or keep is not None):
        raise click.UsageError("--full, --repair, --take-over and --keep need a RUN")
    parse_keep(keep)
    facts = gather.gather()
    health, repaired, missing = None, False, None
    if address:
        address = whole_run(address)
        try:
            with opened(address) as run:
                health = run.examine(full=full)
                repaired = repair and health.repairable
                if repaired:
                    run.repair(take_over=take_over)
                    health = run.examine(full=full)
                if not health.damage:
                    saves, space = gather.of_run(run, keep)
                    facts = replace(facts, saves=saves, space=space)
        except NoStore as error:  # as in the job that is to begin it: the place is of interest
            missing = error
    place = findings(facts)
    error = missing or (_damage(address, health) if health else None) or _loss(place)
    if as_json:
        found = (*(health.findings if health else ()), *place)
        print_json(
            {
                "ok": error is None,
                **error_json(error),
                "run": address or None,
                "repaired": repaired if repair else None,
                "findings": findings_json(found),
            }
        )
        return error.exit_code if error else 0
    if health:
        print(health_text(health.findings), end="\n\n")
    print(health_text(place))
    if missing:
        raise missing
    if repaired:
        print("The list of checkpoints was rebuilt.")
    elif repair:
        print("There is nothing to repair: the list of checkpoints is whole.")
    if error:
        raise error
    print(shown(f"{address} is healthy." if address else "A job can be stopped here."))
    return 0


def health_text(findings: Sequence[Finding], width: int | None = None) -> str:
    """A row for each finding; long ones go on below, and what to do after an arrow."""
    width = terminal_width() if width is None else width
    columns = [Column("CHECK"), Column("STATE")]
    facts = [[finding.check, _state(finding.state)] for finding in findings]
    room = max(10, width - table_width(columns, facts) - 2)
    rows: list[list[str]] = []
    for finding, fact in zip(findings, facts, strict=True):
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
    return state.upper() if state in ("damage", "problem") else state


def _damage(address: str, health: Health) -> CorruptionError | None:
    damage = health.damage
    if not damage:
        return None
    do = next((finding.do for finding in damage if finding.do), "")
    do = do.replace(address, printable(address))
    return CorruptionError(f"{printable(address)} has {plural(len(damage), 'problem')}", hint=do)


def _loss(place: Sequence[Finding]) -> UnsafePlace | None:
    problems = [finding for finding in place if finding.state == "problem"]
    if not problems:
        return None
    do = next((finding.do for finding in problems if finding.do), "")
    return UnsafePlace(f"a job would lose work here: {plural(len(problems), 'problem')}", hint=do)
