"""What varies from one call of a command to the next, held fast."""

from __future__ import annotations

import random
import secrets
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from holdfast import rehearse, supervise
from holdfast.manager import CheckpointManager, averages, doctor
from holdfast.rehearse.compare import Difference
from holdfast.rehearse.report import Act, Cause, Report
from holdfast.run import importing
from holdfast.stores.abilities import Abilities
from holdfast.supervise import Outcome
from tests.cli.world import NOW_S, ROOT


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    command = [sys.executable, "-m", "tests.cli.world", str(folder)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return folder


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the world, as the current folder of a terminal of 80 columns."""
    folder = tmp_path / "world"
    shutil.copytree(world, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "80")
    return folder


@pytest.fixture
def fixed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`here`, at its own time, on no particular disk, and with rehearsals that take none."""
    for name in ("ls", "show", "diff", "prune", "rm"):
        module = sys.modules[f"holdfast.cli.{name}"]
        monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: NOW_S))
    monkeypatch.setattr(averages, "time", SimpleNamespace(time=lambda: NOW_S))
    # Every name and id that is drawn at random follows from these.
    numbers = iter(range(1_000_000, 2_000_000))

    def token_hex(nbytes: int = 32) -> str:
        return random.Random(next(numbers)).randbytes(nbytes).hex()

    monkeypatch.setattr(secrets, "token_hex", token_hex)
    able = Abilities(True, "", "ext4", 500 * 10**9, True, True, True, True)
    monkeypatch.setattr(doctor, "probe", lambda store: able)
    monkeypatch.setattr(doctor, "format_ago", lambda seconds: "3 h ago")
    monkeypatch.setattr(rehearse, "rehearse", rehearsed)
    monkeypatch.setattr(supervise, "supervise", supervised)
    clock = {"clock": lambda: NOW_S}
    monkeypatch.setattr(importing, "CheckpointManager", partial(CheckpointManager, **clock))
    monkeypatch.setattr(importing, "abspath", lambda path: f"/home/me/{path}")


def supervised(*args: object, **options: object) -> Outcome:
    """In place of processes: it crashed once and hung once."""
    return Outcome(0, 3, 1, "logs", {"runs/mnist": 41_400})


def rehearsed(plan: object, say: object) -> Report:
    """In place of processes that are killed at random, what they may have led to."""
    command, seed = plan.command, plan.seed  # type: ignore[attr-defined]
    report = Report(command, seed, steps=30, environment={"python": "3.11.7"}, data="9f3c02ab")
    report.compared = {"steps": 30, "metrics": 1, "leaves": 4}
    report.acts = [Act(0, "left alone, finished", 0.5), Act(11, "killed in a save", 0.25)]
    for act in report.acts:
        say(act.line())  # type: ignore[operator]
    if command[-1] == "nothing.py":
        report.problem = "left alone, it failed with status 2:\nno such file: nothing.py"
        return report
    report.verdict = "equal"
    report.ignored = [Difference("metric", "seconds", 12, 11)]
    if command[-1] == "forgetful.py":
        report.verdict = "different"
        report.differences = [Difference("metric", "loss", 12, 11, alone="0.5", killed="0.25")]
        report.causes = [
            Cause("ema", "Average", 12, "is not tracked: after a resume it is not what it was",
                  "run.track(ema=ema)")
        ]  # fmt: skip
    return report
