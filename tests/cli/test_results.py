"""What `verify` and `stats` say of results of calls."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import holdfast
from holdfast.cli import main
from holdfast.repo import keys
from holdfast.stores.local import LocalStore
from tests.cli.damage import flip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with holdfast.Run(tmp_path / "run", every=1, quiet=True) as run:
        for _ in run.range(1):
            list(run.map(np.ones, [3, 5], version=1))
    return tmp_path / "run"


def said(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_stats_counts_them(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", str(run)]) == 0
    assert "2 stored results of calls, 8.26 KB." in said(capsys)
    assert main(["stats", str(run), "--json"]) == 0
    assert json.loads(said(capsys))["results"]["count"] == 2


def test_verify_reads_them(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run)]) == 0
    assert "1 checkpoint and 2 results of calls verified, all intact." in said(capsys)
    key = min(info.key for info in LocalStore(run).list(keys.RESULTS))
    flip(run / key, -1)
    assert main(["verify", str(run)]) == 4
    text = said(capsys)
    assert f"result DAMAGED: 'result' in {key} is damaged" in text
    assert "1 result of calls in" in text
    assert "computed again" in text
    assert main(["verify", str(run), "--json"]) == 4
    found = json.loads(said(capsys))
    assert found["results"]["count"] == 2
    assert len(found["results"]["problems"]) == 1
    assert main(["verify", f"{run}@latest"]) == 0, "of one checkpoint it says nothing of them"


def test_a_run_that_has_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = holdfast.Run(tmp_path / "run", quiet=True)
    run.once(np.ones, version=1)(3)
    run.close()
    assert main(["verify", str(tmp_path / "run")]) == 0
    assert said(capsys) == "1 result of calls verified, all intact.\n"
    assert main(["ls", str(tmp_path / "run")]) == 10
