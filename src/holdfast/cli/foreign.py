"""`holdfast show FILE`: what a file of another make holds, with nothing in it run."""

from __future__ import annotations

import os.path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from holdfast.cli.nodes import cut_text
from holdfast.cli.render import (
    Column,
    name_shown,
    plural,
    print_json,
    shown,
    table,
    terminal_width,
)
from holdfast.core.units import format_size
from holdfast.errors import DamagedObject

if TYPE_CHECKING:
    from holdfast.foreign.described import ForeignFile

# A longer list is what --leaves and --json are for.
_SHORT = 24
_MOST_NAMES = 8
_WHOLE = "(all of it)"


def is_foreign(reference: str) -> bool:
    """Whether `reference` names a file, or a folder of another make; a run is neither."""
    if "://" in reference:
        return False
    path = os.path.expanduser(reference)
    if not os.path.isdir(path):
        return os.path.isfile(path)
    from holdfast.foreign import is_foreign as is_known

    return is_known(path)


def described(path: str) -> ForeignFile:
    """What is at `path`, which `is_foreign`. Raises DamagedObject, UnknownFile."""
    from holdfast.foreign import FileSource, describe, open_foreign

    path = os.path.expanduser(path)
    if os.path.isdir(path) or path.endswith(".index.json"):
        with open_foreign(path) as foreign:
            return foreign.file
    with FileSource(path) as source:
        return describe(source)


def show_file(path: str, *, with_leaves: bool, as_json: bool) -> int:
    """Describe the file; the exit status. Raises DamagedObject after what could be told."""
    try:
        file = described(path)
    except DamagedObject as found:
        found.hint = found.hint or "Nothing in it can be read. Copy or download it again."
        raise
    error = _damage(path, file)
    if as_json:
        failed = {"error": error.message, "hint": error.hint, "exit_code": 4} if error else {}
        print_json({"ok": error is None, **failed, **_json(path, file, with_leaves)})
        return 4 if error else 0
    print(file_text(path, file, with_leaves=with_leaves))
    if error:
        raise error
    return 0


def _damage(path: str, file: ForeignFile) -> DamagedObject | None:
    if not file.problems:
        return None
    return DamagedObject(
        path,
        "; ".join(file.problems[:3]),
        hint="What is shown is what could be read. Loading it runs what it names all the same.",
    )


def _json(path: str, file: ForeignFile, with_leaves: bool) -> dict[str, Any]:
    value: dict[str, Any] = {
        "file": path,
        "kind": file.kind,
        "nbytes": file.nbytes,
        "runs_code": list(file.runs),
        "notes": list(file.notes),
        "problems": list(file.problems),
        "tensors": len(file.leaves),
        "tensor_bytes": sum(leaf.nbytes for leaf in file.leaves),
        "values": [{"path": where, "value": text} for where, text in file.values],
    }
    if with_leaves:
        value["leaves"] = [
            {
                "path": leaf.path,
                "dtype": leaf.dtype,
                "shape": list(leaf.shape),
                "nbytes": leaf.nbytes,
                "note": leaf.note,
            }
            for leaf in file.leaves
        ]
    return value


def file_text(
    path: str, file: ForeignFile, *, with_leaves: bool = False, width: int | None = None
) -> str:
    """The page about one file. Whether it runs code stands first."""
    width = terminal_width() if width is None else width
    total = sum(leaf.nbytes for leaf in file.leaves)
    sections = [
        "\n".join(
            [
                shown(f"{path}: {file.kind}, {format_size(file.nbytes)}"),
                *(shown(f"note: {note}") for note in file.notes),
            ]
        ),
        _warning(file, width),
        _leaves(file, width, with_leaves),
    ]
    if file.leaves:
        sections.append(f"{plural(len(file.leaves), 'tensor')}, {format_size(total)}.")
    if file.values:
        sections.append(_values(file))
    return "\n\n".join(filter(None, sections))


def _warning(file: ForeignFile, width: int) -> str:
    """The loud line."""
    if not file.runs:
        return ""
    names = ", ".join(name_shown(name) for name in file.runs[:_MOST_NAMES])
    if len(file.runs) > _MOST_NAMES:
        names += f" and {len(file.runs) - _MOST_NAMES:,} more (--json shows all)"
    text = f"THIS FILE RUNS CODE WHEN LOADED: {names}"
    return "\n".join(wrap(text, width, subsequent_indent="  ", break_on_hyphens=False))


def _leaves(file: ForeignFile, width: int, with_leaves: bool) -> str:
    listed = file.leaves
    more = len(listed) - _SHORT
    if not with_leaves and more > 1:
        listed = listed[:_SHORT]
    rows = [
        [
            leaf.path or _WHOLE,
            leaf.dtype,
            str(list(leaf.shape)),
            format_size(leaf.nbytes),
            leaf.note,
        ]
        for leaf in listed
    ]
    columns = [
        Column("TENSOR", elastic=True),
        Column("TYPE", elastic=True),
        Column("SHAPE", elastic=True),
        Column("SIZE", right=True),
        Column("NOTE", elastic=True),
    ]
    if not rows:
        return ""
    text = table(columns, rows, width)
    if len(listed) < len(file.leaves):
        text += f"\n… {plural(more, 'tensor')} more (--leaves shows all)"
    return text


def _values(file: ForeignFile) -> str:
    lines = [f"  {cut_text(path) or _WHOLE}: {text}" for path, text in file.values]
    more = len(lines) - _SHORT
    if more > 1:
        lines = [*lines[:_SHORT], f"  … {plural(more, 'line')} more (--json shows all)"]
    return "\n".join(["values", *map(shown, lines)])
