"""`holdfast rehearse`: prove that a training script recovers."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import click

from holdfast.cli.options import json_option, python_command
from holdfast.cli.render import print_json, shown
from holdfast.core.address import printable
from holdfast.errors import UsageError


class _Finite(click.FloatRange):
    """Neither "nan" nor "inf", which Python's numbers and no JSON can be."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


@click.command(
    short_help="Kill a training script, resume it, and compare it with itself.",
    context_settings={"allow_interspersed_args": False},
    epilog="""\b
Examples:
  holdfast rehearse -- python train.py
  holdfast rehearse --steps 200 --kills 10 -- python train.py --lr 0.1
  holdfast rehearse --ignore tok_per_s --report out.json -- python train.py

\b
Exit status: 0 equal, 5 something differs, 3 it could not be rehearsed.""",
)
@click.option("--steps", default=30, show_default=True, help="Steps to train.")
@click.option("--kills", default=4, show_default=True, help="Times to kill it.")
@click.option("--seed", type=int, help="Choose the same kills again.")
@click.option(
    "--tolerance", default=0.0, type=_Finite(min=0), help="Largest difference of numbers."
)
@click.option(
    "--ignore", multiple=True, metavar="NAME", help="A variable or metric that may differ."
)
@click.option(
    "--timeout",
    default=600.0,
    type=_Finite(min=0, min_open=True),
    show_default=True,
    help="Seconds for each process.",
)
@click.option("--report", type=click.Path(dir_okay=False), help="Write all of it as JSON.")
@json_option
@click.argument("command", nargs=-1, required=True)
def rehearse(
    steps: int,
    kills: int,
    seed: int | None,
    tolerance: float,
    ignore: tuple[str, ...],
    timeout: float,
    report: str | None,
    as_json: bool,
    command: tuple[str, ...],
) -> int:
    """Prove that a training script goes on exactly after it was killed.

    Runs it for some steps, then again from an early checkpoint with kills at random
    moments (SIGKILL and SIGTERM), and compares metrics, data, random states, the
    variables around the loop and all that is tracked. What differs is named, with its
    usual cause. Checkpoints go to a temporary folder, not to the run's own address;
    other files that the script writes are written as ever.
    """
    from holdfast.rehearse import Plan, text_of
    from holdfast.rehearse import rehearse as play

    if report is not None and not Path(report).absolute().parent.is_dir():
        raise UsageError(
            f"there is no folder for the report {printable(report)}",
            hint="A rehearsal takes a while: make the folder first.",
        )
    plan = Plan(
        command=python_command(command),
        steps=steps,
        kills=kills,
        seed=random.randrange(10_000) if seed is None else seed,
        tolerance=tolerance,
        ignore=ignore,
        timeout_s=timeout,
    )
    if not as_json:
        print(shown(f"rehearsing {steps} steps with {kills} kills (--seed {plan.seed}):"))
    result = play(plan, lambda line: None if as_json else print(shown(line), flush=True))
    if report is not None:
        Path(report).write_text(json.dumps(result.to_tree(), indent=2) + "\n")
    if as_json:
        print_json({"ok": result.verdict == "equal", **result.to_tree()})
    else:
        for line in text_of(result).splitlines():
            print(shown(line))
    return result.exit_code
