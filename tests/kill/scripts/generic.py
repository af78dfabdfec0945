"""No framework: a NumPy random walk with `run.range`, a tracked generator and a file."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np

import holdfast
from tests.kill.child import place

run_dir, out = sys.argv[1], Path(sys.argv[2])
compress = sys.argv[3] if len(sys.argv) > 3 else None
random.seed(5)
np.random.seed(6)
walk = {"position": np.zeros(2000), "best": float("-inf"), "trace": [], 7: "int key", "7": "str"}
generator = np.random.default_rng(7)
frozen = np.arange(300_000, dtype=np.float64)

options = {"every": 4, "keep": "last=2 every=20", "compress": compress, "quiet": True}
with holdfast.Run(run_dir, **options) as run:
    run.track(walk=walk, generator=generator, frozen=frozen)
    box = run.box(seen=[], order={})
    for step in run.range(50):
        place("body")
        walk["position"] += generator.normal(size=2000) + np.random.rand() - random.random()
        walk["best"] = max(walk["best"], float(walk["position"].max()))
        walk["trace"].append(float(walk["position"].sum()))
        place("body")
        box.seen.append(step)
        box.order[step % 5] = step
        run.log(best=walk["best"])
    place("after")

out.write_text(
    json.dumps(
        {
            "trace": [value.hex() for value in walk["trace"]],
            "best": walk["best"].hex(),
            "position": [float(v).hex() for v in walk["position"][:50]],
            "keys": [repr(key) for key in walk],
            "seen": box.seen,
            "order": list(box.order.items()),
            "random": [random.random(), float(np.random.rand()), float(generator.random())],
        }
    )
)
