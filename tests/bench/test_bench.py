"""The benchmarks run, and notice what would make their figures wrong. No figure is judged."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import durable, outcome, report
from bench.cases import CASES
from bench.cases.buckets import s3fs_is_installed
from bench.cases.common import check
from bench.cases.flows import other_is_installed
from bench.others import TorchSave, orbax_is_installed
from bench.outcome import CEILING, Goal, Measure, Outcome
from bench.peers import HoldfastRun, Peer
from bench.states import State, small_tensors, transformer
from bench.training import QUIET, Loop, Quiet, Step, Turn

ROOT = Path(__file__).resolve().parents[2]


def test_every_case_runs_and_writes_its_page(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs/benchmarks.md", tmp_path / "docs")
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--quick", "--write-docs", f"--root={tmp_path}"],
        cwd=ROOT,
        # Tiny tensors: threads would only wait for each other.
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("Orbax is not installed" in done.stdout) != orbax_is_installed()
    assert ("s3fs is not installed" in done.stdout) != s3fs_is_installed()
    assert ("metaflow-checkpoint is not" in done.stdout) != other_is_installed()
    found = outcome.load(tmp_path / "docs/benchmarks/figures.json")
    page = (tmp_path / "docs/benchmarks.md").read_text()
    assert list(found) == list(CASES)
    for case in found.values():
        assert case.goals
        if case.case == "scale":  # of Holdfast alone
            assert list(case.figures) == ["2 ranks", "16 ranks"]
            continue
        others = {
            "bucket": "boto3",
            "metaflow": "no decorator",
            "frameworks": "the framework's own",
            "interruptions": "every=10min",
        }
        beside = others.get(case.case, "DCP")
        assert {"Holdfast", beside} <= case.figures.keys()
        for measure in case.measures:
            assert case.figures["Holdfast"][measure.key], (case.case, measure.key)
        assert report.section(case, None).splitlines()[0] in page
    assert not list(tmp_path.glob("holdfast-bench-*"))  # no state is left behind


class _Forgetful(TorchSave):
    """Restores nothing."""

    def restore(self, into: State) -> None:
        pass


class _Late(TorchSave):
    """Writes when the next step has changed what it was to save."""

    def start(self) -> None:
        self._late = True

    def wait(self) -> None:
        self.save()


def test_a_restore_that_does_nothing_is_noticed(tmp_path: Path) -> None:
    state = small_tensors(3)
    peer = _Forgetful(tmp_path / "peer", state)
    peer.save()
    with pytest.raises(AssertionError, match="did not restore what was saved"):
        check(peer, state)


@pytest.mark.parametrize(("kind", "torn"), [(HoldfastRun, False), (_Late, True)])
def test_a_save_of_a_later_state_is_noticed(tmp_path: Path, kind: type[Peer], torn: bool) -> None:
    state, spare = transformer(1), transformer(1, trains=False)
    loop = Loop(state, tmp_path, [kind])
    try:
        if torn:
            with pytest.raises(AssertionError, match="did not restore what was saved"):
                loop.train([kind.name], 1, check=spare, checked=1)
        else:
            loop.train([kind.name], 1, check=spare, checked=1)
    finally:
        loop.close()


def test_a_large_state_has_what_a_trained_one_has() -> None:
    trained, filled = transformer(1), transformer(1, trains=False)
    shapes = {name: (value.dtype, value.shape) for name, value in trained.tensors.items()}
    assert {name: (value.dtype, value.shape) for name, value in filled.tensors.items()} == shapes
    assert len(shapes) == 576 + 192  # parameters with two moments, and the step of each


def test_what_a_turn_lost() -> None:
    quiet = Quiet([Turn(QUIET, steps=[Step(0.1, 2.0, 0.5, False)] * 2)] * 3)
    turn = Turn("a peer", call_s=0.3)
    turn.steps = [Step(0.2, 2.5, 0.7, True), Step(0.1, 2.1, 0.5, False)]
    assert quiet.stall_s(turn, overlaps=False) == pytest.approx(0.3 + 0.1)
    assert quiet.stall_s(turn, overlaps=True) == pytest.approx(0.3 + 0.1 + 0.2)
    assert quiet.in_flight_s(turn) == pytest.approx(0.3 + 0.8)
    assert quiet.lost_s(turn) == pytest.approx(0.3 + 0.8 + 0.1)


def test_the_page_cache_is_seen(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    assert durable.cached_share(tmp_path) == 1.0
    assert durable.nbytes_of(tmp_path) == 1 << 20


@pytest.mark.parametrize(
    ("goal", "text"),
    [
        (Goal("speed", 2.5, 3.0), "speed: 3.00x, met (aim: at least 2.50x)"),
        (Goal("speed", 2.5, 2.0), "speed: 2.00x, **missed** by 0.50x (aim: at least 2.50x)"),
        (Goal("stall", 0.1, 0.25, False, "s"), "**missed** by 0.15 s (aim: at most 0.10 s)"),
        (Goal("stall", 0.1, 0.05, False, "s"), "stall: 50.0 ms, met"),
        (Goal("cold", 0.9, None), "cold: not measured"),
    ],
)
def test_goals_say_by_how_much(goal: Goal, text: str) -> None:
    found = Outcome(case="x", title="X", state="", measures=[], goals=[goal])
    assert text in "\n".join(report.goals(found))


def test_a_table_has_medians_and_ratios() -> None:
    found = Outcome(case="x", title="X", state="", measures=[Measure("a", "time")])
    for ours, theirs in ((1.0, 3.0), (2.0, 2.0), (9.0, 8.0)):
        found.add("Holdfast", a=ours)
        found.add("other", a=theirs)
    found.add(f"{CEILING}copy", a=0.01)
    assert list(report.table(found))[2:] == [
        "| Holdfast | 2.00 s |",
        "| other | 3.00 s (1.50x) |",
        "| *machine: copy* | 10.0 ms (0.01x) |",
    ]
    assert found.best_other("a") == "other"


def test_only_what_is_between_the_marks_is_written() -> None:
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    assert report.page(text, ["new"]) == f"before\n{report.BEGIN}\n\nnew\n{report.END}\nafter\n"
    with pytest.raises(ValueError, match="lacks the line"):
        report.page("no marks", ["new"])
