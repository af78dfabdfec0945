"""`holdfast diff`: what differs between two checkpoints."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

from holdfast.cli import nodes
from holdfast.cli.options import json_option, opened, selector_of
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
from holdfast.errors import DIFFERENT

if TYPE_CHECKING:
    from holdfast.manager.comparison import Apart, Comparison, Difference, Side
    from holdfast.manager.info import CheckpointInfo

# Of each section; --all shows the rest.
_SHORT = 24


@click.command(
    short_help="Show what differs between two checkpoints.",
    epilog="""\b
Examples:
  holdfast diff runs/mnist@100 runs/mnist@200
  holdfast diff runs/mnist@100 runs/again@100 --values
  holdfast diff runs/mnist@100 runs/again@100 --all
  holdfast diff runs/mnist@100 runs/again@100 --json

\b
Exit status: 0 the same training state, 5 they differ, 1 an error.""",
)
@click.argument("first", metavar="REF")
@click.argument("second", metavar="REF")
@click.option("--values", is_flag=True, help="Read unequal tensors: how far are they apart?")
@click.option("--all", "everything", is_flag=True, help="Show every difference.")
@json_option
def diff(first: str, second: str, values: bool, everything: bool, as_json: bool) -> int:
    """Show what differs between two checkpoints of one run, or of two.

    Tensors are compared bit for bit, by their digests: that reads none of them. Equal
    means that a job would go on from either in the same way: step, state, position and
    random states are the same. Metrics, config and environment are shown and do not
    count.
    """
    wanted = [parse_reference(first), parse_reference(second)]
    with opened(wanted[0].address) as run, opened(wanted[1].address) as other:
        result = run.compare(selector_of(wanted[0]), other, selector_of(wanted[1]), values=values)
    if as_json:
        print_json({"ok": True, **_json(result)})
    else:
        print(comparison_text(result, time.time(), everything=everything))
    return 0 if result.equal else DIFFERENT


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


def _parts(result: Comparison, width: int | None) -> str:
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
    return {
        "equal": result.equal,
        "a": checkpoint_json(result.a),
        "b": checkpoint_json(result.b),
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
