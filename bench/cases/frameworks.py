"""Loops that frameworks own: Holdfast's callbacks beside what the frameworks bring for it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

from bench.cases.common import MB, Options, write_s
from bench.outcome import CEILING, Measure, Outcome

_OWN = "the framework's own"
_OURS = "Holdfast"
# Framework -> what is measured beside Holdfast, what has to be installed.
_TOOLS = {
    "keras": ("Keras, BackupAndRestore", ("keras",)),
    "lightning": ("Lightning, ModelCheckpoint", ("lightning",)),
    "transformers": ("Trainer, save_steps", ("transformers", "accelerate")),
    "jax": ("JAX, Orbax", ("jax", "optax", "orbax.checkpoint")),
}


def frameworks(options: Options) -> Outcome:
    """What a save takes from a loop, and what it writes, framework by framework."""
    mib = max(12, options.mib // 8)
    # So rarely that the disk has room for a save before the next: who waits for it would
    # lose to who leaves its bytes in the page cache.
    plan = {"mib": mib, "every": 4 if options.quick else 30, "count": 1 if options.quick else 5}
    found = [name for name, (_, needed) in _TOOLS.items() if all(map(_is_installed, needed))]
    names = found[:1] if options.quick else found  # a start of each takes seconds
    outcome = Outcome(
        case="frameworks",
        title="In the loops of frameworks",
        state=f"dense layers and their Adam, {mib} MiB, a save every {plan['every']} steps",
        measures=[
            measure
            for name in names
            for measure in (
                Measure(f"lost_{name}", f"{_TOOLS[name][0]}: lost a save"),
                Measure(f"disk_{name}", "written a save", "MB", plotted=False),
            )
        ],
        notes=[
            "*Lost a save* is what the steps around a save took longer than as many like those "
            "before it, in the same process, the median of "
            f"{plan['count']} saves. Holdfast's saves are durable. Everything changes at each "
            "step. *Written* is what the process hands to the system.",
            *(
                f"{title} took no part: not installed."
                for name, (title, _) in _TOOLS.items()
                if name not in found
            ),
        ],
    )
    for counts in options.turns():
        for name in names:
            for row, saves in ((_OURS, "Holdfast"), (_OWN, "own")):
                result = _run(options, {**plan, "framework": name, "saves": saves})
                if counts:
                    figures = {
                        f"lost_{name}": result["lost"],
                        f"disk_{name}": result["written"] / MB,
                    }
                    outcome.add(row, **figures)
    with options.scratch() as folder:
        direct = write_s(folder, mib << 20)
    outcome.add(CEILING + "direct write", **{f"lost_{name}": direct for name in names})
    for name in names:
        ratio = outcome.ratio(_OWN, _OURS, f"lost_{name}")
        outcome.aim(f"{_TOOLS[name][0]}: lost a save, as a multiple of Holdfast's", 2.0, ratio)
    return outcome


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _run(options: Options, plan: dict[str, object]) -> dict[str, float]:
    with options.scratch() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "bench.fits", json.dumps({**plan, "folder": str(folder)})],
            env={**os.environ, "KERAS_BACKEND": "torch", "PYTHONWARNINGS": "ignore"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{plan} failed: {done.stderr[-4000:]}")
        return json.loads(done.stdout.splitlines()[-1])
