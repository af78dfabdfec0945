"""Epochs of slow steps with a validation: there is time to be interrupted everywhere."""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path

import numpy as np

import holdfast

run_dir, out = sys.argv[1], Path(sys.argv[2])
EPOCHS, STEPS, CHECKS, STEP_S = 3, 12, 4, 0.02
random.seed(5)
generator = np.random.default_rng(7)
walk = {"position": np.zeros(20_000), "trace": []}

with holdfast.Run(run_dir, every=5, keep="last=2", exit_code=75) as run:
    run.track(walk=walk, generator=generator)
    box = run.box(seen=[], scores=[])
    for epoch in run.epochs(EPOCHS):
        for step in run.batches(range(STEPS)):
            walk["position"] += generator.normal(size=20_000) - random.random()
            time.sleep(STEP_S)
            walk["trace"].append(float(walk["position"].sum()))
            box.seen.append((epoch, step))
        score = 0.0
        for part in run.guard(range(CHECKS)):
            time.sleep(STEP_S)
            score += float(walk["position"][part::CHECKS].max())
        box.scores.append(score)

out.write_text(
    json.dumps(
        {
            "trace": [value.hex() for value in walk["trace"]],
            "position": [float(v).hex() for v in walk["position"][:50]],
            "seen": box.seen,
            "scores": [score.hex() for score in box.scores],
            "random": [random.random(), float(generator.random())],
        }
    )
)
