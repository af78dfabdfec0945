"""Tables fit, escapes are shown, JSON has one shape."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.cli.ls import checkpoints_text, runs_text
from holdfast.cli.prune import decisions_text, freed_bytes
from holdfast.cli.render import (
    Column,
    checkpoint_json,
    cut,
    print_json,
    saved_at,
    shown,
    shown_end,
    table,
    terminal_width,
    wrapped,
)
from holdfast.cli.show import _metrics
from holdfast.cli.verify import results_text
from holdfast.core.address import available
from holdfast.core.digest import digest
from holdfast.core.retention import decide, parse_keep
from holdfast.manager.info import CheckpointInfo, Verification, info_of
from tests.core.policy_records import record

HOSTILE = "\x1b[31mred\x1b]0;title\x07\r\n\u202eevil\u2066\u200b\x7f\x9b2J"


def info(step: int, **changes: object) -> CheckpointInfo:
    plain = CheckpointInfo(
        address="runs/x",
        id=digest(str(step).encode()),
        step=step,
        ordinal=step,
        time_s=1000.0,
        nbytes=1_230_000_000,
        new_bytes=45_600,
        metrics={},
        tags=(),
        pinned=False,
        note="",
        pickled=False,
    )
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def cells(line: str) -> int:
    return sum(
        0
        if unicodedata.category(c) in ("Mn", "Me")
        else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in line
    )


# -- escapes ------------------------------------------------------------------


def test_escapes_are_shown_not_obeyed() -> None:
    assert shown(HOSTILE) == (
        r"\x1b[31mred\x1b]0;title\x07\x0d\x0a\u202eevil\u2066\u200b\x7f\x9b2J"
    )
    assert shown("Größe 日本") == "Größe 日本"
    assert shown("\ud800\U000e0001") == r"\ud800\U000e0001"


def test_marks_do_not_pile_up() -> None:
    assert (
        shown("e\u0301\u0302\u0303\u0304\u0489\u0301") == "e\u0301\u0302\u0303\u0304\\u0489\\u0301"
    )
    assert shown("\u0301\u0302e\u0301") == "\\u0301\\u0302e\u0301"  # not on the title's blank


def test_what_the_encoding_lacks_is_escaped_before_it_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    rows = [["größe", "1"], ["重み" * 20, "2"], ["x", "3"]]
    text = table([Column("NAME", elastic=True), Column("N")], rows, 30)
    assert text.isascii()
    assert [line.rindex("  ") for line in text.split("\n")] == [27, 27, 27, 27]
    assert text.split("\n")[2] == r"\u91cd\u307f\u91cd\u307f..  2".replace("..", "...")


def test_columns_says_how_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert terminal_width() == 80
    for said, width in (("60", 60), ("10", 40), ("1000", 160), ("wide", 80), ("", 80)):
        monkeypatch.setenv("COLUMNS", said)
        assert terminal_width() == width


def test_a_name_of_a_megabyte_floods_no_page() -> None:
    names = {f"{i}{'long' * 250_000}\x1b": float(i) for i in range(100)}
    wordy = info(1, metrics=names, tags=("t" * 64,), note="n")
    page = checkpoints_text([wordy], [], 1000.0, 80)
    assert len(page) < 2000
    assert all(cells(line) <= 80 for line in page.split("\n"))
    assert len(_metrics(names)) < 2000
    assert "and 76 more (--json shows all)" in _metrics(names)
    records = [record(1, metrics=names)]
    assert len(available(records)) < 1000
    assert available(records).isprintable()


def test_of_a_note_the_first_line_is_shown() -> None:
    """Programs write more behind it, for themselves."""
    page = checkpoints_text([info(1, note="model, attempt 2\n{1: 2}")], [], 1000.0, 80)
    assert "(model, attempt 2)" in page
    assert "{1" not in page


@given(st.text())
def test_what_is_shown_is_printable(text: str) -> None:
    assert shown(text).isprintable()


def test_every_table_escapes_what_a_store_says() -> None:
    hostile = info(1, tags=(HOSTILE,), note=HOSTILE, metrics={HOSTILE: 1.0, HOSTILE + "2": 2.0})
    pages = [
        checkpoints_text([hostile], [], 1000.0, 200),
        checkpoints_text([hostile], [HOSTILE], 1000.0),
        results_text([Verification(hostile, False, (HOSTILE,), 0)]),
        runs_text("runs", [{"run": f"runs/{HOSTILE}", "error": HOSTILE}], 0.0),
        decisions_text(
            decide(
                [record(1, tags=[HOSTILE], pins=[HOSTILE], metrics={HOSTILE: 1.0}), record(2)],
                parse_keep("last=1"),
            ),
            dry_run=True,
            now_s=0.0,
        ),
    ]
    for page in pages:
        assert all(line.isprintable() for line in page.split("\n")), page
        assert r"\x1b[" in page or "…" in page


# -- tables -------------------------------------------------------------------

CELLS = st.text(st.characters(codec="utf-8"), max_size=60)


@given(st.lists(st.tuples(CELLS, CELLS, CELLS), max_size=5), st.integers(20, 120))
def test_no_line_is_wider_than_asked(rows: list[tuple[str, str, str]], width: int) -> None:
    columns = [Column("ONE", right=True), Column("TWO", elastic=True, middle=True), Column("日本")]
    text = table(columns, rows, width)
    assert all(cells(line) <= width for line in text.split("\n"))
    assert len(text.split("\n")) == len(rows) + 1


def test_only_elastic_columns_are_cut_while_they_can_be() -> None:
    text = table(
        [Column("KEY"), Column("LONG", elastic=True), Column("N", right=True)],
        [["a" * 20, "b" * 100, "7"], ["c", "d", "12"]],
        40,
    )
    assert text.split("\n") == [
        "KEY                   LONG             N",
        "aaaaaaaaaaaaaaaaaaaa  bbbbbbbbbbbbb…   7",
        "c                     d               12",
    ]


def test_a_path_is_cut_in_the_middle() -> None:
    rows = [["start/task/179572..179571/main", "2"], ["start/task/179572..179571/loop", "14"]]
    assert table([Column("RUN", elastic=True, middle=True), Column("N")], rows, 24).split("\n") == [
        "RUN                   N",
        "start/task…9571/main  2",
        "start/task…9571/loop  14",
    ]


def test_empty_columns_are_left_out() -> None:
    assert table([Column("A"), Column("B"), Column("C")], [["1", "", "2"]], 80) == "A  C\n1  2"


def test_cut() -> None:
    assert cut("abc", 3) == "abc"
    assert cut("abcd", 3) == "ab…"
    assert cut("日本語", 4) == "日…"
    assert shown_end("evaluation/val_loss", 9) == "…val_loss"
    assert shown_end("日本語日本語", 6) == "…本語"
    assert wrapped("one two/three-four five", indent=2, width=10) == "one\n  two/three-four\n  five"


@pytest.mark.parametrize("metrics", [0, 1, 5, 30])
def test_ls_fits_80_columns(metrics: int) -> None:
    infos = [
        info(
            step,
            metrics={f"evaluation/metric_{i}": -1.2345e-10 for i in range(metrics)},
            tags=("a-long-tag-name", "another-long-tag-name"),
            pinned=True,
            note="every=10000",
            time_s=1000.0 - step * 86400,
        )
        for step in (12_345_678, 9)
    ]
    lines = checkpoints_text(infos, [], 1000.0, 80).split("\n")
    assert all(cells(line) <= 80 for line in lines)
    assert lines[0].startswith("      STEP  SAVED")
    assert lines[0].endswith("ID")
    if metrics == 30:
        assert lines[3].startswith("also logged: evaluation/metric_")
        assert "more (--metric NAME)" in " ".join(lines[3:])


def test_ls_page() -> None:
    infos = [
        info(41200, metrics={"val_loss": 0.231, "acc": 0.91}, tags=("gold",), note="every=10min"),
        info(40000, metrics={"val_loss": math.nan}, pinned=True, time_s=1000.0 - 3 * 3600),
    ]
    assert checkpoints_text(infos, [], 1000.0 + 185, 100) == (
        "  STEP  SAVED         SIZE      NEW  val_loss   acc  TAGS/NOTE           ID\n"
        "41,200  3 min ago  1.23 GB  45.6 KB     0.231  0.91  gold (every=10min)  "
        f"{infos[0].id[:8]}\n"
        f"40,000  3 h ago    1.23 GB  45.6 KB       nan        pinned              "
        f"{infos[1].id[:8]}"
    )


def test_ls_does_not_call_more_new_than_there_is() -> None:
    """Headers of packs are new, too, but no part of the state."""
    page = checkpoints_text([info(1, nbytes=1000, new_bytes=5000)], [], 1000.0, 80)
    assert page.split("\n")[1].split() == ["1", "now", "1.00", "KB", "1.00", "KB", digest(b"1")[:8]]


# -- prune --------------------------------------------------------------------


def test_prune_page() -> None:
    records = [record(s, time_s=940.0, metrics={"loss": float(s)}) for s in (1, 2, 3, 4)]
    decisions = decide(records, parse_keep("last=2 best=1:loss"))
    page = decisions_text(decisions, dry_run=True, now_s=1000.0, width=80)
    ids = [r.id[:8] for r in records]
    assert page == (
        "ACTION  STEP  SAVED       SIZE  ID        WHY\n"
        f"keep       4  1 min ago  100 B  {ids[3]}  newest, last=2\n"
        f"keep       3  1 min ago  100 B  {ids[2]}  last=2\n"
        f"remove     2  1 min ago  100 B  {ids[1]}  no rule keeps it\n"
        f"keep       1  1 min ago  100 B  {ids[0]}  best=1:loss (1)\n"
        "Would remove 1 checkpoint, keep 3, free 100 B."
    )
    done = decisions_text(decisions, dry_run=False, now_s=1000.0, width=80)
    assert done == (
        "STEP  SAVED       SIZE  ID        WHY\n"
        f"   2  1 min ago  100 B  {ids[1]}  no rule keeps it\n"
        "Removed 1 checkpoint, kept 3, freed 100 B."
    )


def test_reasons_go_on_below_where_they_do_not_fit() -> None:
    tags = [f"release-candidate-{i}" for i in range(5)]
    decisions = decide([record(1, time_s=0.0, tags=tags), record(2)], parse_keep("last=1"))
    page = decisions_text(decisions, dry_run=True, now_s=60.0, width=80)
    why = " ".join(line[42:].strip() for line in page.split("\n")[2:-1])
    assert why == ", ".join(f"tag {tag}" for tag in tags)
    assert all(len(line) <= 80 for line in page.split("\n"))


@pytest.mark.parametrize("width", [40, 50, 60, 80])
def test_no_reason_is_cut_however_narrow(width: int) -> None:
    records = [record(41_000 + i, tags=["a-tag"], pins=["used in the report"]) for i in range(3)]
    decisions = decide(records, parse_keep("last=1"))
    page = decisions_text(decisions, dry_run=True, now_s=1e9, width=width)
    lines = page.split("\n")
    assert all(cells(line) <= width for line in lines[:-1])
    assert "…" not in page
    assert page.count("report") == 3
    assert ("SAVED" in lines[0]) == (width == 80)


def test_freed_bytes_count_packs_that_no_one_else_needs() -> None:
    records = [
        record(1, packs={"shared": 100, "one": 7}),
        record(2, packs={"shared": 100, "one": 7, "two": 5}),
        record(3, packs={"shared": 100}),
    ]
    assert freed_bytes(decide(records, parse_keep("last=1"))) == 12
    assert freed_bytes(decide(records, parse_keep("last=9"))) == 0


# -- JSON ---------------------------------------------------------------------


def test_json_is_ascii_and_strict(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"ok": True, "text": HOSTILE, "lone": "\ud800"})
    out = capsys.readouterr().out
    assert out.isascii()
    assert "\x7f" not in out
    assert "\x1b" not in out
    assert json.loads(out)["text"] == HOSTILE


def test_checkpoint_json_names_odd_metrics_apart() -> None:
    value = checkpoint_json(info(7, metrics={"a": 1.5, "b": math.nan, "c": -math.inf}))
    assert value["metrics"] == {"a": 1.5}
    assert value["odd_metrics"] == {"b": "nan", "c": "-inf"}
    assert value["ref"] == "runs/x@7"
    assert value["saved"] == "1970-01-01T00:16:40+00:00"
    json.dumps(value, allow_nan=False)


def test_times_that_no_calendar_has() -> None:
    for time_s in (1e300, -1e300, math.nan, math.inf):
        assert saved_at(time_s) is None
        value = checkpoint_json(info(1, time_s=time_s))
        json.dumps(value, allow_nan=False)
        assert len(checkpoints_text([info(1, time_s=time_s)], [], 0.0, 80).split("\n")[1]) <= 80


def test_records_and_infos_render_alike() -> None:
    r = record(5, metrics={"loss": 0.5}, odd_metrics={"acc": "nan"}, pins=("runs/child",))
    value = checkpoint_json(info_of("runs/x", r))
    assert value["pinned"] is True
    assert value["odd_metrics"] == {"acc": "nan"}
