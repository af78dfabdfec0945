"""What Holdfast promises, shown on a real training run.

The digits example is trained twice with the same command: once left alone, once killed
with SIGKILL at random moments and started again each time. Then both loss curves are
compared step by step, and both models bit for bit. Exit status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "torch_digits.py"

STUCK_AFTER_S = 120


@dataclass
class Leg:
    """One of the two trainings."""

    starts: int = 0
    kills: int = 0
    wall_s: float = 0.0
    training_s: float = 0.0
    """Of the last start: from the line that Holdfast prints to the end."""


def start(run: Path, epochs: int, *, hash_seed: int) -> subprocess.Popen[str]:
    # One thread: quicker for a network this small, and steady beside other work.
    # Another PYTHONHASHSEED each time: nothing may depend on the order of a set.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": str(hash_seed)}
    command = [sys.executable, str(EXAMPLE), "--run", str(run), "--epochs", str(epochs)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def starting_line(line: str) -> bool:
    """Holdfast's line about where it starts."""
    return line.startswith(("no checkpoint", "resumed"))


def follow(process: subprocess.Popen[str], leg: Leg, kill_after_s: float | None) -> int:
    """Read the output to its end, killing the process on the way if asked."""
    leg.starts += 1
    timers = [threading.Timer(STUCK_AFTER_S, process.kill)]
    timers[0].start()
    output: list[str] = []
    began = time.perf_counter()
    assert process.stdout is not None
    try:
        for line in process.stdout:
            output.append(line)
            if not starting_line(line):
                continue
            began = time.perf_counter()
            print(f"  start {leg.starts}: {line.strip()}", flush=True)
            if kill_after_s is not None and len(timers) == 1:
                timers.append(threading.Timer(kill_after_s, process.kill))
                timers[-1].start()
        code = process.wait()
        leg.training_s = time.perf_counter() - began
    finally:
        for timer in timers:
            timer.cancel()
        process.kill()
        process.stdout.close()
    if code not in (0, -9):
        sys.exit("".join(output) + f"\nthe example failed with exit status {code}")
    return code


def train(run: Path, epochs: int, delays_s: Sequence[float]) -> Leg:
    """Train to the end, killed once after each of `delays_s`."""
    leg = Leg()
    began = time.perf_counter()
    for delay in (*delays_s, None):
        process = start(run, epochs, hash_seed=leg.starts)
        code = follow(process, leg, delay)
        if code == 0:
            break
        leg.kills += 1
        if delay is None:
            sys.exit(f"the example did not finish within {STUCK_AFTER_S} s")
        print(f"           killed {delay:.2f} s later (SIGKILL)", flush=True)
    leg.wall_s = time.perf_counter() - began
    return leg


def moments_s(kills: int, training_s: float, seed: int) -> list[float]:
    """After how long each start is killed, so that the kills spread over the training.

    Starts themselves take seconds (imports): killing those proves nothing.
    """
    longest = training_s / (kills + 1)
    return [random.Random(f"{seed}-{n}").uniform(0, longest) for n in range(kills)]


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """`values` averaged into `width` columns, as text, on a logarithmic scale."""
    bars = "▁▂▃▄▅▆▇█"
    size = len(values) / min(width, len(values))
    edges = [round(n * size) for n in range(min(width, len(values)) + 1)]
    parts = [values[start:stop] for start, stop in itertools.pairwise(edges)]
    heights = [math.log(max(sum(part) / len(part), 1e-12)) for part in parts]
    low, high = min(heights), max(heights)
    scale = (len(bars) - 1) / (high - low or 1.0)
    return "".join(bars[round((height - low) * scale)] for height in heights)


def results(run: Path) -> tuple[list[float], dict[str, bytes]]:
    """(the loss of every step, each weight's bytes) from the run's last checkpoint."""
    import torch

    import holdfast

    checkpoint = holdfast.open(f"{run}@latest")
    weights = {
        name: torch.as_tensor(value).contiguous().view(torch.uint8).numpy().tobytes()
        for name, value in checkpoint["model"].items()
    }
    return list(checkpoint["box"]["losses"]), weights


def compare(alone: Path, killed: Path) -> bool:
    """Print both curves and every difference; whether there is none."""
    losses, weights = results(alone)
    other_losses, other_weights = results(killed)
    print(f"  loss, left alone  {sparkline(losses)}")
    print(f"  loss, killed      {sparkline(other_losses)}\n")

    differing = [
        step
        for step, (a, b) in enumerate(zip(losses, other_losses, strict=False), start=1)
        if a != b
    ]
    same_curve = len(losses) == len(other_losses) and not differing
    if same_curve:
        print(f"  losses   {len(losses)} steps, identical at every step")
    else:
        where = f"first at step {differing[0]}" if differing else "in length"
        print(f"  losses   {len(losses)} and {len(other_losses)} steps, DIFFERENT {where}")

    names = sorted(weights.keys() | other_weights.keys())
    unequal = [name for name in names if weights.get(name) != other_weights.get(name)]
    nbytes = sum(len(data) for data in weights.values())
    if unequal:
        print(f"  weights  DIFFERENT: {', '.join(unequal)}")
    else:
        print(f"  weights  {len(names)} tensors, {nbytes:,} bytes, identical bit for bit")
    return same_curve and not unequal


def command() -> str:
    """How a person in the current folder calls the holdfast that was just used."""
    path = Path(sys.executable).parent / "holdfast"
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, help="of the random moments")
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"))
    args = parser.parse_args()
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(10_000)

    alone, killed = args.folder / "left-alone", args.folder / "killed"
    for run in (alone, killed):
        shutil.rmtree(run, ignore_errors=True)

    print(f"1. Train for {args.epochs} epochs, left alone:")
    undisturbed = train(alone, args.epochs, [])
    print(f"\n2. The same command, killed at random moments (--seed {seed}):")
    delays_s = moments_s(args.kills, undisturbed.training_s, seed)
    disturbed = train(killed, args.epochs, delays_s)

    print("\n3. Compare:")
    same = compare(alone, killed)
    print(
        f"  kills    {disturbed.kills} times SIGKILL, {disturbed.starts} starts; "
        f"{disturbed.wall_s:.0f} s instead of {undisturbed.wall_s:.0f} s, imports included"
    )
    if not same:
        print("\nThe runs differ. That is a bug in Holdfast: please report it with the seed.")
        return 1
    print("\nThe killed run ended with the same bits. Look at what it left:")
    print(f"\n  {command()} ls {killed}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
