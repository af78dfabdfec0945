"""The program around the commands: one way out for results, errors and signals."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import TextIO

import click

import holdfast
from holdfast.cli.average import average
from holdfast.cli.cp import cp
from holdfast.cli.diff import diff
from holdfast.cli.doctor import doctor
from holdfast.cli.export import export
from holdfast.cli.gc import gc
from holdfast.cli.import_ import import_
from holdfast.cli.init import init
from holdfast.cli.interrupts import ends_when_interrupted
from holdfast.cli.ls import ls
from holdfast.cli.pin import pin
from holdfast.cli.prune import prune
from holdfast.cli.rehearse import rehearse
from holdfast.cli.render import print_json, shown
from holdfast.cli.restore import restore
from holdfast.cli.rm import rm
from holdfast.cli.run import run
from holdfast.cli.show import show
from holdfast.cli.stats import stats
from holdfast.cli.sync import sync
from holdfast.cli.tag import tag
from holdfast.cli.verify import verify
from holdfast.core.address import printable
from holdfast.errors import HoldfastError

# As a shell reports them: 128 + the signal's number.
INTERRUPTED = 130
BROKEN_PIPE = 141

_HINTS = {
    errno.EACCES: "Check who may read and write there.",
    errno.EPERM: "Check who may read and write there.",
    errno.EROFS: "It is mounted for reading only: name another place.",
    errno.ENOSPC: "Free some space there, or name another place.",
    errno.EDQUOT: "Free some space there, or name another place.",
    errno.ENOENT: "Check the path.",
    errno.ENOTDIR: "Check the path.",
    errno.EISDIR: "Name a file: that is a folder.",
    errno.ENAMETOOLONG: "Use a shorter name.",
}


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
    epilog="Run 'holdfast COMMAND --help' for examples.",
)
@click.version_option(holdfast.__version__, prog_name="holdfast", message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """Look at runs and their checkpoints, compare, check, restore and remove them.

    A checkpoint is named by a reference: runs/mnist (the latest),
    runs/mnist@41200 (a step), runs/mnist@best:val_loss, runs/mnist@a-tag, or
    runs/mnist@9f3c (the start of an id).
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


COMMANDS = (
    *(ls, show, stats, diff, verify, restore, export, import_, average, cp, sync),
    *(tag, pin, rm, prune, gc, doctor),
    *(rehearse, run, init),
)
for command in COMMANDS:
    cli.add_command(command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; its exit status. Raises only what is a bug of ours."""
    words = list(sys.argv[1:] if argv is None else argv)
    # What follows "--" is the command line of another program.
    as_json = "--json" in takewhile(lambda word: word != "--", words)
    _prepare_streams()
    as_program = argv is None and threading.current_thread() is threading.main_thread()
    if not as_program:
        return _run(words, as_json)
    with ends_when_interrupted(lambda: fail(as_json, "interrupted", "", INTERRUPTED)):
        return _run(words, as_json)


def _run(words: list[str], as_json: bool) -> int:
    try:
        # Not `cli.main`: that makes status 1 of a closed pipe.
        with _escaped_warnings(), cli.make_context("holdfast", words) as context:
            status = cli.invoke(context)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        return fail(as_json, error.format_message(), _help_for(error), error.exit_code)
    except HoldfastError as error:
        return fail(as_json, error.message, error.hint, error.exit_code)
    except BrokenPipeError:
        # The reader (`| head`) has enough.
        _abandon(sys.stdout)
        return BROKEN_PIPE
    except OSError as error:
        hint = _HINTS.get(error.errno or 0, "")
        return fail(as_json, f"{error.strerror or error}{_place(error)}", hint, 1)
    except (KeyboardInterrupt, click.Abort):
        return fail(as_json, "interrupted", "", INTERRUPTED)


def _place(error: OSError) -> str:
    """Where it happened, in names that the user knows."""
    path = str(error.filename2 or error.filename or "")
    folder, name = os.path.split(path)
    if name.startswith(".holdfast-"):  # a scratch folder of ours
        path = folder
    return f": {printable(path)}" if path else ""


def _prepare_streams() -> None:
    for name in ("stdout", "stderr"):
        stream: TextIO | None = getattr(sys, name)
        if stream is None:  # closed by the shell (`>&-`): `print` would take the other one
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 -- for as long as we run
        elif reconfigure := getattr(stream, "reconfigure", None):
            # A terminal that cannot show a character gets its escape instead of a traceback.
            reconfigure(errors="backslashreplace")


def fail(as_json: bool, message: str, hint: str, exit_code: int) -> int:
    """Say it, if there is anybody to hear it; the status says it in any case."""
    stream = sys.stdout if as_json else sys.stderr
    try:
        if as_json:
            print_json({"ok": False, "error": message, "hint": hint, "exit_code": exit_code})
        else:
            print(f"Error: {_lines(message)}", file=stream)
            if hint:
                print(f"Hint: {_lines(hint)}", file=stream)
    except OSError:
        _abandon(stream)
    for one in (sys.stdout, sys.stderr):
        # Either may be the one that failed, and have kept what it could not write.
        try:
            one.flush()
        except OSError:
            _abandon(one)
    return exit_code


def _abandon(stream: TextIO) -> None:
    """Nobody reads it, or its disk is full. Python would complain again at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _lines(text: str) -> str:
    # Not `splitlines`: it takes other characters for ends of lines, too.
    return "\n  ".join(shown(line) for line in text.split("\n"))


def _help_for(error: click.ClickException) -> str:
    context = error.ctx if isinstance(error, click.UsageError) else None
    return f"See '{context.command_path if context else 'holdfast'} --help'."


class _Escaped(logging.Handler):
    """Warnings of the library, such as damage it found, on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        kind = "Warning" if record.levelno < logging.ERROR else "Damage"
        with contextlib.suppress(OSError, ValueError):
            print(f"{kind}: {_lines(record.getMessage())}", file=sys.stderr)


@contextlib.contextmanager
def _escaped_warnings() -> Iterator[None]:
    """Without it Python's last-resort handler would print messages as they are."""
    logger = logging.getLogger("holdfast")
    handler = _Escaped(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
