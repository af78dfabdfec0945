"""Several processes: Holdfast beside DCP, and the commit of many simulated ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.cases.common import MB, Options, write_s
from bench.outcome import CEILING, Measure, Outcome

Figures = dict[str, float]
_AIMS = {
    "save": "durable save",
    "warm": "restore, warm",
    "cold": "restore, cold",
    "stall": "stall",
    "lost": "lost to a save",
}
_KINDS = {"ddp": "DistributedDataParallel", "fsdp": "FSDP2"}
_SCALES = (2, 16, 128, 1024)
_LEAVES, _LATENCY_MS = 300, 20.0


def processes(options: Options) -> Outcome:
    """Saves and restores of two ranks, and of four."""
    mib = max(8, options.mib // 8)
    cells = [(kind, size) for size in (2, 4) for kind in _KINDS]
    if options.quick:
        cells = cells[1:2]  # a start takes seconds
    sizes = sorted({size for _, size in cells})
    outcome = Outcome(
        case="processes",
        title="Several processes",
        state=f"dense layers of {mib} MiB and their Adam, gloo on CPU",
        measures=[
            measure
            for kind, size in cells
            for measure in (
                _measure(kind, size, "save", "durable save", plotted=True),
                _measure(kind, size, "warm", "restore, warm"),
                _measure(kind, size, "cold", "restore, cold"),
                _measure(kind, size, "stall", "stall of an asynchronous save", plotted=True),
                _measure(kind, size, "lost", "lost to it"),
                _measure(kind, size, "written", "on the disk", unit="MB"),
            )
        ]
        + ([] if options.quick else [Measure("reshard", "FSDP2: saved by 4, restored by 2, warm")])
        + [
            Measure(f"boundary_{size}", f"an empty step of a Run, {size} ranks", plotted=False)
            for size in sizes
        ],
        notes=[
            "*Stall*: how long the loop stood still, in the call and, with Holdfast, in front of "
            "the optimizer's next step. *Lost*: what the save and the 4 steps behind it took "
            "longer than 4 steps without; the ranks share 2 cores, so that all that a save "
            "computes is lost. DCP verifies nothing; Holdfast compares every byte with its digest."
        ],
    )
    rounds = len(list(options.turns()))
    for kind, size in cells:
        with options.scratch() as folder:
            plan = {"folder": str(folder), "mib": mib, "kind": kind, "rounds": rounds}
            # What a boundary costs does not depend on the model.
            actions = ["save", "load", "loop", *(["steps"] if kind == cells[0][0] else [])]
            _add(outcome, options, _run(size, {**plan, "actions": actions}), f"{kind}{size}")
            if (kind, size) == ("fsdp", 4):
                for tool, turns in _run(2, {**plan, "actions": ["load"]}).items():
                    for turn in turns[-options.rounds :]:
                        outcome.add(tool, reshard=turn["warm"])
    with options.scratch() as folder:
        direct = write_s(folder, 3 * mib << 20)
    outcome.add(CEILING + "direct write", **{f"save_{kind}{size}": direct for kind, size in cells})
    for kind, size in cells:
        for key, words in _AIMS.items():
            found = outcome.ratio("DCP", "Holdfast", f"{key}_{kind}{size}")
            text = f"{_KINDS[kind]}, {size} ranks, {words}: DCP as a multiple of Holdfast's"
            outcome.aim(text, 2.0, found)
    return outcome


def scale(options: Options) -> Outcome:
    """Many ranks, simulated: what the commit of their shares takes."""
    leaves = 10 if options.quick else _LEAVES
    outcome = Outcome(
        case="scale",
        title="The commit of many ranks, simulated",
        state=f"1 TiB in {leaves} tensors, each divided among all ranks; a store that answers "
        f"after {_LATENCY_MS:.0f} ms",
        measures=[
            Measure("seconds", "until rank 0 has committed", reference=False),
            Measure("last", "until all ranks know", reference=False),
            Measure("requests", "requests of rank 0", "", reference=False, plotted=False),
            Measure("others", "of each other rank", "", reference=False, plotted=False),
            Measure("manifest", "manifest", "MB", reference=False, plotted=False),
            Measure("memory", "memory of rank 0", "MB", reference=False, plotted=False),
        ],
        notes=[
            "From when all shares are durable. All ranks are threads of one process and share its "
            "processor; their tensors are not there, only what describes them."
        ],
    )
    for size in _SCALES[:2] if options.quick else _SCALES:
        for _ in range(1 if options.quick or size == _SCALES[-1] else options.rounds):
            found = _json([sys.executable, "-m", "bench.ranks", str(size), str(leaves), "20"])
            found["manifest"] /= MB
            found["memory"] /= MB
            outcome.add(f"{size:,} ranks", **found)
    most = list(outcome.figures)[-1]
    asked = outcome.median(most, "others")
    outcome.aim(f"requests of a further rank, of {most}", 30.0, asked, at_least=False, unit="")
    return outcome


def _measure(
    kind: str, size: int, key: str, words: str, *, unit: str = "s", plotted: bool = False
) -> Measure:
    title = f"{_KINDS[kind]}, {size} ranks: {words}"
    return Measure(f"{key}_{kind}{size}", title, unit, plotted=plotted)


def _add(outcome: Outcome, options: Options, found: dict[str, list[Figures]], cell: str) -> None:
    """The rounds that count of both tools."""
    for tool, turns in found.items():
        for turn in turns[-options.rounds :]:
            turn["written"] /= MB
            boundary = turn.pop("boundary", None)
            outcome.add(tool, **{f"{name}_{cell}": value for name, value in turn.items()})
            if boundary is not None:
                outcome.add(tool, **{f"boundary_{cell[-1]}": boundary})


def _run(size: int, plan: dict[str, object]) -> dict[str, list[Figures]]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size)]
    return _json([*launch, "-m", "bench.group", json.dumps(plan)])


def _json(command: list[str]) -> Any:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or not lines:
        raise RuntimeError(f"{command} failed: {done.stderr[-4000:]}")
    return json.loads(lines[-1])
