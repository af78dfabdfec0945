"""The result depends on the order of a set of strings, another one in every process."""

import numpy as np

import holdfast

PARTS = {"encoder", "decoder", "embedding", "head", "norm", "bias", "scale", "shift"}
weights = np.zeros(1)
run = holdfast.Run("runs/hashed")
run.track(weights=weights)
for _step in run.range(100):
    for part in PARTS:
        weights[:] = 0.9 * weights + len(part) + 0.01 * ord(part[0])
    run.log(loss=float(weights[0]))
