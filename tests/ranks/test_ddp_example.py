"""The example of several processes, killed and started again, also with another number."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.examples.test_examples import ROOT, state
from tests.ranks.jobs import Job


class Example(Job):
    def words(self) -> list[str]:
        script = str(ROOT / "examples" / "torch_ddp_digits.py")
        return [script, "--address", self.run, "--epochs", "3", "--every", "10"]


@pytest.mark.slow
def test_the_example_goes_on_as_if_left_alone(tmp_path: Path) -> None:
    whole, killed = Example(tmp_path / "whole", "ddp"), Example(tmp_path / "killed", "ddp")
    assert whole.finish(2) == 0, whole.log().read_text()
    assert killed.killed(2, random.Random("example"), saved=True) != 0
    assert killed.finish(2) == 0, killed.log().read_text()
    assert state(Path(killed.run)) == state(Path(whole.run))
    assert killed.finish(1) == 0
    assert "nothing to train" in killed.log().read_text()
