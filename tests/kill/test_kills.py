"""Real training scripts, killed with SIGKILL at random points, end with the same bits."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from tests.kill.driver import PLACES, SAVING, Script, differing, kill_at_each, reference


def test_a_generic_script_killed_in_every_phase(tmp_path: Path) -> None:
    wanted, counts = reference("generic", tmp_path)
    kills: Counter[str] = Counter()
    for seed in range(2):
        script = Script("generic", tmp_path / f"killed{seed}")
        kill_at_each(script, (*SAVING, "body", "after"), counts, seed)
        assert differing(script.finish(), wanted) == []
        kills += script.kills
    assert kills.total() >= 8, kills


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_torch_script_killed_in_every_place(tmp_path: Path, workers: str) -> None:
    wanted, counts = reference("torch_train", tmp_path, workers)
    script = Script("torch_train", tmp_path / "killed", (workers,))
    kill_at_each(script, ("capture", "log", "restore", *PLACES), counts, seed=int(workers))
    assert differing(script.finish(), wanted) == []
    assert script.kills.total() >= 3, script.kills


@pytest.mark.slow
def test_a_hundred_kills(tmp_path: Path) -> None:
    """At least 10 in each phase of saving and restoring and in each place of the loop."""
    kills: Counter[str] = Counter()
    scripts = [("generic", ()), ("torch_train", ("0",)), ("torch_train", ("2",))]
    whole = [reference(name, tmp_path / f"{name}{'-'.join(args)}", *args) for name, args in scripts]
    missing = (*SAVING, *PLACES)
    for round_ in range(40):
        wanting = tuple(p for p in missing if kills[p] < 10)
        if not wanting and kills.total() >= 100:
            break
        # The generic script is quick, and has no epochs.
        which = round_ % 3
        points = tuple(p for p in wanting or missing if whole[which][1][p] or p == "restore")
        (name, args), (wanted, counts) = scripts[which], whole[which]
        script = Script(name, tmp_path / f"round{round_}", args)
        kill_at_each(script, points, counts, round_)
        for _ in range(2):
            script.run(kill_after_s=random.Random(round_).uniform(0.2, 3.0))
        assert differing(script.finish(), wanted) == [], f"round {round_}: {script.kills}"
        kills += script.kills
    print(dict(kills))
    assert kills.total() >= 100, kills
    assert all(kills[point] >= 10 for point in missing), kills
