"""A real run to look at, and the command line as a function."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.cli import main
from holdfast.jobs import gather
from holdfast.jobs.facts import Facts, Process
from tests.cli.damage import flip as flip
from tests.cli.damage import newest_pack as newest_pack
from tests.cli.fixed import fixed as fixed
from tests.cli.fixed import here as here
from tests.cli.fixed import world as world


@dataclass(frozen=True)
class Outcome:
    """What a command printed and returned."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Command = Callable[..., Outcome]


def failed(outcome: Outcome, status: int) -> str:
    """The error of a failed command, after its shape was checked."""
    assert outcome.status == status, outcome
    assert outcome.err.startswith("Error: ")
    return outcome.err


def failed_loudly(outcome: Outcome, status: int) -> str:
    """As `failed`, after lines about the damage that was found."""
    assert outcome.status == status, outcome
    assert outcome.err.startswith("Damage: ")
    assert "\nError: " in outcome.err
    return outcome.err


def same_error_as_json(cli: Command, *words: object) -> dict[str, Any]:
    """The error as JSON says the same as the text does."""
    text, value = cli(*words), cli(*words, "--json")
    assert value.status == text.status != 0
    assert set(value.json) >= {"ok", "error", "hint", "exit_code"}
    assert value.json["ok"] is False
    assert value.json["exit_code"] == text.status
    assert f"Error: {value.json['error'].splitlines()[0]}" in text.err
    return value.json


@pytest.fixture(autouse=True)
def harmless_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the commands were typed in a terminal, beside a disk of 500 GB: a container in
    which tests run may be one that `doctor` warns of."""
    me = Process(2, ("python",), "python", terminal=True)
    shell = Process(1, ("-bash",), "bash", terminal=True)
    monkeypatch.setattr(gather, "gather", lambda: Facts((me, shell)))
    monkeypatch.setattr(gather, "save_s", lambda run: 1.0)
    monkeypatch.setattr(gather, "free", lambda folder: (500 * 10**9, None))


@pytest.fixture
def holdfast_cli(capsys: pytest.CaptureFixture[str]) -> Command:
    def call(*words: object) -> Outcome:
        capsys.readouterr()
        status = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return Outcome(status, out, err)

    return call


def tidy(text: str, *addresses: Path) -> str:
    """`text` with addresses and ids, which differ each time, as `A`, `B` and `<id>`."""
    for name, address in zip("ABC", addresses, strict=False):
        text = text.replace(str(address), name)
    return re.sub(r"\b(?=[0-9a-f]*[a-f])[0-9a-f]{8,64}\b", "<id>", text)


class Clock:
    """Started three hours ago; a minute passes between any two looks at it."""

    def __init__(self) -> None:
        self.now_s = time.time() - 3 * 3600

    def __call__(self) -> float:
        self.now_s += 60
        return self.now_s


METRICS = {
    100: {"val_loss": 0.5, "acc": 0.70},
    200: {"val_loss": 0.231, "acc": 0.81},
    300: {"val_loss": 0.4, "acc": 0.79},
    400: {"val_loss": float("nan"), "acc": 0.84},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Four checkpoints that share a frozen array, with metrics, a tag and a pin."""
    address = tmp_path / "runs" / "mnist"
    with holdfast.CheckpointManager(
        address,
        keep=None,
        clock=Clock(),
        config={"lr": 0.1, "layers": [2, 3], "data": {"seed": 0}},
        environment={"python": "3.11.7", "argv": ["train.py", "--fast"]},
    ) as manager:
        for step, metrics in METRICS.items():
            state = {
                "model": {"w": np.full((8, 4), step, np.float32), "frozen": np.arange(5000.0)},
                "counts": np.arange(3, dtype=np.int64),
                "epoch": step // 100,
                "box": {"best": 0.5, "history": [1, 2]},
            }
            manager.save(step, state, metrics=metrics, note="every=100").result()
        manager.tag(200, "gold")
        manager.pin(100)
    return address
