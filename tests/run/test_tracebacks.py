"""What a user reads on stderr when one of our errors ends a script: the message and the
hint come last, with no other exception in front and none of our own calls."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from holdfast.errors import HoldfastError, StateError, brief, briefly

TRAIN = """
import sys
from pathlib import Path
import holdfast

class Model:
    def __init__(self, size=2):
        self.weights = [0.0] * size
    def state_dict(self):
        return {"weights": list(self.weights)}
    def load_state_dict(self, state):
        self.weights[:] = state["weights"]

def train(tracked, epochs=2, **options):
    run = holdfast.Run("runs/x", every=2, quiet=True, **options).track(**tracked)
    for epoch in run.epochs(epochs):
        for batch in run.batches([1, 2, 3]):
            pass
    run.close()
"""
DONE = 'train({"model": Model()}, config={"lr": 1})\n'
PACKED = 'import numpy as np\ntrain({"x": np.ones(5000)})\n'

CASES = {
    "structure mismatch": (
        DONE + 'train({"model": [1]}, config={"lr": 1})',
        "StructureMismatch",
    ),
    "array of another shape": (
        'import numpy as np\ntrain({"x": np.zeros(2)})\ntrain({"x": np.zeros(3)})',
        "StructureMismatch",
    ),
    "missing object": (DONE + 'train({"other": Model()}, config={"lr": 1})', "StructureMismatch"),
    "unclaimed object": (
        DONE + 'train({}, epochs=3, config={"lr": 1})',
        "StructureMismatch",
    ),
    "other config": (DONE + 'train({"model": Model()}, config={"lr": 2})', "ConfigChanged"),
    "held": (
        "import subprocess\n"
        'if sys.argv[1:]:\n    train({"model": Model()})\n'
        'for i in holdfast.Run("runs/x", quiet=True).range(1):\n'
        '    sys.exit(subprocess.call([sys.executable, "script.py", "again"]))',
        "RunHeld",
    ),
    "damage": (
        PACKED + 'for pack in Path("runs/x/packs").iterdir():\n'
        "    pack.write_bytes(bytes(pack.stat().st_size))\n" + DONE,
        "NoIntactCheckpoint",
    ),
    "lost packs": (
        PACKED + 'for pack in Path("runs/x/packs").iterdir():\n    pack.unlink()\n' + PACKED,
        "NoIntactCheckpoint",
    ),
    "two loops in turn": (
        'run = holdfast.Run("runs/x", quiet=True)\n'
        "for pair in zip(run.batches([1, 2]), run.batches([3, 4])):\n    pass",
        "LoopError",
    ),
    "iterated twice": (
        'loop = holdfast.Run("runs/x", quiet=True).range(2)\nlist(loop)\nlist(loop)',
        "LoopError",
    ),
    "reads ahead": (
        "def prefetch(items):\n    held = next(items)\n    for item in items:\n"
        "        yield held\n        held = item\n"
        'for item in prefetch(holdfast.Run("runs/x", quiet=True).range(3)):\n    pass',
        "LoopError",
    ),
    "not saveable": ('train({"x": [object()]})', "UnsupportedValue"),
    "metric": (
        'run = holdfast.Run("runs/x", quiet=True)\n'
        'for i in run.range(2):\n    run.log(loss="high")',
        "UsageError",
    ),
    "every": ('holdfast.Run("runs/x", every="10 parsecs")', "BadPolicy"),
    "keep": ('holdfast.Run("runs/x", keep="last=x")', "BadPolicy"),
    "address": ('holdfast.open("ftp://host/x")', "BadAddress"),
    "no run": ('holdfast.open("runs/nothing")', "NoStore"),
    "a file": (
        'Path("runs").write_text("")\nholdfast.CheckpointManager("runs").save(1, {"a": 1})',
        "BadAddress",
    ),
    "untracked parameters": (
        "import torch\nlayer = torch.nn.Linear(2, 2)\n"
        'train({"optimizer": torch.optim.SGD(layer.parameters(), lr=0.1)})',
        "UntrackedParameters",
    ),
}


@pytest.mark.parametrize(("script", "kind"), CASES.values(), ids=CASES)
def test_the_message_and_the_hint_come_last(script: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(TRAIN + script)
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    lines = done.stderr.rstrip().split("\n")
    assert done.returncode == 1
    assert lines[-1].startswith("Hint: "), done.stderr
    raised = [line for line in lines if line.startswith(f"holdfast.errors.{kind}: ")]
    assert len(raised) == 1, done.stderr
    assert "During handling" not in done.stderr
    assert "direct cause" not in done.stderr
    assert done.stderr.count("Traceback (most recent call last)") == 1
    ours = [line for line in lines if line.startswith("  File ") and "script.py" not in line]
    assert len(ours) <= 4, done.stderr


def test_code_of_others_stays_in_the_traceback() -> None:
    def state_dict() -> None:
        raise StateError("theirs")

    with pytest.raises(StateError) as caught:
        briefly(state_dict)()
    names = [entry.name for entry in caught.traceback]
    assert names[-1] == "state_dict"


def test_the_log_has_what_was_left_out(caplog: pytest.LogCaptureFixture) -> None:
    from holdfast.core.schedule import parse_every

    caplog.set_level("DEBUG", logger="holdfast")
    try:
        briefly(parse_every)("10 parsecs")
    except HoldfastError as error:
        trace = error.__traceback__
    depth = 0
    while trace is not None:
        depth, trace = depth + 1, trace.tb_next
    assert depth == 2  # here, and where it was raised again
    assert "in parse_every" in caplog.text
    assert brief(HoldfastError("never raised")).__traceback__ is None
