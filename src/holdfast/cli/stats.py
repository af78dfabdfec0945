"""`holdfast stats`: what a run's saves and restores have cost, and where its time went."""

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
from holdfast.core.units import format_interval, format_seconds, format_size

if TYPE_CHECKING:
    from holdfast.manager.goodput import Attempt, Goodput
    from holdfast.manager.history import Event, SaveEvent, Summary

_NEWEST = 20
# An error may quote what it found; the start of it says what happened.
_ERROR_WIDTH = 400
_INDENT = "    "


@click.command(
    short_help="Show what a run's saves have cost, and where its time went.",
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
    help="Show the newest N saves and starts.",
)
@json_option
def stats(address: str, newest: int, as_json: bool) -> None:
    """Show what a run's saves have cost, and where its time went.

    Of each save and of each start of the run's program, newest first, and of all of
    them together.

    WAITED is how long the training stood still, TOOK the time until the checkpoint
    was durable. STATE is the size of the state, WRITTEN what was new in it, COPIED
    what was not read in place, MEMORY what saves held besides the state.

    Of a start: its first and its last step, how it ENDED, how long its loop RAN, what
    of that was LOST since its steps had to be done again, and how long the run was
    DOWN until its loop went on after it.
    """
    address = whole_run(address)
    with opened(address) as run:
        events = run.events()
        found = run.goodput(events)
        results = run.stored_results()
    from msgspec.structs import asdict

    from holdfast.manager.history import (
        FallbackEvent,
        NoticeEvent,
        RestoreEvent,
        SaveEvent,
        summarize,
    )

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
                "results": {"count": results.count, "nbytes": results.nbytes},
                "goodput": goodput_json(found) if found else None,
                "starts": [start_json(one) for one in reversed(found.attempts)] if found else [],
                "notices": [event_json(e) for e in reversed(events) if isinstance(e, NoticeEvent)],
                "fallbacks": [
                    event_json(e) for e in reversed(events) if isinstance(e, FallbackEvent)
                ],
            }
        )
        return
    if results.count:
        size = format_size(results.nbytes)
        print(f"{plural(results.count, 'stored result')} of calls, {size}.", end="\n\n")
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
    if text := summary_text(summary):
        print(text, end="\n\n")
    if found is None:
        print(
            wrapped(
                "Where the time went is not known: no start was recorded. An older Holdfast wrote "
                "this run, or a program without a `Run`."
            )
        )
        return
    print(starts_text(found.attempts, newest))
    if len(found.attempts) > newest:
        print(f"{ellipsis()} and {len(found.attempts) - newest:,} older")
    print(goodput_text(found))
    if found.attempts[-1].end == "unknown":
        print(wrapped("Whether the last one still runs cannot be known from here."))
    if any(event.epoch < found.attempts[0].epoch for event in saves):
        print(wrapped("What came before the first start that was recorded does not count."))


def event_json(event: Event) -> dict[str, Any]:
    """Every number of an event, named as in the run's files, and when that was."""
    from msgspec.structs import asdict

    from holdfast.manager.history import SaveEvent

    stall = {"stall_s": event.stall_s} if isinstance(event, SaveEvent) else {}
    return {**asdict(event), **stall, "at": saved_at(event.time_s)}


def goodput_json(found: Goodput) -> dict[str, Any]:
    """Every number of it but for those of single starts."""
    from msgspec.structs import asdict

    value = asdict(found)
    starts = len(value.pop("attempts"))
    return {"fraction": found.fraction, "starts": starts, **value}


def start_json(attempt: Attempt) -> dict[str, Any]:
    """Every number of one start, and when that was."""
    from msgspec.structs import asdict

    at = saved_at(attempt.began_s)
    return {**asdict(attempt), "replayed_steps": attempt.replayed_steps, "at": at}


def starts_text(attempts: Sequence[Attempt], newest: int, width: int | None = None) -> str:
    """A line for each start, newest first."""
    width = terminal_width() if width is None else width
    rows: list[list[str]] = []
    following: Attempt | None = None
    for one in reversed(attempts[-newest:]):
        down = one.down_s + one.unknown_s + (following.startup_s if following else 0.0)
        rows.append(
            [
                (saved_at(one.began_s) or "no valid time")[:16].replace("T", " "),
                f"{one.from_step:,}",
                f"{one.to_step:,}",
                _ended(one),
                _span(one.end_s - one.start_s),
                _span(one.replay_s) if one.replayed_steps else "",
                _span(down) if following and not one.planned else "",
            ]
        )
        following = one
    columns = [
        Column("STARTED (UTC)"),
        Column("FROM", right=True),
        Column("TO", right=True),
        Column("ENDED", elastic=True),
        Column("RAN", right=True),
        Column("LOST", right=True),
        Column("DOWN", right=True),
    ]
    return table(columns, rows, width)


def _ended(attempt: Attempt) -> str:
    """How, in a word or two."""
    if attempt.end == "killed" and attempt.signal:
        return f"killed by {_signal_name(attempt.signal)}"
    if attempt.end == "exited" and attempt.exit_code is not None:
        return f"exited with {attempt.exit_code}"
    if attempt.text and attempt.end in ("preempted", "error"):
        return f"{attempt.end} ({attempt.text})"
    return _ENDS.get(attempt.end, attempt.end)


_ENDS = {
    "crashed": "without a word",
    "running": "still running",
    "hang": "hung",
    "timeout": "timed out",
}


def _signal_name(number: int) -> str:
    import signal

    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def goodput_text(found: Goodput, width: int | None = None) -> str:
    """Where the time went, in a few lines."""
    width = terminal_width() if width is None else width
    steps = plural(found.replayed_steps, "step")
    down, starting = _span(found.down_s), _span(found.startup_s)
    parts = [
        ("productive", found.productive_s, ""),
        ("stalled in saves", found.saving_s, ""),
        ("lost to replay", found.replay_s, steps if found.replayed_steps else ""),
        ("lost to restarts", found.restart_s, f"{down} down, {starting} starting up"),
        ("unknown", found.unknown_s, ""),
    ]
    rows = [
        [f"  {name}", _span(seconds), _percent(seconds, found.wall_s), about]
        for name, seconds, about in parts
        if seconds or name == "productive"
    ]
    columns = [Column(""), Column("", right=True), Column("", right=True), Column("", elastic=True)]
    lines = table(columns, rows, width).split("\n")[1:]  # without titles
    share = _percent(found.productive_s, found.wall_s) or "nothing"
    counts = [plural(len(found.attempts), "start")]
    counts += [
        f"{count:,} {_KINDS.get(kind) or _ENDS.get(kind, kind)}"
        for kind, count in found.failures.items()
    ]
    if found.fallbacks:
        counts.append(f"{plural(found.fallbacks, 'restore')} past a damaged checkpoint")
    head = f"Goodput: {share} of {_span(found.wall_s)}. {', '.join(counts)}."
    paused = f"Pauses between runs, {_span(found.paused_s)} in all, do not count."
    return "\n".join(
        [wrapped(head, width=width), *lines, *([paused] if found.paused_s >= 1 else [])]
    )


def _span(seconds: float) -> str:
    """From a minute on with seconds, from an hour on with minutes."""
    return format_seconds(seconds) if seconds < 59.5 else format_interval(seconds)


_KINDS = {"crashed": "ended without a word", "exited": "exited with an error"}


def _percent(seconds: float, whole_s: float) -> str:
    return f"{100 * seconds / whole_s:.1f} %" if whole_s > 0 else ""


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
