"""Whole rehearsals of small scripts: those that recover, and those that do not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from holdfast.cli import main
from holdfast.errors import UsageError
from holdfast.rehearse import Plan, Report, rehearse, text_of
from holdfast.rehearse.compare import Difference
from tests.support.exhaustive import EXHAUSTIVE

SCRIPTS = Path(__file__).parent / "scripts"
EXAMPLES = Path(__file__).parents[2] / "examples"


def of(script: str, **options: object) -> Report:
    folder = EXAMPLES if (EXAMPLES / script).exists() else SCRIPTS
    options = {"seed": 5, "kills": 4 if EXHAUSTIVE else 2, **options}
    return rehearse(Plan([sys.executable, str(folder / script)], **options))  # type: ignore[arg-type]


def test_a_script_that_recovers() -> None:
    report = of("equal.py", kills=5)
    assert (report.verdict, report.exit_code, report.causes) == ("equal", 0, [])
    assert report.compared["steps"] == report.steps == 30
    assert report.compared["metrics"] == 2
    assert report.compared["leaves"] >= 1
    assert report.compared["values"] >= 2
    # Clocks differ at every start, which says nothing about recovery.
    assert sorted(one.name for one in report.ignored) == ["began", "seconds"]
    assert sum("SIG" in act.end for act in report.acts) >= 2
    assert any("SIGTERM, saved" in act.end and "status 75" in act.end for act in report.acts)


def test_a_start_that_is_not_seeded_is_no_difference() -> None:
    assert of("unseeded.py").verdict == "equal"


@pytest.mark.parametrize(
    ("script", "name", "kind"),
    [
        ("scheduler.py", "scheduler", "StepLR"),
        ("generator.py", "rng", "random generator of numpy"),
        ("sampler.py", "sampler.rng", "random generator of numpy"),
        ("hashed.py", "PYTHONHASHSEED", "order"),
        ("average.py", "ema", "float64[3]"),
        ("local.py", "best", "local variable"),
        ("urandom.py", "weights", "not repeatable"),
    ],
)
def test_what_was_forgotten_is_named(script: str, name: str, kind: str) -> None:
    report = of(script)
    assert report.verdict == "different"
    assert report.exit_code == 5
    assert [(cause.name, cause.kind) for cause in report.causes] == [(name, kind)]
    assert report.causes[0].remedy
    assert f"{name} ({kind}), first seen at step" in text_of(report)


def test_what_happens_once_is_not_taken_for_the_hash_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STARTS", str(tmp_path / "starts"))
    report = of("seldom.py", kills=2)
    assert [(cause.name, cause.kind) for cause in report.causes] == [("loss", "not repeatable")]
    assert "metric 'loss' differed once" in report.causes[0].why
    assert ("metric", "loss") in {(one.kind, one.name) for one in report.differences}


def test_global_variables_are_named_with_the_way_to_keep_them() -> None:
    report = of("globals.py")
    assert [(cause.name, cause.kind, cause.remedy) for cause in report.causes] == [
        ("batch", "float64[3]", "run.track(more=holdfast.Variables(globals(), 'batch'))"),
        ("best", "float64[]", "run.track(more=holdfast.Variables(globals(), 'best'))"),
    ]
    assert report.causes[1].why.startswith("is inf after a resume, and ")


def test_what_follows_from_a_difference_is_not_blamed() -> None:
    report = of("closure.py", kills=3)
    assert [(cause.name, cause.kind) for cause in report.causes] == [("loss", "metric")]
    assert "in a closure" in report.causes[0].remedy


def test_what_differs_from_then_on() -> None:
    report = of("local.py")
    followed = {(one.kind, one.name) for one in report.differences}
    assert {("metric", "loss"), ("state", "weights"), ("state", "rate")} <= followed
    metric = next(one for one in report.differences if one.kind == "metric")
    assert float(metric.alone) != float(metric.killed)
    assert f"instead of {metric.alone}" in " ".join(text_of(report).split())


def test_long_numbers_go_to_the_next_line() -> None:
    alone, killed = "-0.00030776549179250945", "-3.170759422613577e-05"
    one = Difference("metric", "validation_loss", 12, 8, alone=alone, killed=killed)
    lines = text_of(Report([], 0, "different", differences=[one])).splitlines()
    assert lines[-2:] == [
        f"    step     12  metric 'validation_loss': {killed} instead of",
        f"                 {alone}",
    ]


def test_what_is_named_may_differ() -> None:
    report = of("average.py", ignore=["smooth", "ema.weights['layer.0']"])
    assert report.verdict == "equal"


def test_a_tolerance_lets_small_differences_pass() -> None:
    assert of("urandom.py", tolerance=1e6).verdict == "equal"


def test_a_program_that_refuses_its_checkpoint() -> None:
    report = of("refused.py")
    assert (report.verdict, report.exit_code) == ("different", 5)
    assert "which nothing tracks here" in report.problem
    assert "late=['layers', 'more']" in text_of(report)


def test_programs_that_cannot_be_rehearsed(tmp_path: Path) -> None:
    fails = tmp_path / "fails.py"
    fails.write_text("raise SystemExit('no such data')")
    report = of(str(fails))
    assert (report.verdict, report.exit_code) == ("incomplete", 3)
    assert "failed with status 1" in report.problem
    assert "no such data" in text_of(report)

    no_run = tmp_path / "no_run.py"
    no_run.write_text("print('hello')")
    assert "never completed a step" in of(str(no_run)).problem

    slow = tmp_path / "slow.py"
    slow.write_text("import time; time.sleep(60)")
    assert "did not end within 0.5 s" in of(str(slow), timeout_s=0.5).problem

    short = tmp_path / "short.py"
    short.write_text(
        f"import holdfast\nfor _ in holdfast.Run({str(tmp_path / 'real')!r}).range(2): pass"
    )
    assert "only 2 steps" in of(str(short)).problem
    assert not (tmp_path / "real").exists(), "a rehearsal never goes to the run's own address"


def test_plans_that_make_no_sense() -> None:
    with pytest.raises(UsageError, match="no command"):
        rehearse(Plan([]))
    with pytest.raises(UsageError, match="at least 4 steps"):
        of("equal.py", steps=3)
    with pytest.raises(UsageError, match="one kill"):
        of("equal.py", kills=0)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    words = ["rehearse", "--seed", "5", "--report", str(path), "--", sys.executable]
    assert main([*words, str(SCRIPTS / "local.py")]) == 5
    out = capsys.readouterr().out
    assert out.startswith("rehearsing 30 steps with 4 kills (--seed 5):\n")
    assert "left alone" in out
    assert "best (local variable)" in out
    assert max(map(len, out.splitlines())) <= 80
    report = json.loads(path.read_text())
    assert report["verdict"] == "different"
    assert report["environment"]["packages"]["numpy"]
    assert report["environment"]["platform"]
    assert report["data"]
    assert "no checkpoint in" in report["output"]

    assert main([*words[:3], "--json", "--", sys.executable, str(SCRIPTS / "unseeded.py")]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


def test_a_broken_script_for_a_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import holdfast

    monkeypatch.setenv("HOLDFAST_REHEARSAL", "{not json")
    with pytest.raises(UsageError, match="HOLDFAST_REHEARSAL"):
        holdfast.Run("memory://never")


@pytest.mark.slow
@pytest.mark.parametrize(
    # The others import for seconds, and are started seven times: tests/examples kills them.
    "example",
    ["generic.py", "lightgbm_digits.py", "torch_digits.py"]
    + (["char_transformer.py"] if EXHAUSTIVE else []),
)
def test_the_examples_recover(example: str) -> None:
    report = of(example, steps=60, kills=5 if EXHAUSTIVE else 3)
    assert report.verdict == "equal", text_of(report)
