"""`holdfast ls`: a run's checkpoints, or the runs of a folder."""

from __future__ import annotations

import os.path
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from holdfast.cli.options import json_option, opened, whole_run
from holdfast.cli.render import (
    Column,
    checkpoint_json,
    ellipsis,
    metric_text,
    name_shown,
    plural,
    print_json,
    shown,
    shown_end,
    table,
    table_width,
    terminal_width,
    wrapped,
)
from holdfast.cli.runs import find_runs
from holdfast.core.address import short_ids
from holdfast.core.units import format_ago, format_size
from holdfast.errors import HoldfastError

if TYPE_CHECKING:
    from holdfast.manager.info import CheckpointInfo, RunStatus
    from holdfast.manager.mirror_status import MirrorStatus

# What one looks for is mostly among the newest; more than a screen of lines hides it.
_NEWEST = 30
# Longer names of metrics are cut, so that several fit beside the rest.
_METRIC_TITLE = 10
# Tags and notes may be cut to this for one more metric.
_SHORT_NOTE = 14
_GAP = 2


@click.command(
    short_help="List a run's checkpoints, or the runs of a folder.",
    epilog="""\b
Examples:
  holdfast ls runs/mnist
  holdfast ls runs                 # several runs: one line each
  holdfast ls runs/mnist --metric val_loss
  holdfast ls runs/mnist --all     # of a long run every checkpoint
  holdfast ls runs/mnist --json""",
)
@click.argument("address", metavar="[RUN|FOLDER]", default=".")
@click.option(
    "--metric", "metrics", multiple=True, metavar="NAME", help="Show this metric (repeatable)."
)
@click.option("--all", "everything", is_flag=True, help="Show every checkpoint of a long run.")
@json_option
def ls(address: str, metrics: tuple[str, ...], everything: bool, as_json: bool) -> None:
    """List a run's checkpoints, newest first, or the runs below a folder.

    Without an argument, the runs below the current folder. Of a long run it shows the
    newest, and older ones that are tagged, pinned or the best. SIZE is the whole
    state; NEW is what was written for it, the rest is shared with other checkpoints.
    A name like best:val_loss marks what that reference means now. If the run has a
    mirror, MIRROR says which checkpoints are there, too ("?": it does not answer).
    """
    address = whole_run(address)
    with opened(address) as run:
        found = run.overview(None if everything or as_json else _NEWEST)
        mirror = run.mirror_status() if found.count else None
    status = found.status
    if found.count:
        if as_json:
            rows = [{**checkpoint_json(info), **_mirrored(info, mirror)} for info in found.shown]
            said = {**status_json(status), **_mirror_json(mirror)}
            print_json({"ok": True, "run": address, **said, "checkpoints": rows})
        else:
            print(
                checkpoints_text(
                    found.shown,
                    metrics,
                    time.time(),
                    best=status.best,
                    ids=found.short_ids,
                    mirror=mirror,
                )
            )
            if left := found.count - len(found.shown):
                print(f"{ellipsis()} and {left:,} older (--all shows them)")
            print(status_text(found.count, status))
            if mirror is not None:
                print(mirror_text(mirror, found.all_ids))
        return
    addresses = find_runs(address)
    folder = os.path.expanduser(address)
    if not addresses or addresses == [folder]:  # itself, without a checkpoint
        with opened(address) as run:
            raise run.nothing()
    runs = [_summary(run) for run in addresses]
    if as_json:
        print_json({"ok": True, "folder": folder, "runs": runs})
    else:
        print(runs_text(folder, runs, time.time()))


def checkpoints_text(
    infos: Sequence[CheckpointInfo],
    wanted: Sequence[str],
    now_s: float,
    width: int | None = None,
    *,
    best: Mapping[str, str] = {},
    ids: Mapping[str, str] | None = None,
    mirror: MirrorStatus | None = None,
) -> str:
    """The table of `infos`, and a line about metrics that found no room.

    `best` says which id is the best by which metric; `ids` how each is written, if there are
    more checkpoints than these.
    """
    width = terminal_width() if width is None else width
    ids = short_ids([info.id for info in infos]) if ids is None else ids
    left_cells = [
        [
            f"{info.step:,}",
            format_ago(now_s - info.time_s),
            format_size(info.nbytes),
            # The packs' headers, too, are new; beside a small state they would look odd.
            format_size(min(info.new_bytes, info.nbytes)),
        ]
        for info in infos
    ]
    right_cells = [[note_text(info, best), ids[info.id]] for info in infos]
    left = [Column("STEP", right=True), Column("SAVED")]
    left += [Column("SIZE", right=True), Column("NEW", right=True)]
    if mirror is not None:
        left.append(Column("MIRROR"))
        for info, cells_of in zip(infos, left_cells, strict=True):
            cells_of.append({True: "yes", False: "no", None: "?"}[_is_in(info, mirror)])
    right = [Column("TAGS/NOTE", elastic=True), Column("ID")]

    taken = table_width(left, left_cells) + table_width(right[1:], [c[1:] for c in right_cells])
    taken += _GAP + min(_SHORT_NOTE, table_width(right[:1], [c[:1] for c in right_cells]) + _GAP)
    counts = Counter(name for info in infos for name in info.metrics)
    waiting = list(wanted) or sorted(counts, key=lambda name: (-counts[name], name))
    titles: list[Column] = []
    cells: list[list[str]] = [[] for _ in infos]
    while waiting:
        title = Column(_title(waiting[0]), right=True)
        values = [
            metric_text(info.metrics[waiting[0]]) if waiting[0] in info.metrics else ""
            for info in infos
        ]
        taken += _GAP + table_width([title], [[value] for value in values])
        if titles and taken > width:
            break
        titles.append(title)
        for row, value in zip(cells, values, strict=True):
            row.append(value)
        del waiting[0]
    rows = [[*a, *b, *c] for a, b, c in zip(left_cells, cells, right_cells, strict=True)]
    text = table([*left, *titles, *right], rows, width)
    if waiting:
        also = f"also logged: {', '.join(name_shown(name) for name in waiting[:8])}"
        also += f" and {len(waiting) - 8} more" if len(waiting) > 8 else ""
        text += "\n" + wrapped(f"{also} (--metric NAME)", indent=2, width=width)
    return text


def _title(metric: str) -> str:
    """The end of a long name says more than its start: `eval/…/val_loss`."""
    return shown_end(metric, _METRIC_TITLE)


def note_text(info: CheckpointInfo, best: Mapping[str, str]) -> str:
    """Tags, "best:metric" and pin, and in brackets what caused the save."""
    wins = [f"best:{metric}" for metric, id in best.items() if id == info.id]
    marks = ", ".join([*info.tags, *wins, *(["pinned"] if info.pinned else [])])
    said = info.note.partition("\n")[0]  # what follows is for programs
    note = f"({said})" if said and not (wins and said == "best") else ""
    return f"{marks} {note}".strip()


def status_json(status: RunStatus) -> dict[str, Any]:
    """The run as a whole, as JSON shows it."""
    return {
        "finished": status.finished,
        "writer": status.writer or None,
        "writer_alive": status.writer_alive,
        "stored_bytes": status.stored_bytes,
        "best": dict(status.best),
    }


def status_text(checkpoints: int, status: RunStatus) -> str:
    """The line below the table."""
    said = f"{plural(checkpoints, 'checkpoint')}, {format_size(status.stored_bytes)} stored"
    if status.finished:
        said += "; the run is finished"
    elif status.writer_alive:
        said += f"; {shown(status.writer)} is writing it"
    elif status.writer and status.writer_alive is None:
        said += f"; last written by {shown(status.writer)}, which did not close it"
    elif status.writer:
        said += "; its process is gone: start the job again"
    return said + "."


def _is_in(info: CheckpointInfo, mirror: MirrorStatus) -> bool | None:
    """None: the mirror did not say."""
    return None if mirror.ids is None else info.id in mirror.ids


def _mirrored(info: CheckpointInfo, mirror: MirrorStatus | None) -> dict[str, Any]:
    return {} if mirror is None else {"mirrored": _is_in(info, mirror)}


def _mirror_json(mirror: MirrorStatus | None) -> dict[str, Any]:
    if mirror is None:
        return {}
    count = None if mirror.ids is None else len(mirror.ids)
    return {"mirror": {"address": mirror.address, "checkpoints": count}}


def mirror_text(mirror: MirrorStatus, ids: Collection[str]) -> str:
    """The line about the mirror, below that of the run, which lists `ids`."""
    if mirror.ids is None:
        return f"mirror {shown(mirror.address)}: it does not answer."
    only_there = len(mirror.ids.difference(ids))
    more = f", {only_there:,} of them only there" if only_there else ""
    return f"mirror {shown(mirror.address)}: {plural(len(mirror.ids), 'checkpoint')}{more}."


def _state(run: Mapping[str, Any]) -> str:
    """One word for the column STATE."""
    if run["finished"]:
        return "finished"
    if run["writer_alive"]:
        return "running"
    return "interrupted" if run["writer_alive"] is False else ""


def _summary(address: str) -> dict[str, Any]:
    """One run of several. A damaged one does not hide the others."""
    try:
        with opened(address) as run:
            found = run.overview(1)
    except HoldfastError as error:
        return {"run": address, "error": error.message, "exit_code": error.exit_code}
    latest = checkpoint_json(found.shown[0]) if found.shown else None
    return {
        "run": address,
        "checkpoints": found.count,
        **status_json(found.status),
        "latest": latest,
    }


def runs_text(
    folder: str, runs: Sequence[dict[str, Any]], now_s: float, width: int | None = None
) -> str:
    """The table of runs, each by its path below `folder`."""
    rows: list[list[str]] = []
    for run in runs:
        if "error" in run:
            rows.append(
                [
                    os.path.relpath(run["run"], folder),
                    "",
                    "",
                    "",
                    "",
                    run["error"].splitlines()[0].rstrip(":"),
                ]
            )
            continue
        latest = run["latest"]
        rows.append(
            [
                os.path.relpath(run["run"], folder),
                str(run["checkpoints"]),
                f"{latest['step']:,}" if latest else "",
                format_ago(now_s - latest["time_s"]) if latest and latest["saved"] else "",
                format_size(latest["nbytes"]) if latest else "",
                _state(run),
            ]
        )
    columns = [
        Column("RUN", elastic=True, middle=True),
        Column("KEPT", right=True),
        Column("STEP", right=True),
        Column("SAVED"),
        Column("SIZE", right=True),
        Column("STATE", elastic=True),
    ]
    return f"{table(columns, rows, width)}\n{plural(len(runs), 'run')} in {shown(folder)}"
