"""Rehearsals of programs of several ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from holdfast import CheckpointManager
from holdfast.core.group import Ranks
from holdfast.errors import UsageError
from holdfast.rehearse import Plan, Report, rehearse, stage, text_of
from holdfast.run.rehearsal import Part, Recorder
from tests.support.exhaustive import EXHAUSTIVE
from tests.support.nursery import ROOT
from tests.support.thread_ranks import ThreadGroup, all_ranks

SCRIPT = Path(__file__).parent / "scripts" / "ranks.py"
# As torchrun, of one process that has imported torch.
LAUNCHER = """
import runpy
import holdfast.torch, numpy, torch.distributed
runpy.run_module("tests.support.launcher", run_name="__main__")
"""


@pytest.fixture
def report_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def report_of(*args: str, kills: int) -> Report:
        launcher = [sys.executable, "-c", LAUNCHER, "2", str(tmp_path / "pids")]
        command = [*launcher, str(SCRIPT), *args]
        return rehearse(Plan(command, steps=12, kills=kills, seed=5, timeout_s=120))

    return report_of


@pytest.mark.slow
def test_ranks_are_killed_and_compared_one_by_one(report_of) -> None:
    report = report_of(kills=3 if EXHAUSTIVE else 2)
    assert report.verdict == "equal", text_of(report)
    assert report.compared["ranks"] == report.ranks == 2
    assert report.compared["steps"] == 12
    ends = [act.end for act in report.acts]
    # Of all ranks, or of that which came first: the launcher then ends the others.
    assert any("SIGKILL of " in end for end in ends), ends
    assert any("SIGTERM, saved" in end for end in ends), ends


if EXHAUSTIVE:  # ten starts

    @pytest.mark.slow
    def test_what_was_forgotten_on_one_rank_is_named(report_of) -> None:
        report = report_of("forget", kills=1)
        assert (report.verdict, report.exit_code) == ("different", 5)
        [cause] = report.causes
        assert (cause.name, cause.kind) == ("noise", "random generator of numpy")
        assert "noise (random generator of numpy), first seen on rank 1 at step" in text_of(report)
        assert {one.rank for one in report.differences if one.kind == "variable"} == {1}


def test_values_that_one_rank_alone_has_are_compared(tmp_path: Path) -> None:
    def save(group: ThreadGroup, name: str, more: int) -> None:
        own = group.ranks.rank * more
        with CheckpointManager(tmp_path / name / "runs" / "run", group=group) as ckpts:
            ckpts.save(3, {"all": [1], "own": {"seen": [own]}}).result()

    for name, more in (("alone", 1), ("equal", 1), ("other", 2)):
        all_ranks(2, lambda group, name=name, more=more: save(group, name, more))
    alone, equal, other = (tmp_path / name for name in ("alone", "equal", "other"))
    assert stage.ranks_apart((alone, equal), "run", 3) == []
    assert not stage.comparison((alone, other), "run", 3).differences
    assert stage.ranks_apart((alone, other), "run", 3) == [1]


def test_a_launcher_that_starts_ranks_again_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(Part(str(tmp_path), steps=12, every=4), "run")
    recorder.meet(Ranks(0, 1))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(UsageError, match="starts the ranks again") as caught:
        recorder.meet(Ranks(1, 2))
    assert "--max-restarts" in caught.value.hint
