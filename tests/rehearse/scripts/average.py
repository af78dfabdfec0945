"""The moving average of the weights is not tracked."""

import numpy as np

import holdfast


class Average:
    def __init__(self):
        self.weights = {"layer.0": np.zeros(3)}

    def update(self, weights):
        self.weights["layer.0"] = 0.9 * self.weights["layer.0"] + 0.1 * weights


weights = np.zeros(3)
ema = Average()
run = holdfast.Run("runs/average")
run.track(weights=weights)
for _step in run.range(100):
    weights += np.random.rand(3)
    ema.update(weights)
    run.log(loss=float(weights.sum()), smooth=float(ema.weights["layer.0"].sum()))
