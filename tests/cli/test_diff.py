"""`holdfast diff`: the page, the JSON, the exit status."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import holdfast
from holdfast.cli.diff import DIFFERENT, comparison_text
from holdfast.core.records import Leaf
from holdfast.manager.comparison import Apart, Comparison, Difference, Part, Side
from tests.cli.conftest import Clock, Command, failed, same_error_as_json, tidy
from tests.cli.test_render import HOSTILE, cells, info


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two runs of one step and one state of the random generators."""
    addresses = tmp_path / "one", tmp_path / "two"
    generators = np.random.get_state()
    for address, last in zip(addresses, (1.0, np.nan), strict=True):
        with holdfast.CheckpointManager(address, keep=None, clock=Clock()) as manager:
            w = np.ones(4, np.float32)
            same = {"model": {"w": w, "frozen": np.arange(50)}, "epoch": 1}
            manager.save(1, same, metrics={"loss": 1.0}).result()
            np.random.set_state(generators)
            changed = w.copy()
            changed[0], changed[3] = 3.5 if last == 1.0 else 1.0, last
            state = {"model": {"w": changed, "frozen": np.arange(50)}, "epoch": 2}
            manager.save(2, state | {"extra": {"a": 1}} if last == 1.0 else state).result()
            np.random.set_state(generators)
    return addresses


def test_equal(pair: tuple[Path, Path], holdfast_cli: Command) -> None:
    a, b = pair
    done = holdfast_cli("diff", f"{a}@1", f"{b}@1")
    assert (done.status, done.err) == (0, "")
    page = re.sub(r"saved .*\)", "saved …", tidy(done.out, a, b))
    assert page == (
        "a  A@1, id <id>, saved …\n"
        "b  B@1, id <id>, saved …\n"
        "\n"
        "The same training state, bit for bit: 2 leaves and 1 value, position, random\n"
        "states.\n"
    )


def test_different(pair: tuple[Path, Path], holdfast_cli: Command) -> None:
    a, b = pair
    done = holdfast_cli("diff", f"{a}@2", f"{b}@2")
    assert (done.status, done.err) == (DIFFERENT, "")
    page = re.sub(r"saved .*\)", "saved …", tidy(done.out, a, b))
    assert page == (
        "a  A@2, id <id>, saved …\n"
        "b  B@2, id <id>, saved …\n"
        "\n"
        "The first difference: model/w (values).\n"
        "\n"
        "STATE  LEAVES  EQUAL  DIFFER\n"
        "model       2      1       1\n"
        "\n"
        "state\n"
        "CHANGE  PATH     A\n"
        "values  model/w  F32[4]\n"
        "only a  extra/a  1\n"
    )
    page = holdfast_cli("diff", f"{a}@2", f"{b}@2", "--values").out
    assert page.endswith(
        "state\n"
        "CHANGE  PATH     A       UNEQUAL  MAX |A-B|  NAN IN ONE\n"
        "values  model/w  F32[4]   2 of 4        2.5           1\n"
        "only a  extra/a  1\n"
    )


def test_steps_and_metrics(pair: tuple[Path, Path], holdfast_cli: Command) -> None:
    a, _ = pair
    done = holdfast_cli("diff", f"{a}@1", f"{a}@2")
    assert done.status == DIFFERENT
    assert "The steps differ: 1 and 2.\nThe first difference: model/w (values).\n" in done.out
    assert done.out.endswith("metrics\nCHANGE  PATH  A\nonly a  loss  1.0\n")


def test_json(pair: tuple[Path, Path], holdfast_cli: Command) -> None:
    a, b = pair
    done = holdfast_cli("diff", f"{a}@2", f"{b}@2", "--values", "--json")
    assert done.status == DIFFERENT
    value = done.json
    assert (value["ok"], value["equal"]) == (True, False)
    assert (value["a"]["ref"], value["b"]["ref"]) == (f"{a}@2", f"{b}@2")
    assert value["parts"] == [
        {"name": "model", "leaves": 2, "equal": 1, "differ": 1, "only_a": 0, "only_b": 0}
    ]
    shape = {"dtype": "F32", "shape": [4]}
    assert value["differences"] == [
        {
            "section": "state",
            "kind": "values",
            "path": "model/w",
            "a": shape,
            "b": shape,
            "unequal": 2,
            "elements": 4,
            "max_abs": 2.5,
            "nan_in_one": 1,
        },
        {"section": "state", "kind": "only a", "path": "extra/a", "a": 1, "b": None},
    ]
    same = holdfast_cli("diff", f"{a}@1", f"{b}@1", "--json")
    assert (same.status, same.json["equal"], same.json["differences"]) == (0, True, [])


def test_an_error_is_no_difference(pair: tuple[Path, Path], holdfast_cli: Command) -> None:
    a, b = pair
    assert "no checkpoint at step 7" in failed(holdfast_cli("diff", f"{a}@1", f"{b}@7"), 1)
    assert "no checkpoint in" in failed(holdfast_cli("diff", a, b.parent / "none"), 10)
    assert same_error_as_json(holdfast_cli, "diff", a, b.parent / "none")["exit_code"] == 10


def test_ten_thousand_differences(tmp_path: Path, holdfast_cli: Command) -> None:
    with holdfast.CheckpointManager(tmp_path / "run", keep=None) as manager:
        for step in (1, 2):
            state = {"model": {f"layer.{i}": np.full(2, step) for i in range(3000)}}
            manager.save(step, state).result()
    words = ["diff", f"{tmp_path}/run@1", f"{tmp_path}/run@2"]
    page = holdfast_cli(*words).out
    assert len(page.splitlines()) < 45
    assert re.search(r"^model +3,000 +3,000$", page, re.MULTILINE)
    assert "… 2,976 more (--all shows them)\n" in page
    assert "layer.2999" in holdfast_cli(*words, "--all").out
    assert len(holdfast_cli(*words, "--json").json["differences"]) == 3000


def everything(text: str) -> Comparison:
    """Each kind of difference, with `text` wherever a store can have a text."""
    leaf = Leaf(text, "F32", (1000, 1000, 1000), ())
    sides = Side({"!": "array", "dtype": text}, leaf), Side(text)
    named = Side({"!": "dict", "v": [[text, text]]})
    return Comparison(
        info(1, address=text, tags=(text,)),
        info(2, address=text),
        (
            Difference("state", "values", text, sides[0], sides[0], Apart(10**9, 10**9, 1e-30, 7)),
            Difference("state", "type", text, *sides),
            Difference("state", "only a", text, named, None),
            Difference("random states", "values", text, None, None),
            Difference("metrics", "value", text, Side(text), Side(text)),
            Difference("config", "only b", text, None, Side({text: text})),
        ),
        (Part(text, 5, 1, 1, 1, 1),),
        5,
        2,
    )


def test_a_page_escapes_and_fits() -> None:
    page = comparison_text(everything(HOSTILE), 1000.0, width=80)
    assert all(line.isprintable() for line in page.split("\n"))
    page = comparison_text(everything("name/" * 40), 1000.0, width=80)
    tables = [line for line in page.split("\n") if not line.startswith(("a  ", "b  ", "The "))]
    assert all(cells(line) <= 80 for line in tables)


def test_only_bits() -> None:
    side = Side(None, Leaf("x", "F32", (2,), ()))
    found = (Difference("state", "values", "x", side, side, Apart(2, 0, 0.0, 0)),)
    page = comparison_text(Comparison(info(1), info(1), found, (), 1, 0), 1000.0, width=80)
    assert page.endswith("state\nCHANGE  PATH  A         UNEQUAL\nvalues  x     F32[2]  only bits")
