"""The card as a page: one file of HTML that asks for nothing else, light or dark as its reader is.

Pure: what it says is given, the time too.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from holdfast.core.units import format_seconds, format_size
from holdfast.metaflow.card_chart import Point, clock, timeline

ROWS = 50
"""Of the table: a page that is looked at in a browser's corner, and sent again and again."""
_MAX_LINES = 5
_MAX_TEXT = 120


@dataclass(frozen=True)
class Row:
    """One checkpoint that is kept."""

    version: int
    name: str
    attempt: int
    time_s: float
    nbytes: int
    new_bytes: int
    seconds: float | None
    """From the call to the durable checkpoint; None: another process has saved it."""
    metadata: Mapping[str, Any]
    marks: tuple[str, ...] = ()
    """"best:loss", a tag, "loaded, verified"."""


@dataclass(frozen=True)
class Start:
    """What the task has gone on from, every byte of it verified."""

    url: str
    pathspec: str
    attempt: int
    nbytes: int
    seconds: float


@dataclass(frozen=True)
class Story:
    """What one card says."""

    pathspec: str
    attempt: int
    state: str
    """"running", "finished", "failed"."""
    now_s: float
    start: Start | None = None
    passed_over: tuple[str, ...] = ()
    """Damaged checkpoints, as lines for people."""
    failures: tuple[str, ...] = ()
    """Saves that failed, as lines for people, the oldest first."""
    saves: int = 0
    """Of this attempt."""
    points: Sequence[Point] = ()
    rows: Sequence[Row] = ()
    """Newest first."""
    url: str = ""
    """Of the newest checkpoint."""
    kept: int = 0
    committed: int = 0
    """Ever; those that are not kept were removed."""
    keep: str = ""
    nbytes: int = 0
    """Of all that are kept, each counted whole."""
    stored_bytes: int = 0
    """What they take in the store."""


def page(story: Story) -> str:
    """The whole document."""
    body = "\n".join(
        part
        for part in (
            _head(story),
            _start(story),
            _list("Saves that failed", story.failures, story.failures[-_MAX_LINES:]),
            _tiles(story),
            timeline(story.points),
            _table(story),
            _restore(story),
        )
        if part
    )
    return _DOCUMENT.format(title=escape(story.pathspec), style=_STYLE, body=body)


def _head(story: Story) -> str:
    return (
        f'<header><h1>Checkpoints of <b class="path">{escape(story.pathspec)}</b></h1>'
        f'<p><span class="state {story.state}">{story.state}</span> attempt {story.attempt}, '
        f"as of {clock(story.now_s)} UTC</p></header>"
    )


def _start(story: Story) -> str:
    passed = _list("Damaged, and passed over", story.passed_over, story.passed_over[:_MAX_LINES])
    start = story.start
    if start is None:
        went_on = "Began with nothing loaded."
    else:
        went_on = (
            f'Went on from <code>{escape(start.url)}</code>, saved by <b class="path">'
            f"{escape(start.pathspec)}</b> in attempt {start.attempt}: "
            f"{format_size(start.nbytes)} in {format_seconds(start.seconds)}, "
            "every byte verified."
        )
    return f"{passed}<p>{went_on}</p>"


def _list(title: str, lines: Sequence[str], shown: Sequence[str]) -> str:
    if not lines:
        return ""
    rest = f"<li>and {len(lines) - len(shown):,} more</li>" if len(lines) > len(shown) else ""
    items = "".join(f"<li>{escape(line)}</li>" for line in shown)
    return f'<section class="bad"><h2>{title}</h2><ul>{items}{rest}</ul></section>'


def _tiles(story: Story) -> str:
    removed = story.committed - story.kept
    rule = f"keep={escape(story.keep)}" if story.keep else "all are kept"
    shared = "none"
    if 0 < story.stored_bytes < story.nbytes:
        shared = f"{story.nbytes / story.stored_bytes:.1f} &times;"
    tiles = (
        ("saved in this attempt", f"{story.saves:,}", ""),
        ("kept", f"{story.kept:,}", f"{removed:,} removed, {rule}" if removed else rule),
        ("in the checkpoints", format_size(story.nbytes), "each counted whole"),
        ("stored", format_size(story.stored_bytes), "what is equal is stored once"),
        ("deduplication", shared, ""),
    )
    return (
        '<dl class="tiles">'
        + "".join(
            f"<div><dt>{name}</dt><dd>{value}</dd><p>{more}</p></div>"
            for name, value, more in tiles
        )
        + "</dl>"
    )


_COLUMNS = ("save", "name", "attempt", "saved (UTC)", "size", "new", "took", "metadata", "")


def _table(story: Story) -> str:
    if not story.rows:
        return "<p>Nothing has been saved yet.</p>"
    shown = story.rows[:ROWS]
    head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
    body = "".join(f"<tr>{_cells(row)}</tr>" for row in shown)
    rest = story.kept - len(shown)
    more = f"<p>and {rest:,} that are older: <code>holdfast ls</code></p>" if rest > 0 else ""
    return (
        '<section><h2>Checkpoints</h2><div class="wide"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{more}</section>"
    )


def _cells(row: Row) -> str:
    marks = "".join(f'<span class="mark">{escape(mark)}</span> ' for mark in row.marks)
    took = "" if row.seconds is None else format_seconds(row.seconds)
    cells = (
        ("n", f"{row.version:,}"),
        ("", escape(_short(row.name))),
        ("n", f"{row.attempt:,}"),
        ("n", clock(row.time_s)),
        ("n", format_size(row.nbytes)),
        ("n", format_size(row.new_bytes)),
        ("n", took),
        ("meta", escape(_short(_pairs(row.metadata.items())))),
        ("", marks),
    )
    return "".join(f'<td class="{kind}">{text}</td>' for kind, text in cells)


def _pairs(items: Iterable[tuple[str, Any]]) -> str:
    return ", ".join(
        f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in items
    )


def _short(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "…"


def _restore(story: Story) -> str:
    if not story.url:
        return ""
    command = f"holdfast restore {shlex.quote(story.url)} out"
    return (
        "<section><h2>Bring one back</h2>"
        f"<pre>{escape(command)}</pre><p>writes the newest into <code>out/files/files</code>, on "
        "any machine, without Metaflow; another number after the @ another one.</p></section>"
    )


_DOCUMENT = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Checkpoints of {title}</title>
<style>{style}</style>
</head>
<body>
<main class="holdfast">
{body}
</main>
</body>
</html>
"""

# All below one class: a notebook puts the page into its own.
_STYLE = """
.holdfast {
  color-scheme: light dark;
  --line: #d9dde3; --soft: #57606a; --old: #b9c9e6; --new: #2f5fb3; --bad: #b3261e;
  --good: #1f7a3d;
  background: Canvas; color: CanvasText;
  font: 14px/1.45 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem;
}
@media (prefers-color-scheme: dark) {
  .holdfast {
    --line: #3a414b; --soft: #9aa4b1; --old: #3d5378; --new: #84aef5; --bad: #ff8a80;
    --good: #6fd08c;
  }
}
.holdfast h1 { font-size: 1.25rem; font-weight: 400; margin: 0; }
.holdfast h2 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
.holdfast p { margin: .4rem 0; }
.holdfast .path, .holdfast code, .holdfast pre { overflow-wrap: anywhere; }
.holdfast code, .holdfast pre { font: .92em ui-monospace, monospace; }
.holdfast pre {
  white-space: pre-wrap; border: 1px solid var(--line); border-radius: 4px; padding: .6rem;
  margin: 0; user-select: all;
}
.holdfast .state { font-weight: 600; }
.holdfast .finished { color: var(--good); }
.holdfast .failed, .holdfast .bad h2 { color: var(--bad); }
.holdfast .bad ul { margin: 0; padding-left: 1.2rem; overflow-wrap: anywhere; }
.holdfast .tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .6rem;
  margin: 1rem 0;
}
.holdfast .tiles div { border: 1px solid var(--line); border-radius: 4px; padding: .5rem .7rem; }
.holdfast dt, .holdfast .tiles p, .holdfast .track p, .holdfast .ends { color: var(--soft); }
.holdfast dt, .holdfast .tiles p, .holdfast .track p, .holdfast .ends { font-size: .85rem; }
.holdfast dt, .holdfast .tiles p { margin: 0; }
.holdfast dd { margin: 0; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.holdfast .track { margin: .6rem 0 0; }
.holdfast .track p, .holdfast .ends { display: flex; justify-content: space-between; margin: 0; }
.holdfast svg { display: block; width: 100%; height: 3.2rem; border-bottom: 1px solid var(--line); }
.holdfast svg path { fill: none; vector-effect: non-scaling-stroke; stroke-width: 3; }
.holdfast svg .old { stroke: var(--old); }
.holdfast svg .new { stroke: var(--new); }
.holdfast svg .attempt { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 3 3; }
.holdfast svg .metric { stroke: var(--new); stroke-width: 1.5; }
.holdfast .wide { overflow-x: auto; }
.holdfast table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
.holdfast th, .holdfast td {
  border-bottom: 1px solid var(--line); padding: .25rem .8rem .25rem 0; text-align: left;
  vertical-align: top;
}
.holdfast th { color: var(--soft); font-weight: 400; }
.holdfast .n { white-space: nowrap; }
.holdfast .meta { overflow-wrap: anywhere; min-width: 10rem; }
.holdfast .mark { color: var(--good); white-space: nowrap; }
"""
