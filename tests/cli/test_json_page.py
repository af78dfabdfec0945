"""`docs/cli-json.md` shows what is printed, and `docs/cli.md` names every key of it.

`.venv/bin/python -m pytest tests/cli/test_json_page.py --snapshot-update` writes the page anew.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest

from holdfast.cli import cli
from tests.cli.conftest import Command
from tests.cli.test_snapshots import normal
from tests.cli.world import ROOT

PAGE = ROOT / "docs" / "cli-json.md"
HEAD = """\
# The JSON of the command line

What each command prints with `--json`, on one run. The meaning of the fields is told in
[The command line](cli.md#json). A test makes this page: it is what is printed, but for
Holdfast's version.
"""

# The row of the table in cli.md, and what is shown for it.
EXAMPLES = {
    "ls RUN": ["holdfast ls runs/again --json"],
    "ls FOLDER": ["holdfast ls runs --json"],
    "show": ["holdfast show runs/again@100 --leaves --json"],
    "show FILE": ["holdfast show model.pt --leaves --json", "holdfast show evil.pkl --json"],
    "stats": ["holdfast stats runs/mnist --json"],
    "diff": ["holdfast diff runs/mnist@100 runs/again@100 --values --json"],
    "diff FILE": ["holdfast diff model.pt objects.pt --json"],
    "verify": ["holdfast verify damaged/bytes --json"],
    "verify FILE": ["holdfast verify model.pt --json", "holdfast verify bit.npz --json"],
    "restore": ["holdfast restore runs/again@200 out --json"],
    "export": ["holdfast export runs/again@200 model.safetensors --only model --json"],
    "import": ["holdfast import objects.pt imported --skip-objects --json"],
    "average": [
        "holdfast average runs/mnist@100 runs/mnist@200 --weights 1,3 --to runs/mean --json"
    ],
    "cp": ["holdfast cp runs/mnist@best:val_loss runs/mnist@100 copy --json"],
    "sync": ["holdfast sync runs/again copy --dry-run --json"],
    "tag": [
        "holdfast tag runs/mnist@41200 gold --json",
        "holdfast tag runs/mnist gold --delete --json",
    ],
    "pin": ["holdfast pin runs/again@100 --json"],
    "rm": ["holdfast rm runs/mnist@41200 --dry-run --json"],
    "prune": ["holdfast prune runs/again --keep last=1 --dry-run --json"],
    "gc": ["holdfast gc damaged/killed --dry-run --json"],
    "doctor": ["holdfast doctor --json", "holdfast doctor runs/mnist --json"],
    "rehearse": ["holdfast rehearse --json --seed 1 -- python forgetful.py"],
    "run": ["holdfast run --json -- python train.py"],
    "init": ["holdfast init slurm --json --time 1d -- python train.py"],
    "an error": ["holdfast ls nowhere --json"],
}
OF_ERRORS = {"ok", "error", "hint", "exit_code"}


def no_constant(token: str) -> NoReturn:
    raise AssertionError(f"{token} is no JSON")


@pytest.fixture
def printed(
    fixed: None, here: Path, world: Path, tmp_path: Path, holdfast_cli: Command
) -> dict[str, str]:
    """What each example prints, each on runs that no other has changed."""
    said: dict[str, str] = {}
    for line in (line for lines in EXAMPLES.values() for line in lines):
        shutil.rmtree(here)
        shutil.copytree(world, here)
        os.chdir(here)
        done = holdfast_cli(*shlex.split(line)[1:])
        assert done.err == ""
        json.loads(done.out, parse_constant=no_constant)
        said[line] = normal(done.out)
    return said


def test_the_page(printed: dict[str, str], pytestconfig: pytest.Config) -> None:
    sections = [
        f"\n## `{row}`\n"
        + "".join(f"\n```console\n$ {line}\n```\n\n```json\n{printed[line]}```\n" for line in lines)
        for row, lines in EXAMPLES.items()
    ]
    page = HEAD + "".join(sections).replace("## `an error`", "## An error")
    if pytestconfig.getoption("update_snapshots"):
        PAGE.write_text(page)
    assert PAGE.read_text() == page


def test_every_command_is_on_the_page() -> None:
    assert set(cli.commands) == {row.split()[0] for row in EXAMPLES} - {"an"}


def test_every_key_is_documented(printed: dict[str, str]) -> None:
    """And every name that a row of the table has is one that is printed."""
    table = (ROOT / "docs" / "cli.md").read_text().partition("\n## JSON\n")[2]
    rows = dict(re.findall(r"^\| `([^`]+)` \| (.*) \|$", table, re.MULTILINE))
    assert set(rows) == set(EXAMPLES) - {"an error"}
    for row, text in rows.items():
        values: list[Any] = [json.loads(printed[line]) for line in EXAMPLES[row]]
        if "and the rest of" not in text:
            top = {key for value in values for key in value}
            assert top - OF_ERRORS <= set(re.findall(r"`(\w+)`", text)), row
        every = {key for value in values for key in keys_of(value)} | OF_ERRORS
        words = {"equal", "different", "incomplete"} if row == "rehearse" else set[str]()
        assert set(re.findall(r"`(\w+)`", text)) - words <= every, row


def test_a_checkpoint_is_always_the_object_of_the_page(printed: dict[str, str]) -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    [shown] = re.findall(
        r"A checkpoint is always the same object:\n\n```json\n(.*?)```", page, re.S
    )
    keys = list(json.loads(shown))
    found = 0
    for text in printed.values():
        for value in objects(json.loads(text)):
            if "ordinal" in value:
                assert list(value)[: len(keys)] == keys
                found += 1
    assert found > 10


def objects(value: Any) -> list[dict[str, Any]]:
    below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = [value] if isinstance(value, dict) else []
    return own + [found for item in below for found in objects(item)]


def keys_of(value: Any) -> set[str]:
    return {key for found in objects(value) for key in found}
