"""`holdfast verify`: read every byte and compare it with its digest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from holdfast.cli.foreign import is_foreign
from holdfast.cli.foreign_verify import verify_foreign
from holdfast.cli.options import json_option, opened, selector_of, watched, whole_run
from holdfast.cli.render import (
    Column,
    checkpoint_json,
    error_json,
    findings_json,
    plural,
    print_json,
    shown,
    table,
)
from holdfast.core.address import no_checkpoint, parse_reference, printable, shell_word, short_ids
from holdfast.core.units import format_size
from holdfast.errors import CorruptionError, NoStore, UsageError

if TYPE_CHECKING:
    from holdfast.manager.doctor import Finding
    from holdfast.manager.info import Verification


@click.command(
    short_help="Check every byte of a run's checkpoints.",
    epilog="""\b
Examples:
  holdfast verify runs/mnist            # every checkpoint
  holdfast verify runs/mnist@latest     # one of them
  holdfast verify runs/mnist --repair-from backup/mnist
  holdfast verify runs/mnist --json
  holdfast verify model.pt              # a file of another make

\b
Exit status: 0 all intact, 4 damage found (also of the run's log), 10 nothing
there.""",
)
@click.argument("reference", metavar="RUN|REF|FILE")
@click.option(
    "--repair-from",
    "other",
    metavar="OTHER",
    help="Replace what is damaged by what is whole in OTHER, a copy of the run.",
)
@json_option
def verify(reference: str, other: str | None, as_json: bool) -> int:
    """Read every byte of a run's checkpoints, or of one, and check its digest.

    Of a whole run its results of calls (`run.once`), too.

    Damage is reported with the leaf or the file that has it. Nothing is changed, unless
    with --repair-from: then damaged and missing objects are replaced, where OTHER has
    them and every byte there is right. The log, which lists the checkpoints, is looked
    at, too. OTHER has one of its own, so nothing of it is replaced: doctor --repair
    makes it anew.

    Of a FILE, or folder, of another make what its format lets check is checked, and it is
    said what cannot be: few formats have checksums.
    """
    if is_foreign(reference):
        if other is not None:
            raise UsageError(
                f"{reference} is no run: only a run is repaired", hint="Leave --repair-from out."
            )
        return verify_foreign(reference, as_json=as_json)
    wanted = parse_reference(reference)
    source = None if other is None else whole_run(other)
    from holdfast.manager.results import Results

    with opened(wanted.address) as run, watched(f"verifying {wanted.address}"):
        ref = selector_of(wanted) if wanted.explicit else None
        results = run.verify(ref, repair_from=source)
        calls = 0 if wanted.explicit else run.stored_results().count
        bad = Results.of(run).verify() if calls else []
        try:
            lists = run.examine(checkpoints=False)
        except NoStore:
            raise no_checkpoint(wanted.address) from None
    findings = lists.damage
    if not results and not findings and not calls:
        raise no_checkpoint(wanted.address)
    mirror = lists.mirror if source is None else ""
    error = _damage(wanted.address, results, findings, mirror, len(bad))
    repairs = [key for result in results for key in result.repaired]
    if as_json:
        rows = [
            {
                **checkpoint_json(result.info),
                "intact": result.ok,
                "problems": list(result.problems),
                "bytes_read": result.bytes_read,
                "repaired": list(result.repaired),
                "unrepaired": list(result.unrepaired),
            }
            for result in results
        ]
        value = {"run": wanted.address, "checkpoints": rows, "findings": findings_json(findings)}
        value["results"] = {"count": calls, "problems": [one.message for one in bad]}
        print_json({"ok": error is None, **error_json(error), **value})
        return 4 if error else 0
    if results:
        print(results_text(results))
    for finding in findings:
        print(shown(f"{finding.check} DAMAGED: {finding.what}"))
        if source is not None:
            print(shown(f"    not replaced by that of {source}, which is another: {finding.do}"))
    if source is not None and repairs:
        print(shown(f"Replaced {plural(len(repairs), 'object')} by those of {source}:"))
        print("\n".join(f"  {shown(key)}" for key in repairs))
    for one in bad:
        print(shown(f"result DAMAGED: {one.message}"))
    if error:
        raise error
    what = [plural(len(results), "checkpoint")] if results else []
    what += [f"{plural(calls, 'result')} of calls"] if calls else []
    print(f"{' and '.join(what)} verified, all intact.")
    return 0


def results_text(results: Sequence[Verification], width: int | None = None) -> str:
    """A line for each checkpoint; below a damaged one, what is wrong with it."""
    ids = short_ids([result.info.id for result in results])
    rows = [
        [
            f"{result.info.step:,}",
            ids[result.info.id],
            format_size(result.bytes_read),
            "intact" if result.ok else "DAMAGED",
        ]
        for result in results
    ]
    columns = [
        Column("STEP", right=True),
        Column("ID"),
        Column("READ", right=True),
        Column("STATE"),
    ]
    title, *lines = table(columns, rows, width).split("\n")
    text = [title]
    for line, result in zip(lines, results, strict=True):
        # Whole, even where they are longer than the terminal is wide: they are to be copied.
        text += [line, *(f"    {shown(problem)}" for problem in result.problems)]
        text += [f"    not repaired: {shown(reason)}" for reason in result.unrepaired]
    return "\n".join(text)


def _damage(
    address: str,
    results: Sequence[Verification],
    findings: Sequence[Finding],
    mirror: str,
    calls: int = 0,
) -> CorruptionError | None:
    """What to end with: of the checkpoints, and of what lists them. `mirror` is where to repair
    from; "" if there is none, or something was repaired from already. `calls` is how many
    results of calls are damaged."""
    run, word = printable(address), shell_word(address)
    intact = [result.info for result in results if result.ok]
    bad = len(results) - len(intact)
    what: list[str] = []
    hint = ""
    if bad:
        verb = "is" if bad == 1 else "are"
        what.append(f"{bad} of {plural(len(results), 'checkpoint')} in {run} {verb} damaged")
        hint = (
            "None of these is intact. Look for other checkpoints, or a copy of the run: "
            f"holdfast verify {word} --repair-from COPY"
        )
        if intact:
            ref = intact[-1].ref
            hint = (
                f"The newest intact one of these is {printable(ref)}: "
                f"holdfast restore {shell_word(ref)} DIR"
            )
        if mirror:
            hint = (
                "The run's mirror may have what is damaged: "
                f"holdfast verify {word} --repair-from {shell_word(mirror)}"
            )
    if findings:
        what.append(
            f"the list of checkpoints of {run} is damaged" if not bad else "so is their list"
        )
        hint = hint or (
            "The run's job rebuilds it from the checkpoints that are whole when it starts, or: "
            f"holdfast doctor {word} --repair"
        )
    if calls:
        verb = "is" if calls == 1 else "are"
        what.append(f"{plural(calls, 'result')} of calls in {run} {verb} damaged")
        hint = hint or "They are computed again when the run's program asks for them."
    return CorruptionError(", and ".join(what), hint=hint) if what else None
