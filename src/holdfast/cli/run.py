"""`holdfast run`: start a command, watch it, and start it again."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from holdfast.cli.options import json_option, python_command
from holdfast.cli.render import print_json
from holdfast.core.units import parse_duration


class Duration(click.ParamType):
    """Seconds, written as "90s", "10min", "1h30min"."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if isinstance(value, float):
            return value
        try:
            return parse_duration(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


DURATION = Duration()


@click.command(
    short_help="Run a training script, and start it again when it ends too early.",
    context_settings={"allow_interspersed_args": False},
    epilog="""\b
Examples:
  holdfast run -- python train.py
  holdfast run --hang-timeout 10min -- python train.py
  holdfast run --on-exit-code 3=stop --total-timeout 2d -- python train.py

\b
Exit status: that of the command, 128 + n if signal n ended it; 124 after
--total-timeout.""",
)
@click.option(
    "--hang-timeout",
    type=DURATION,
    metavar="TIME",
    help="Without a heartbeat of the loop for so long: save all stacks, start again.",
)
@click.option(
    "--start-timeout", type=DURATION, metavar="TIME", help="The same, until the first heartbeat."
)
@click.option("--timeout", type=DURATION, metavar="TIME", help="End an attempt after so long.")
@click.option("--total-timeout", type=DURATION, metavar="TIME", help="End everything after it.")
@click.option(
    "--grace",
    type=DURATION,
    default="30s",
    show_default=True,
    metavar="TIME",
    help="From SIGTERM to SIGKILL.",
)
@click.option(
    "--max-stuck",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    metavar="N",
    help="Give up after N restarts in a row without a new checkpoint.",
)
@click.option(
    "--max-backoff",
    type=DURATION,
    default="5min",
    show_default=True,
    metavar="TIME",
    help="The longest wait before a restart.",
)
@click.option(
    "--on-exit-code",
    "rules",
    multiple=True,
    metavar="CODES=restart|stop",
    help="What to do after these statuses, e.g. 3,10-12=stop.",
)
@click.option("--requeue", is_flag=True, help="Put a Slurm job that is preempted back in queue.")
@click.option(
    "--log-dir", type=click.Path(file_okay=False), help="Where stacks go; else a state folder."
)
@click.option("--no-status", is_flag=True, help="No status line on a terminal.")
@json_option
@click.argument("command", nargs=-1, required=True)
def run(
    hang_timeout: float | None,
    start_timeout: float | None,
    timeout: float | None,
    total_timeout: float | None,
    grace: float,
    max_stuck: int,
    max_backoff: float,
    rules: tuple[str, ...],
    requeue: bool,
    log_dir: str | None,
    no_status: bool,
    as_json: bool,
    command: tuple[str, ...],
) -> int:
    """Run a training script until it is done.

    Starts it again when it crashes, hangs or was preempted, for as long as it gets on:
    several restarts in a row without a new checkpoint end it. Passes signals on, and leaves
    no process behind. Prints a line per event on stderr. Options come before the command.
    """
    from holdfast.supervise import Rules, Settings, supervise

    settings = Settings(
        rules=Rules.parse(rules),
        max_stuck=max_stuck,
        longest_backoff_s=max_backoff,
        timeout_s=timeout,
        total_timeout_s=total_timeout,
        hang_timeout_s=hang_timeout,
        start_timeout_s=start_timeout,
        grace_s=grace,
        requeue=requeue,
    )
    outcome = supervise(python_command(command), settings, log_folder=log_dir, status=not no_status)
    if as_json:
        print_json({"ok": outcome.status == 0, **asdict(outcome)})
    return outcome.status
