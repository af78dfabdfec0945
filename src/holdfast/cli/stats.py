"""`holdfast stats`: what a run's saves and restores have cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from holdfast.cli.options import json_option, opened, whole_run
from holdfast.cli.render import (
    Column,
    cut,
    ellipsis,
    plural,
    print_json,
    saved_at,
    table,
    terminal_width,
    wrapped,
)
from holdfast.core.units import format_seconds, format_size

if TYPE_CHECKING:
    from holdfast.manager.history import Event, SaveEvent, Summary

_NEWEST = 20
# An error may quote what it found; the start of it says what happened.
_ERROR_WIDTH = 400
_INDENT = "    "


@click.command(
    short_help="Show what a run's saves and restores have cost.",
    epilog="""\b
Examples:
  holdfast stats runs/mnist
  holdfast stats runs/mnist -n 100    # more of the newest saves
  holdfast stats runs/mnist --json    # every number of every save""",
)
@click.argument("address", metavar="RUN")
@click.option(
    "-n",
    "--newest",
    type=click.IntRange(min=1),
    default=_NEWEST,
    show_default=True,
    metavar="N",
    help="Show the newest N saves.",
)
@json_option
def stats(address: str, newest: int, as_json: bool) -> None:
    """Show what a run's saves have cost, newest first, and all of them together.

    WAITED is how long the training stood still, TOOK the time until the checkpoint
    was durable. STATE is the size of the state, WRITTEN what was new in it, COPIED
    what was not read in place, MEMORY what saves held besides the state.
    """
    address = whole_run(address)
    with opened(address) as run:
        events = run.events()
    from msgspec.structs import asdict

    from holdfast.manager.history import RestoreEvent, SaveEvent, summarize

    saves = [event for event in reversed(events) if isinstance(event, SaveEvent)]
    restores = [event for event in reversed(events) if isinstance(event, RestoreEvent)]
    summary = summarize(events)
    if as_json:
        print_json(
            {
                "ok": True,
                "run": address,
                "summary": asdict(summary),
                "saves": [event_json(save) for save in saves],
                "restores": [event_json(restore) for restore in restores],
            }
        )
        return
    if not events:
        nothing = (
            f"No save of {address} was measured: there is none yet, or an older Holdfast made it."
        )
        print(wrapped(nothing))
        return
    if saves:
        print(saves_text(saves[:newest]))
        if len(saves) > newest:
            older = f"and {len(saves) - newest:,} older (-n {len(saves)} shows them)"
            print(f"{ellipsis()} {older}")
    print(summary_text(summary))


def event_json(event: Event) -> dict[str, Any]:
    """Every number of an event, named as in the run's files, and when that was."""
    from msgspec.structs import asdict

    from holdfast.manager.history import SaveEvent

    stall = {"stall_s": event.stall_s} if isinstance(event, SaveEvent) else {}
    return {**asdict(event), **stall, "at": saved_at(event.time_s)}


def saves_text(saves: Sequence[SaveEvent], width: int | None = None) -> str:
    """A line for each save; below a failed one, why it failed."""
    width = terminal_width() if width is None else width
    rows = [
        [
            f"{save.step:,}",
            format_seconds(save.stall_s),
            format_seconds(save.total_s),
            format_size(save.nbytes),
            format_size(save.written_nbytes),
            format_size(save.copied_nbytes),
            format_size(save.memory_nbytes),
            "FAILED" if save.error else "",
        ]
        for save in saves
    ]
    titles = ("STEP", "WAITED", "TOOK", "STATE", "WRITTEN", "COPIED", "MEMORY")
    columns = [*(Column(title, right=True) for title in titles), Column("")]
    title, *lines = table(columns, rows, width).split("\n")
    text = [title]
    for line, save in zip(lines, saves, strict=True):
        text.append(line)
        if save.error:
            error = wrapped(cut(save.error, _ERROR_WIDTH), width=width - len(_INDENT))
            text += [_INDENT + part for part in error.split("\n")]
    return "\n".join(text)


def summary_text(summary: Summary, width: int | None = None) -> str:
    """All saves in a few lines, and all restores in one."""
    lines: list[str] = []
    if summary.median_stall_s is not None and summary.largest_stall_s is not None:
        failed = f", {summary.failed:,} failed" if summary.failed else ""
        waited = format_seconds(summary.median_stall_s)
        longest = format_seconds(summary.largest_stall_s)
        lines.append(f"{plural(summary.saves, 'save')}{failed}.")
        lines.append(f"Training waited for {waited} in the median, {longest} at most.")
    if summary.median_total_s is not None:
        new, whole = format_size(summary.written_nbytes), format_size(summary.nbytes)
        rate = _rate(summary.written_nbytes, summary.write_s)
        lines.append(f"A save took {format_seconds(summary.median_total_s)} in the median.")
        lines.append(f"{new} written of {whole} saved{f', {rate} in each thread' if rate else ''}.")
        if summary.compress_s:
            raw = format_size(summary.new_nbytes)
            spent = format_seconds(summary.compress_s)
            lines.append(f"Before it was compressed it was {raw}; compressing took {spent}.")
    if summary.restores:
        rate = _rate(summary.restored_nbytes, summary.restore_s)
        lines.append(
            f"{plural(summary.restores, 'restore')}: {format_size(summary.restored_nbytes)} in "
            f"{format_seconds(summary.restore_s)}{', ' + rate if rate else ''}."
        )
    return "\n".join(wrapped(line, width=width) for line in lines)


def _rate(nbytes: int, seconds: float) -> str:
    """Of work that was too short to be measured, nothing."""
    rate = nbytes / seconds if seconds else 0.0
    return f"{format_size(round(rate))}/s" if 1 <= rate < 1e18 else ""
