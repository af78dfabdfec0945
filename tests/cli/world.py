"""The fixed runs that the snapshots and the examples are taken from: `python -m
tests.cli.world FOLDER` makes them, the same bytes every time.

A process of its own, since a checkpoint holds the random states of every framework that the
process has imported.
"""

from __future__ import annotations

import os
import pickle
import random
import secrets
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

import holdfast
from holdfast.cli import main
from holdfast.manager.history import (
    BeatEvent,
    EndEvent,
    Event,
    NoticeEvent,
    RestoreEvent,
    SaveEvent,
    StartEvent,
)
from holdfast.repo.writer import Writer
from tests.cli.damage import flip, newest_pack

ROOT = Path(__file__).resolve().parents[2]
NOW_S = 1_780_000_000.0
"""The time at which the commands are given: 2026-05-28, 20:26:40 UTC."""

HOSTILE = {
    "escape": "\x1b[31mred\x1b]0;title\x07",
    "return": "over\rwritten",
    "lines": "one\nError: two\u2028three",
    "bidi": "\u202egnp.exe\u2066",
    "c1": "\x9b2J",
    "invisible": "a\u200bb\u00adc\U000e0041",
    "wide": "重み漢字",
    "emoji": "👩\u200d🔬🏳️",
    "pile": "Z" + "\u0301\u0489" * 20,
    "long": "long" * 60,
}

METRICS = {
    100: {"val_loss": 0.5, "acc": 0.70},
    200: {"val_loss": 0.231, "acc": 0.81},
    41_200: {"val_loss": 0.4, "acc": 0.79},
    41_300: {"val_loss": 0.25, "acc": 0.84},
    41_400: {"val_loss": float("nan"), "acc": 0.80},
}

TRAIN = """
import holdfast
with holdfast.Run("runs/train") as run:
    box = run.box(total=0.0)
    for step in run.range(1000):
        box.total += float(step)
        run.log(loss=box.total)
"""

DIES_BEFORE_ITS_COMMIT = "--die"


class Clock:
    """Starts three hours before NOW_S; a minute passes between any two looks at it."""

    def __init__(self) -> None:
        self.now_s = NOW_S - 3 * 3600

    def __call__(self) -> float:
        self.now_s += 60
        return self.now_s


def manager(address: str, keep: str | None = None, **more: Any) -> holdfast.CheckpointManager:
    return holdfast.CheckpointManager(address, keep=keep, clock=Clock(), **more)


def state(step: int, weight: float = 1.0) -> dict[str, Any]:
    return {
        "model": {"w": np.full((8, 4), weight * step, np.float32), "frozen": np.arange(5000.0)},
        "counts": np.arange(3, dtype=np.int64),
        "epoch": step // 100,
        "box": {"best": 0.5, "history": [1, 2], "odd": float("nan")},
    }


def make() -> None:
    """All of it, in the current folder."""
    _runs()
    _hostile()
    _damaged()
    _events()
    _files()
    assert main(["sync", "runs/mnist", "backup/mnist"]) == 0


def _runs() -> None:
    facts: dict[str, Any] = {
        "config": {"lr": 0.1, "layers": [2, 3], "data": {"seed": 0}, "limit": float("inf")},
        "environment": {"python": "3.11.7", "argv": ["train.py", "--fast"]},
    }
    with manager("runs/mnist", "last=9 best=1:val_loss", **facts) as run:
        for step, metrics in METRICS.items():
            run.save(step, state(step), metrics=metrics, note="every=100").result()
        run.tag(100, "gold")
        run.tag(200, "a-tag")
        run.pin(100, "used in the report")
    with manager("runs/again", **facts) as run:
        run.save(100, state(100, weight=1.5), metrics=METRICS[100]).result()
        run.save(200, state(200), metrics=METRICS[200]).result()
    with manager("runs/empty") as run:
        run.save(1, {"x": 1}).result()
    assert main(["rm", "runs/empty@1", "--force"]) == 0
    Path("train.py").write_text(TRAIN)


def _hostile() -> None:
    names = HOSTILE.values()
    with manager("hostile/names", config={name: name for name in names}) as run:
        for step in (1, 2):
            run.save(
                step,
                {**{name: np.ones(step) for name in names}, "v": {name: name for name in names}},
                metrics={name: float(step) for name in names},
                note=" ".join(names),
            ).result()
        run.pin(1, HOSTILE["escape"])
    for name in ("escape", "return", "lines", "bidi", "c1", "wide", "pile"):
        with manager(f"hostile/{HOSTILE[name]}") as run:
            run.save(1, {"x": 1}).result()
    log = sorted(Path("hostile", HOSTILE["lines"], "log").iterdir())
    flip(log[-1], log[-1].stat().st_size // 2)


def _damaged() -> None:
    for name in ("bytes", "lost", "log"):
        with manager(f"damaged/{name}") as run:
            run.save(1, state(1)).result()
            run.save(2, state(2)).result()
    flip(newest_pack(Path("damaged/bytes")), 4096 + 17)
    Path("damaged/lost/holdfast.json").unlink()
    newest = sorted(Path("damaged/log/log").iterdir())[-1]
    flip(newest, newest.stat().st_size // 2)
    command = [sys.executable, "-m", "tests.cli.world", os.getcwd(), DIES_BEFORE_ITS_COMMIT]
    done = subprocess.run(command, cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL


def _events() -> None:
    """In place of what was measured."""
    saves = [
        SaveEvent(
            time_s=NOW_S - 10_800 + 60 * n,
            step=step,
            id=f"{n}" * 64,
            note="every=100",
            waited_s=0.25 if n == 3 else 0.0,
            capture_s=0.0105,
            barrier_s=0.002 * n,
            read_s=0.5,
            digest_s=0.25,
            write_s=0.75 / n,
            commit_s=0.015,
            total_s=1.2 + n / 10,
            nbytes=1_200_000_000,
            copied_nbytes=4_500_000,
            new_nbytes=1_200_000_000 // n,
            written_nbytes=1_200_000_000 // n,
            memory_nbytes=272_000_000,
        )
        for n, step in enumerate(METRICS, start=1)
    ]
    error = "the disk of runs/mnist is full: no space left on device"
    failed = msgspec.structs.replace(
        saves[3], step=41_350, id="", error=error, new_nbytes=0, written_nbytes=0, commit_s=0.0
    )
    last = msgspec.structs.replace(saves[4], note="end", blocked=True, result_s=1.65)
    restore = RestoreEvent(
        time_s=NOW_S - 10_515, step=41_300, id="4" * 64, total_s=0.8, nbytes=1_200_000_000
    )
    began_s = NOW_S - 10_800
    start = StartEvent(
        time_s=began_s + 12, step=0, began_s=began_s, host="node-1", pid=4711, beat_s=30.0
    )
    killed = EndEvent(time_s=began_s + 265, why="killed", signal=9, pid=4711)
    again = StartEvent(
        time_s=began_s + 286,
        step=41_300,
        began_s=began_s + 275,
        id="4" * 64,
        host="node-2",
        pid=815,
        beat_s=30.0,
    )
    notice = NoticeEvent(time_s=began_s + 299, source="SIGTERM")
    end = EndEvent(time_s=began_s + 302, why="preempted", step=41_400, exit_code=75, pid=815)
    beat = BeatEvent(time_s=began_s + 260, step=41_380)
    _write_events("runs/mnist", [start, *saves[:4], failed, beat, killed])
    _write_events("runs/mnist", [restore, again, last, notice, end], epoch=2)
    names = " ".join(HOSTILE.values())
    hostile = SaveEvent(time_s=1e300, step=2**62, nbytes=2**62, total_s=1e12, error=names)
    _write_events("hostile/names", [hostile])
    _write_events("runs/again", [])


def _write_events(address: str, events: list[Event], epoch: int = 1) -> None:
    lines = b"".join(msgspec.json.encode(event) + b"\n" for event in events)
    Path(address, "events", f"{epoch:06}.jsonl").write_bytes(lines)


def _die_in_a_save() -> None:
    """A process of its own, since it is killed."""

    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    run = manager("damaged/killed")
    run.save(1, {"x": bytes(20_000)}, block=True)
    Writer.commit = die  # type: ignore[method-assign, assignment]
    run.save(2, {"x": bytes(range(256)) * 80}, block=True)


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("echo it ran",)


_LIGHTGBM = """tree
version=v4
num_class=1
objective=binary sigmoid:1
tree_sizes=87

Tree=0
num_leaves=2
split_feature=0
threshold=0.5
leaf_value=-0.25 0.125
shrinkage=1


end of trees

parameters:
[boosting: gbdt]
[num_leaves: 2]

end of parameters
"""


def _files() -> None:
    import torch
    from safetensors.numpy import save_file

    tensors = {"layer.weight": np.ones((2, 3), np.float32), "layer.bias": np.ones(3, np.float16)}
    save_file(tensors, "weights.safetensors", metadata={"format": "pt"})
    save_file({name: np.ones(2) for name in HOSTILE.values()}, "hostile.safetensors")
    Path("short.safetensors").write_bytes(struct.pack("<Q", 500) + b'{"a":')
    Path("text.txt").write_text("hello")
    with open("evil.pkl", "wb") as file:
        pickle.dump({"epoch": 3, "x": _Evil()}, file, protocol=4)
    torch.save({"model": {"w": torch.ones(2, 3)}, "epoch": 3, "lr": float("nan")}, "model.pt")
    torch.save({"w": torch.ones(2), "where": Path("a"), "layer": torch.nn.ReLU()}, "objects.pt")
    save_file({"layer.weight": tensors["layer.weight"] * 1.5}, "other.safetensors")
    os.mkdir("shards")
    for number, (name, array) in enumerate(tensors.items()):
        save_file({name: array}, f"shards/model-{number}.safetensors", metadata={"format": "pt"})
    where = {name: f"model-{number}.safetensors" for number, name in enumerate(tensors)}
    Path("shards/model.safetensors.index.json").write_bytes(
        msgspec.json.encode({"metadata": {"total_size": 30}, "weight_map": where})
    )
    np.savez("bit.npz", x=np.full(10, 3.0))
    data = bytearray(Path("bit.npz").read_bytes())
    data[data.index(np.full(10, 3.0).tobytes())] ^= 1
    Path("bit.npz").write_bytes(data)
    Path("model.txt").write_text(_LIGHTGBM)


if __name__ == "__main__":
    # Every name and id that is drawn at random follows from these.
    numbers = iter(range(1, 1_000_000))
    secrets.token_hex = lambda nbytes=32: random.Random(next(numbers)).randbytes(nbytes or 32).hex()
    random.seed(0)
    np.random.seed(0)
    os.chdir(sys.argv[1])
    if DIES_BEFORE_ITS_COMMIT in sys.argv:
        _die_in_a_save()
    else:
        make()
