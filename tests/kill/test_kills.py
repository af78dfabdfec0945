"""Real training scripts, killed with SIGKILL at random points, end with the same bits."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from tests.kill.driver import OVERLAP, PLACES, SAVING, Script, differing, kill_at_each, reference
from tests.support.exhaustive import EXHAUSTIVE


def test_a_generic_script_killed_in_every_phase(tmp_path: Path) -> None:
    """The second time with compression, which must not change a bit either."""
    wanted, counts = reference("generic", tmp_path)
    kills: Counter[str] = Counter()
    for seed in range(2):
        args = ("zstd",) if seed else ()
        script = Script("generic", tmp_path / f"killed{seed}", args)
        kill_at_each(script, (*SAVING, "body", "after"), counts, seed)
        assert differing(script.finish(), wanted) == []
        kills += script.kills
    assert kills.total() >= 8, kills


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_torch_script_killed_in_every_place(tmp_path: Path, workers: str) -> None:
    wanted, counts = reference("torch_train", tmp_path, workers)
    script = Script("torch_train", tmp_path / "killed", (workers,))
    kill_at_each(script, ("capture", "log", "restore", *OVERLAP, *PLACES), counts, int(workers))
    assert differing(script.finish(), wanted) == []
    assert script.kills.total() >= 3, script.kills


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("name", "args", "points"),
    [
        ("generic", (), SAVING),
        ("torch_train", ("0",), (*OVERLAP, *PLACES)),
        ("torch_train", ("2",), PLACES),
    ],
    ids=["saving and restoring", "places of the loop", "places of the loop, 2 workers"],
)
def test_killed_again_and_again_in_each_place(
    tmp_path: Path, name: str, args: tuple[str, ...], points: tuple[str, ...]
) -> None:
    """In `make exhaustive` 70 + 70 + 50 and more: at least 10 in each phase and in each place."""
    each = 10 if EXHAUSTIVE else 4
    wanted, counts = reference(name, tmp_path, *args)
    kills: Counter[str] = Counter()
    for round_ in range(4 * each):
        wanting = tuple(point for point in points if kills[point] < each)
        if not wanting:
            break
        script = Script(name, tmp_path / f"round{round_}", args)
        kill_at_each(script, wanting, counts, round_)
        script.run(kill_after_s=random.Random(round_).uniform(0.2, 3.0))
        assert differing(script.finish(), wanted) == [], f"round {round_}: {script.kills}"
        kills += script.kills
    assert all(kills[point] >= each for point in points), kills
