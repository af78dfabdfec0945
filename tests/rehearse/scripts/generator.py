"""The generator of the noise is not tracked."""

import numpy as np

import holdfast

rng = np.random.default_rng(0)
weights = np.zeros(3)
run = holdfast.Run("runs/generator")
run.track(weights=weights)
for _step in run.range(100):
    weights += rng.normal(size=3)
    run.log(loss=float(weights.sum()))
