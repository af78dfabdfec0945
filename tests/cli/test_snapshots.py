"""What every command prints, as table and as JSON: the files in `__snapshots__/`, to be read.

`.venv/bin/python -m pytest tests/cli/test_snapshots.py --snapshot-update` writes them anew,
and removes those of no case; the diff is then what is to be reviewed. Without it, one that
differs or is missing fails.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from syrupy.assertion import SnapshotAssertion
from syrupy.extensions.single_file import SingleFileSnapshotExtension, WriteMode

import holdfast
from holdfast.cli import cli
from tests.cli.conftest import Command, Outcome
from tests.cli.world import HOSTILE


class Pages(SingleFileSnapshotExtension):
    """One text file for each case."""

    _write_mode = WriteMode.TEXT
    file_extension = "txt"


def normal(text: str) -> str:
    """`text` without the little that no clock and no seed can fix: the version, and which
    process on which host wrote a run that it did not close."""
    text = text.replace(f"Holdfast {holdfast.__version__} ", "Holdfast X.Y.Z ")
    text = text.replace(f"holdfast {holdfast.__version__}", "holdfast X.Y.Z")
    return re.sub(r"process \d+ on [\w.-]+", "process PID on HOST", text)


def page(line: str, done: Outcome) -> str:
    """The case as a terminal would show it, with stderr apart."""
    err = f"--- stderr\n{done.err}" if done.err else ""
    return normal(f"$ holdfast {line}\n{done.out}{err}--- exit status {done.status}\n")


# Each is given as it stands, and with --json.
CASES = {
    "ls": "ls runs/mnist",
    "ls-metric": "ls runs/mnist --metric acc",
    "ls-folder": "ls runs",
    "ls-damaged-folder": "ls damaged",
    "ls-interrupted": "ls damaged/killed",
    "ls-hostile": "ls hostile/names",
    "ls-hostile-folder": "ls hostile",
    "ls-empty": "ls runs/empty",
    "ls-nothing": "ls nowhere",
    "ls-of-a-checkpoint": "ls runs/mnist@100",
    "show": "show runs/mnist@best:val_loss",
    "show-leaves": "show runs/again --leaves",
    "show-hostile": "show hostile/names --leaves",
    "show-no-step": "show runs/mnist@300",
    "show-no-metric": "show runs/mnist@best:nothing",
    "show-hostile-hint": "show hostile/names@best:nothing",
    "show-no-tag": "show runs/mnist@no-tag",
    "show-no-mode": "show runs/again@best:acc",
    "show-no-selector": "show runs/mnist@",
    "show-file-safetensors": "show weights.safetensors --leaves",
    "show-file-pickle": "show evil.pkl",
    "show-file-torch": "show model.pt",
    "show-file-hostile": "show hostile.safetensors",
    "show-file-damaged": "show short.safetensors",
    "show-file-unknown": "show text.txt",
    "show-file-lightgbm": "show model.txt",
    "show-folder": "show shards",
    "stats": "stats runs/mnist",
    "stats-newest": "stats runs/mnist -n 2",
    "stats-hostile": "stats hostile/names",
    "stats-not-measured": "stats runs/again",
    "stats-nothing": "stats nowhere",
    "stats-of-a-checkpoint": "stats runs/mnist@100",
    "diff": "diff runs/mnist@100 runs/again@100 --values",
    "diff-equal": "diff runs/mnist@200 runs/again@200",
    "diff-steps": "diff runs/mnist@100 runs/mnist@200",
    "diff-hostile": "diff hostile/names@1 hostile/names@2",
    "diff-nothing": "diff runs/mnist@100 nowhere@100",
    "diff-files": "diff weights.safetensors other.safetensors --values",
    "diff-files-equal": "diff weights.safetensors shards",
    "diff-file-and-run": "diff model.pt runs/mnist@200",
    "diff-files-hostile": "diff hostile.safetensors evil.pkl",
    "diff-only": "diff runs/mnist@100 runs/mnist@200 --only model",
    "import": "import model.pt imported --step 3 --metric acc=0.5 --tag old",
    "import-objects": "import evil.pkl imported",
    "import-skip": "import objects.pt imported --skip-objects",
    "import-hostile": "import hostile.safetensors imported",
    "import-step": "import weights.safetensors runs/mnist",
    "import-metric": "import weights.safetensors imported --metric acc",
    "verify": "verify runs/mnist",
    "verify-file": "verify model.pt",
    "verify-folder": "verify shards",
    "verify-file-damaged": "verify bit.npz",
    "verify-file-repair": "verify model.pt --repair-from runs/mnist",
    "verify-one": "verify runs/mnist@gold",
    "verify-damaged": "verify damaged/bytes",
    "restore": "restore runs/mnist@gold out",
    "restore-not-empty": "restore runs/mnist runs",
    "restore-damaged": "restore damaged/bytes out",
    "export": "export runs/mnist@best:val_loss model.safetensors --only model",
    "export-exists": "export runs/mnist train.py",
    "export-no-folder": "export runs/mnist nowhere/model.safetensors",
    "export-nothing-below": "export runs/mnist all.safetensors --only nothing",
    "average": "average runs/mnist@last=3 --to runs/mean",
    "average-weights": "average runs/mnist@100 runs/again@100 --weights 1,3 --to runs/mean",
    "average-export": "average runs/mnist@best=2:val_loss --only model --export mean.safetensors",
    "average-of-one": "average runs/mnist --to runs/mean",
    "average-other-shapes": "average runs/mnist@100 hostile/names@1 --to runs/mean",
    "average-hostile": "average hostile/names@all --to runs/mean",
    "average-damaged": "average damaged/bytes@all --to runs/mean",
    "average-into-itself": "average runs/mnist@last=2 --to runs/mnist",
    "average-nowhere": "average runs/mnist@last=2",
    "average-bad-weights": "average runs/mnist@last=2 --weights 1 --to runs/mean",
    "average-exists": "average runs/mnist@last=2 --export train.py",
    "cp": "cp runs/mnist@best:val_loss runs/mnist@100 copy",
    "cp-all": "cp runs/mnist --all copy",
    "cp-damaged": "cp damaged/bytes --all copy",
    "cp-hostile": "cp hostile/names --all copy",
    "cp-other-run": "cp runs/mnist runs/again",
    "cp-no-target": "cp runs/mnist",
    "sync": "sync runs/mnist copy",
    "sync-dry-run": "sync runs/mnist copy --dry-run",
    "sync-nothing": "sync nowhere copy",
    "verify-repair-nothing-there": "verify damaged/bytes --repair-from nowhere",
    "verify-repair-no-better": "verify damaged/bytes --repair-from runs/mnist",
    "tag": "tag runs/mnist@41200 silver",
    "tag-moves": "tag runs/mnist@41200 gold",
    "tag-delete": "tag runs/mnist gold --delete",
    "tag-refused": "tag runs/mnist 41200",
    "pin": 'pin runs/mnist@41200 --reason "used in the report"',
    "pin-release": "pin runs/mnist@100 --release",
    "pin-usage": "pin runs/mnist --release --reason why",
    "rm": "rm runs/mnist@41200 runs/mnist@41300",
    "rm-dry-run": "rm runs/mnist@41200 --dry-run",
    "rm-dry-run-protected": "rm runs/mnist@41400 runs/mnist@200 runs/mnist@100 --dry-run",
    "rm-protected": "rm runs/mnist@41400 runs/mnist@200 runs/mnist@100",
    "rm-a-run": "rm runs/mnist",
    "prune": "prune runs/mnist --keep last=1",
    "prune-dry-run": 'prune runs/mnist --keep "last=1 best=1:val_loss" --dry-run',
    "prune-hostile": "prune hostile/names --keep last=1 --dry-run",
    "prune-bad-rule": "prune runs/mnist --keep last=many",
    "prune-no-rule": 'prune runs/mnist --keep ""',
    "prune-damaged-list": "prune damaged/log --keep last=1",
    "gc": "gc damaged/killed",
    "gc-dry-run": "gc damaged/killed --dry-run",
    "gc-nothing-to-do": "gc runs/mnist",
    "doctor": "doctor runs/mnist",
    "doctor-full": "doctor damaged/bytes --full",
    "doctor-lost": "doctor damaged/lost",
    "doctor-repair": "doctor damaged/lost --repair",
    "doctor-repair-list": "doctor damaged/log --repair",
    "doctor-nothing": "doctor nowhere",
    "rehearse": "rehearse --seed 1 -- python train.py",
    "rehearse-different": "rehearse --seed 1 -- python forgetful.py",
    "rehearse-incomplete": "rehearse --seed 1 -- python nothing.py",
    "rehearse-no-report": "rehearse --report nowhere/report.json -- python train.py",
    "run": "run -- python train.py",
    "init-slurm": "init slurm --name mnist -- python train.py",
    "run-bad-rule": "run --on-exit-code 75=again -- python train.py",
    "run-bad-time": "run --hang-timeout 5m -- python train.py",
    "usage-no-argument": "show",
    "usage-no-option": "ls --nothing",
    "usage-no-command": "nothing",
}  # fmt: skip


def as_json(line: str) -> str:
    """With --json, in front of what may be another program's own."""
    name, _, rest = line.partition(" ")
    return f"{name} --json {rest}".strip()


@pytest.mark.usefixtures("fixed")
@pytest.mark.parametrize("form", ["table", "json"])
@pytest.mark.parametrize("case", CASES)
def test_command(case: str, form: str, holdfast_cli: Command, snapshot: SnapshotAssertion) -> None:
    line = CASES[case] if form == "table" else as_json(CASES[case])
    assert page(line, holdfast_cli(*shlex.split(line))) == snapshot(extension_class=Pages)


@pytest.mark.usefixtures("fixed")
@pytest.mark.parametrize("case", ["help", *(f"help-{name}" for name in cli.commands), "version"])
def test_help(case: str, holdfast_cli: Command, snapshot: SnapshotAssertion) -> None:
    line = f"{case.removeprefix('help').removeprefix('-')} --help".strip()
    line = "--version" if case == "version" else line
    assert page(line, holdfast_cli(*line.split())) == snapshot(extension_class=Pages)


def test_every_command_has_a_snapshot() -> None:
    taken = {line.split()[0] for line in CASES.values()}
    assert set(cli.commands) <= taken


def test_a_missing_snapshot_fails_and_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "test_new.py").write_text("def test(snapshot):\n    assert 'new' == snapshot\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "test_new.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout
    assert "does not exist" in done.stdout
    assert not list(tmp_path.rglob("*.ambr"))


def test_no_snapshot_has_a_character_that_a_terminal_obeys() -> None:
    for path in (Path(__file__).parent / "__snapshots__").rglob("*.txt"):
        for line in path.read_text().split("\n"):
            assert line.isprintable(), (path.name, line)
            assert line == line.rstrip(), (path.name, line)


def test_names_are_hostile() -> None:
    assert sum(not name.isprintable() for name in HOSTILE.values()) >= 6
