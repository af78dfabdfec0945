"""What `cp` and `sync` share: options, the table of what became of each checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any, TypeVar

import click

from holdfast.cli.render import (
    Column,
    checkpoint_json,
    error_json,
    plural,
    print_json,
    shown,
    table,
    table_width,
    terminal_width,
    wrapped,
)
from holdfast.core.address import printable, shell_word, short_ids
from holdfast.core.units import format_size, parse_rate
from holdfast.errors import CorruptionError, HoldfastError

if TYPE_CHECKING:
    from holdfast.manager.info import Transfer

_F = TypeVar("_F", bound=Callable[..., Any])

_ROOM = 20  # at least, for the reasons
_DONE = {
    "copy": "copied",
    "repair": "repaired",
    "update": "updated",
    "remove": "removed",
    "keep": "kept",
}


class Incomplete(HoldfastError):
    """Not all that was asked for was copied, and not because of damage."""

    exit_code = 3


class _Rate(click.ParamType):
    """Bytes per second."""

    name = "RATE"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | None:
        try:
            return parse_rate(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


def transfer_options(command: _F) -> _F:
    """The options of both commands."""
    for option in (
        click.option(
            "--take-over",
            is_flag=True,
            help="Even if a process writes TARGET: it can save no more.",
        ),
        click.option(
            "--bandwidth",
            type=_Rate(),
            metavar="RATE",
            help="Copy at most so much, such as 100MB/s.",
        ),
        click.option(
            "--verify", is_flag=True, help="Compare what TARGET has with its digests, too."
        ),
    ):
        command = option(command)
    return command


def report(
    source: str, target: str, results: Sequence[Transfer], *, as_json: bool, dry_run: bool = False
) -> int:
    """Print what became of each checkpoint; the exit status, or the error to end with."""
    error = _error(target, results)
    if as_json:
        value = {
            "run": source,
            "target": target,
            "dry_run": dry_run,
            "checkpoints": [_row(result) for result in results],
            "copied_bytes": sum(r.nbytes for r in results if r.action != "remove"),
            "freed_bytes": sum(r.nbytes for r in results if r.action == "remove"),
        }
        print_json({"ok": error is None, **error_json(error), **value})
        return error.exit_code if error else 0
    print(transfers_text(target, results, dry_run=dry_run))
    if error:
        raise error
    return 0


def transfers_text(
    target: str, results: Sequence[Transfer], *, dry_run: bool, width: int | None = None
) -> str:
    """A line for each checkpoint that is changed, in a dry run for each; then the sum."""
    listed = [r for r in results if dry_run or r.action != "keep" or r.error or _spared(r)]
    text = _table(listed, results, dry_run=dry_run, width=width)
    total = wrapped(_total(target, results, dry_run=dry_run), width=width)
    return f"{text}\n{total}" if listed else total


def _total(target: str, results: Sequence[Transfer], *, dry_run: bool) -> str:
    done = [result for result in results if not result.error]
    parts: list[str] = []
    for action, word in _DONE.items():
        found = [result for result in done if result.action == action]
        if not found or action == "keep":
            continue
        size = sum(result.nbytes for result in found)
        freed = ("to free" if dry_run else "freed") if action == "remove" else ""
        what = [f"{action if dry_run else word} {plural(len(found), 'checkpoint')}"]
        if size or action == "copy":
            what.append(f"{format_size(size)} {freed}".rstrip())
        parts.append(", ".join(what))
    if not parts:
        if len(done) < len(results):
            return f"Nothing was copied to {printable(target)}."
        return f"Nothing to do: {printable(target)} has all of it."
    if kept := len([result for result in done if result.action == "keep"]):
        parts.append(f"{kept:,} {'stays as it is' if kept == 1 else 'stay as they are'}")
    text = "; ".join(parts)
    return f"Would {text}." if dry_run else f"{text[0].upper()}{text[1:]}."


def _spared(result: Transfer) -> bool:
    return result.action == "keep" and result.why[0].startswith("not everything")


def _table(
    listed: Sequence[Transfer], every: Sequence[Transfer], *, dry_run: bool, width: int | None
) -> str:
    width = terminal_width() if width is None else width
    ids = short_ids([result.info.id for result in every])
    facts = [
        [
            _state(result, dry_run),
            f"{result.info.step:,}",
            ids[result.info.id],
            format_size(result.nbytes) if result.nbytes else "",
        ]
        for result in listed
    ]
    columns = [
        Column("ACTION"),
        Column("STEP", right=True),
        Column("ID"),
        Column("SIZE", right=True),
    ]
    room = max(_ROOM, width - table_width(columns, facts) - 2)
    rows: list[list[str]] = []
    for result, fact in zip(listed, facts, strict=True):
        why = result.error or ", ".join(result.why)
        for line in wrap(shown(why), room, break_on_hyphens=False):
            rows.append([*fact, line])
            fact = [""] * len(fact)
    return table([*columns, Column("WHY", elastic=True)], rows, width)


def _state(result: Transfer, dry_run: bool) -> str:
    if result.damaged:
        return "DAMAGED"
    if result.error:
        return "FAILED"
    return result.action if dry_run else _DONE[result.action]


def _row(result: Transfer) -> dict[str, Any]:
    return {
        **checkpoint_json(result.info),
        "action": result.action,
        "why": list(result.why),
        "transferred": result.nbytes,
        "problem": result.error,
        "damaged": result.damaged,
    }


def _error(target: str, results: Sequence[Transfer]) -> HoldfastError | None:
    failed = [result for result in results if result.error]
    if not failed:
        return None
    counts = f"{len(failed):,} of {plural(len(results), 'checkpoint')}"
    verb = "was" if len(failed) == 1 else "were"
    message = f"{counts} {verb} not copied to {printable(target)}"
    source = failed[0].info.address
    address = printable(source)
    if any(result.damaged for result in failed):
        return CorruptionError(
            f"{message}: damage was found in {address}",
            hint=f"See what is damaged: holdfast verify {shell_word(source)}. "
            "The others are there.",
        )
    return Incomplete(message, hint="Give the same command again.")
