"""`holdfast diff`: what differs between two checkpoints."""

from __future__ import annotations

import os.path
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

from holdfast.cli import nodes
from holdfast.cli.foreign import is_foreign
from holdfast.cli.options import json_option, opened, selector_of, watched
from holdfast.cli.render import (
    Column,
    checkpoint_json,
    metric_text,
    name_shown,
    plural,
    print_json,
    saved_text,
    shown,
    table,
    wrapped,
)
from holdfast.core.address import parse_reference
from holdfast.errors import DIFFERENT, StateError, UsageError

if TYPE_CHECKING:
    from holdfast.manager.comparison import Apart, Comparison, Difference, Side
    from holdfast.manager.foreign_comparison import Compared, FileComparison
    from holdfast.manager.info import CheckpointInfo

# Of each section; --all shows the rest.
_SHORT = 24
_NAMED = 8


@click.command(
    short_help="Show what differs between two checkpoints, or files.",
    epilog="""\b
Examples:
  holdfast diff runs/mnist@100 runs/mnist@200
  holdfast diff runs/mnist@100 runs/again@100 --values
  holdfast diff runs/mnist@100 runs/again@100 --all
  holdfast diff runs/mnist@100 runs/again@100 --json
  holdfast diff model.safetensors runs/mnist@best:val_loss --only model

\b
Exit status: 0 the same training state, 5 they differ, 1 an error.""",
)
@click.argument("first", metavar="REF|FILE")
@click.argument("second", metavar="REF|FILE")
@click.option("--values", is_flag=True, help="Read unequal tensors: how far are they apart?")
@click.option("--all", "everything", is_flag=True, help="Show every difference.")
@click.option("--only", default="", metavar="NAME", help="With a FILE: what is below this name.")
@json_option
def diff(first: str, second: str, values: bool, everything: bool, only: str, as_json: bool) -> int:
    """Show what differs between two checkpoints of one run, or of two.

    Tensors are compared bit for bit, by their digests: that reads none of them. Equal
    means that a job would go on from either in the same way: step, state, position and
    random states are the same. Metrics, config and environment are shown and do not
    count.

    Either may be a FILE or folder of another make: then tensors and plain values are
    compared by name, type, shape and every bit. What is no plain value is left out and named.
    """
    if is_foreign(first) or is_foreign(second):
        return diff_files(first, second, only, values, everything, as_json)
    if only:
        raise UsageError(
            "--only is for a comparison with a file of another make", hint="Leave it out."
        )
    wanted = [parse_reference(first), parse_reference(second)]
    with opened(wanted[0].address) as run, opened(wanted[1].address) as other:
        result = run.compare(selector_of(wanted[0]), other, selector_of(wanted[1]), values=values)
    if as_json:
        print_json({"ok": True, **_json(result)})
    else:
        print(comparison_text(result, time.time(), everything=everything))
    return 0 if result.equal else DIFFERENT


def diff_files(
    first: str, second: str, only: str, values: bool, everything: bool, as_json: bool
) -> int:
    """Where one of the two, or both, are of another make; the exit status."""
    from holdfast.foreign import open_foreign
    from holdfast.manager.foreign_comparison import compare_files, of_foreign

    lines: list[str] = []
    about: list[dict[str, Any]] = []
    sides: list[Compared] = []
    only = only.strip("/")
    with ExitStack() as held:
        for name, reference in zip("ab", (first, second), strict=True):
            if is_foreign(reference):
                foreign = held.enter_context(open_foreign(os.path.expanduser(reference)))
                sides.append(of_foreign(foreign, only))
                kind = foreign.file.kind
                about.append({"file": reference, "kind": kind, "nbytes": foreign.file.nbytes})
                lines.append(shown(f"{name}  {reference}, {kind}"))
                continue
            wanted = parse_reference(reference)
            run = held.enter_context(opened(wanted.address))
            info = run.info(selector_of(wanted))
            sides.append(run.to_compare(info.id, only=only))
            about.append(checkpoint_json(info))
            lines.append(_side(name, info, time.time()))
        with watched("comparing"):
            result = compare_files(*sides, values=values)
    if result.left_out and not result.leaves and not result.values:
        path, kind = result.left_out[0]
        raise StateError(
            f"nothing could be compared: {path!r} is a {kind}, and no plain value",
            hint="Compare files of tensors and plain values: torch.save(model.state_dict(), …).",
        )
    if as_json:
        print_json({"ok": True, **_files_json(result, about)})
    else:
        print(files_text(lines, result, everything=everything))
    return 0 if result.equal else DIFFERENT


def files_text(
    sides: Sequence[str],
    result: FileComparison,
    *,
    everything: bool = False,
    width: int | None = None,
) -> str:
    """The page about two of which one is a file of another make."""
    compared = f"{plural(result.leaves, 'tensor')} and {plural(result.values, 'value')}"
    where = "of what can be compared, " if result.left_out else ""
    verdict = f"The same, {where}bit for bit: {compared}."
    if result.differences:
        first = result.differences[0]
        verdict = f"The first difference: {name_shown(first.path)} ({first.kind})."
    sections = ["\n".join(sides), wrapped(verdict, indent=2, width=width)]
    if result.left_out:
        said = ", ".join(f"{path} ({kind})" for path, kind in result.left_out[:_NAMED])
        more = f" and {len(result.left_out) - _NAMED:,} more" * (len(result.left_out) > _NAMED)
        text = f"Not compared, as they are no plain values: {said}{more}."
        sections.append(wrapped(text, indent=2, width=width))
    if any(part.leaves != part.equal for part in result.parts):
        sections.append(_parts(result, width))
    if result.differences:
        sections.append(_section("state", result.differences, everything, width))
    return "\n\n".join(sections)


def comparison_text(
    result: Comparison, now_s: float, *, everything: bool = False, width: int | None = None
) -> str:
    """The page: the two, whether they are equal, where they differ first, all differences."""
    sections = [
        f"{_side('a', result.a, now_s)}\n{_side('b', result.b, now_s)}",
        _verdict(result, width),
    ]
    if any(part.leaves != part.equal for part in result.parts):
        sections.append(_parts(result, width))
    for section, found in groupby(result.differences, key=lambda d: d.section):
        sections.append(_section(section, list(found), everything, width))
    return "\n\n".join(sections)


def _side(name: str, info: CheckpointInfo, now_s: float) -> str:
    return shown(f"{name}  {info.ref}, id {info.id[:12]}, saved {saved_text(info.time_s, now_s)}")


def _verdict(result: Comparison, width: int | None) -> str:
    if result.equal:
        compared = f"{plural(result.leaves, 'leaf')} and {plural(result.values, 'value')}"
        compared = compared.replace("leafs", "leaves")
        same = f"The same training state, bit for bit: {compared}, position, random states."
        same = wrapped(same, width=width)
        return same if not result.differences else f"{same}\nOnly what is said about it differs."
    counted = [d for d in result.differences if d.section != "metrics"]
    if result.a.step != result.b.step:
        step = f"The steps differ: {result.a.step:,} and {result.b.step:,}."
    else:
        step = ""
    if not counted:
        return step
    first = counted[0]
    path = name_shown(first.path)
    where = path if first.section == "state" else f"{first.section}, {path}"
    said = wrapped(f"The first difference: {where} ({first.kind}).", indent=2, width=width)
    return "\n".join(filter(None, (step, said)))


def _parts(result: Comparison | FileComparison, width: int | None) -> str:
    numbers = ("leaves", "equal", "differ", "only_a", "only_b")
    rows = [
        [part.name, *(f"{n:,}" if (n := getattr(part, name)) else "" for name in numbers)]
        for part in result.parts
    ]
    titles = [name.replace("_", " ").upper() for name in numbers]
    columns = [Column("STATE", elastic=True), *(Column(title, right=True) for title in titles)]
    return table(columns, rows, width)


def _section(section: str, found: Sequence[Difference], everything: bool, width: int | None) -> str:
    listed = found if everything or len(found) <= _SHORT + 1 else found[:_SHORT]
    rows = [
        [
            difference.kind,
            difference.path or "(all of it)",
            _text(difference.a),
            "" if difference.kind == "values" else _text(difference.b),
            *_apart(difference.apart),
        ]
        for difference in listed
    ]
    columns = [
        Column("CHANGE"),
        Column("PATH", elastic=True),
        Column("A", elastic=True),
        Column("B", elastic=True),
        Column("UNEQUAL", right=True),
        Column("MAX |A-B|", right=True),
        Column("NAN IN ONE", right=True),
    ]
    text = f"{section}\n{table(columns, rows, width)}"
    if len(listed) < len(found):
        text += f"\n… {len(found) - len(listed):,} more (--all shows them)"
    return text


def _text(side: Side | None) -> str:
    if side is None:
        return ""
    if side.leaf is not None:
        return f"{side.leaf.dtype}{list(side.leaf.shape)}"
    [(_, text), *more] = list(nodes.flat(nodes.plain(side.node, ()))) or [("", "")]
    return f"{text}, …" if more else text


def _apart(apart: Apart | None) -> tuple[str, str, str]:
    if apart is None:
        return "", "", ""
    largest = metric_text(apart.largest) if apart.largest is not None else ""
    if not apart.differing:
        return "only bits", "", ""  # of NaNs, or the sign of a zero
    nan = f"{apart.nan_in_one:,}" if apart.nan_in_one else ""
    return f"{apart.differing:,} of {apart.elements:,}", largest, nan


def _json(result: Comparison) -> dict[str, Any]:
    return _any_json(result, checkpoint_json(result.a), checkpoint_json(result.b))


def _files_json(result: FileComparison, about: Sequence[dict[str, Any]]) -> dict[str, Any]:
    left_out = [{"path": path, "class": kind} for path, kind in result.left_out]
    return {**_any_json(result, *about), "not_compared": left_out}


def _any_json(
    result: Comparison | FileComparison, a: dict[str, Any], b: dict[str, Any]
) -> dict[str, Any]:
    return {
        "equal": result.equal,
        "a": a,
        "b": b,
        "leaves": result.leaves,
        "values": result.values,
        "parts": [
            {
                "name": part.name,
                "leaves": part.leaves,
                "equal": part.equal,
                "differ": part.differ,
                "only_a": part.only_a,
                "only_b": part.only_b,
            }
            for part in result.parts
        ],
        "differences": [_difference_json(difference) for difference in result.differences],
    }


def _difference_json(difference: Difference) -> dict[str, Any]:
    value: dict[str, Any] = {
        "section": difference.section,
        "kind": difference.kind,
        "path": difference.path,
        "a": _side_json(difference.a),
        "b": _side_json(difference.b),
    }
    if difference.apart is not None:
        value["unequal"] = difference.apart.differing
        value["elements"] = difference.apart.elements
        value["max_abs"] = difference.apart.largest
        value["nan_in_one"] = difference.apart.nan_in_one
    return value


def _side_json(side: Side | None) -> Any:
    if side is None:
        return None
    if side.leaf is not None:
        return {"dtype": side.leaf.dtype, "shape": list(side.leaf.shape)}
    return nodes.plain(side.node, ())
