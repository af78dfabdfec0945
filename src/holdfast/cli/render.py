"""From values to text: tables that fit the terminal, JSON of one shape, escapes.

Tags, metric names, leaf paths and notes come from a store, which anyone may have
written: whatever is not printable is shown as an escape and never reaches the terminal.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from holdfast.core.units import format_ago

if TYPE_CHECKING:
    from holdfast.errors import HoldfastError
    from holdfast.manager.doctor import Finding
    from holdfast.manager.info import CheckpointInfo

WIDTH = 80
_WIDEST = 160
_MOST_MARKS = 4  # on one letter: more than any script needs
_NAME_WIDTH = 60
_GAP = "  "


def shown(text: str) -> str:
    r"""`text` with control, format (bidi, zero width) and other unprintable characters escaped,
    and those that stdout's encoding lacks.

    So are combining marks without a letter below them, and piles of them, which would be
    drawn over the lines above and below.

    >>> shown("a\x1b[31mb\u202ec")
    'a\\x1b[31mb\\u202ec'
    """
    if text.isascii() and text.isprintable():
        return text
    said: list[str] = []
    pile = _MOST_MARKS
    for char in text:
        pile = pile + 1 if _is_mark(char) else 0
        said.append(char if char.isprintable() and pile <= _MOST_MARKS else _escape(ord(char)))
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return "".join(said).encode(encoding, "backslashreplace").decode(encoding)


def _is_mark(char: str) -> bool:
    return unicodedata.category(char) in ("Mn", "Me")


def ellipsis() -> str:
    """Where something was left out: "…", or "..." where stdout's encoding has none."""
    return "…" if shown("…") == "…" else "..."


def _escape(code: int) -> str:
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


# -- tables -------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A column of a table. An `elastic` one is cut first when the table is too wide; one of
    paths in the `middle`."""

    title: str
    right: bool = False
    elastic: bool = False
    middle: bool = False


def terminal_width() -> int:
    """Columns to use: what COLUMNS says, else the terminal's, or 80 where there is none."""
    if not sys.stdout.isatty() and not os.environ.get("COLUMNS"):
        return WIDTH
    return max(40, min(_WIDEST, shutil.get_terminal_size((WIDTH, 24)).columns))


def table(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int | None = None
) -> str:
    """`rows` under `columns`' titles, each cell escaped, no line wider than `width`.

    Columns that are empty in every row are left out.
    """
    width = terminal_width() if width is None else width
    columns, cells, widths = _measured(columns, rows)
    spare = width - len(_GAP) * (len(columns) - 1)
    while sum(widths) > spare:
        # Cut the widest elastic column; where they are narrow already, any other.
        elastic = [i for i, c in enumerate(columns) if c.elastic and widths[i] > 8]
        widest = max(elastic or range(len(columns)), key=lambda i: widths[i])
        if widths[widest] <= 1:
            break
        widths[widest] -= 1
    return "\n".join(
        _GAP.join(
            _fit(cell, width, column)
            for cell, width, column in zip(row, widths, columns, strict=True)
        ).rstrip()
        for row in cells
    )


def table_width(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> int:
    """How wide `table` would be if nothing were cut."""
    widths = _measured(columns, rows)[2]
    return sum(widths) + len(_GAP) * max(0, len(widths) - 1)


def _measured(
    columns: Sequence[Column], rows: Sequence[Sequence[str]]
) -> tuple[list[Column], list[list[str]], list[int]]:
    """The columns that are not empty, their escaped cells (titles first), their widths."""
    used = [i for i in range(len(columns)) if not rows or any(row[i] for row in rows)]
    cells = [[shown(columns[i].title) for i in used]]
    cells += [[shown(row[i]) for i in used] for row in rows]
    widths = [max(_cells(row[i]) for row in cells) for i in range(len(used))]
    return [columns[i] for i in used], cells, widths


def _cells(text: str) -> int:
    """Columns that `text` takes: East Asian wide ones two, combining ones none."""
    if text.isascii():
        return len(text)
    return sum(map(_char_cells, text))


def _char_cells(char: str) -> int:
    if _is_mark(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _fit(text: str, width: int, column: Column) -> str:
    if _cells(text) > width:
        text = _cut_middle(text, width) if column.middle else cut(text, width)
    padding = " " * (width - _cells(text))
    return padding + text if column.right else text + padding


def _cut_middle(text: str, width: int) -> str:
    end, mark = shown_end(text, width // 2), ellipsis()
    return cut(text, width - _cells(end) + len(mark)) + end.removeprefix(mark)


def cut(text: str, width: int) -> str:
    """The start of `text`, with "…" where more would follow, in at most `width` columns."""
    if _cells(text) <= width:
        return text
    mark = ellipsis()[:width]
    kept, taken = 0, 0
    for char in text:
        taken += _char_cells(char)
        if taken > width - len(mark):
            break
        kept += 1
    return text[:kept] + mark


def shown_end(text: str, width: int) -> str:
    """The end of `text`, escaped, in at most `width` columns."""
    text = shown(text)
    if _cells(text) <= width:
        return text
    mark = ellipsis()
    kept, taken = len(text), len(mark)
    while kept and (taken := taken + _char_cells(text[kept - 1])) <= width:
        kept -= 1
    return mark + text[kept:]


def name_shown(text: str) -> str:
    """A name in a sentence: escaped, and cut where it is longer than any sane one."""
    return cut(shown(text), _NAME_WIDTH)


def wrapped(text: str, *, indent: int = 0, width: int | None = None) -> str:
    """`text`, escaped, on lines that fit, all but the first indented.

    A word is never broken: it may be a path, which is to be copied.
    """
    lines = wrap(
        shown(text),
        terminal_width() if width is None else width,
        subsequent_indent=" " * indent,
        break_on_hyphens=False,
        break_long_words=False,
    )
    return "\n".join(lines)


# -- values -------------------------------------------------------------------


def saved_at(time_s: float) -> str | None:
    """ISO 8601 in UTC; None if a store claims a time that no calendar has."""
    try:
        return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="seconds")
    except (OverflowError, OSError, ValueError):
        return None


def saved_text(time_s: float, now_s: float) -> str:
    """How long ago, and when in UTC."""
    at = saved_at(time_s)
    when = at.replace("T", " ").replace("+00:00", " UTC") if at else "no valid time"
    return f"{format_ago(now_s - time_s)} ({when})"


def metric_text(value: float) -> str:
    """
    >>> metric_text(0.23109), metric_text(float("nan"))
    ('0.2311', 'nan')
    """
    return f"{value:.4g}"


def checkpoint_json(info: CheckpointInfo) -> dict[str, Any]:
    """A checkpoint as every command's JSON shows it."""
    return {
        "ref": info.ref,
        "id": info.id,
        "step": info.step,
        "ordinal": info.ordinal,
        "time_s": info.time_s if math.isfinite(info.time_s) else None,
        "saved": saved_at(info.time_s),
        "nbytes": info.nbytes,
        "new_bytes": info.new_bytes,
        "metrics": {k: v for k, v in info.metrics.items() if math.isfinite(v)},
        "odd_metrics": {k: str(v) for k, v in info.metrics.items() if not math.isfinite(v)},
        "tags": list(info.tags),
        "pinned": info.pinned,
        "note": info.note,
        "pickled": info.pickled,
    }


def kept_by(info: CheckpointInfo) -> str:
    """What becomes of a checkpoint that has lost a tag or a pin."""
    if info.pinned:
        return "its pin keeps it"
    if info.tags:
        return f"its tag {info.tags[0]} keeps it"
    return "the rules decide about it"


def error_json(error: HoldfastError | None) -> dict[str, Any]:
    """What an error adds to a command's JSON; nothing for none."""
    if error is None:
        return {}
    return {"error": error.message, "hint": error.hint, "exit_code": error.exit_code}


def findings_json(findings: Sequence[Finding]) -> list[dict[str, str]]:
    """What `doctor` and `verify` found out, as JSON has it."""
    return [{"check": f.check, "state": f.state, "what": f.what, "do": f.do} for f in findings]


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on stdout, in ASCII, so that no terminal obeys what is in it."""
    text = json.dumps(value, indent=2, ensure_ascii=True, allow_nan=False, default=str)
    print(text.replace("\x7f", "\\u007f"))  # DEL is ASCII, and JSON does not escape it


def plural(number: int, noun: str) -> str:
    """
    >>> plural(1, "checkpoint"), plural(1200, "checkpoint")
    ('1 checkpoint', '1,200 checkpoints')
    """
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
