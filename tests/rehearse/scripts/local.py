"""The rate is lowered when the loss is no better than `best`, a local variable."""

import numpy as np

import holdfast


def main():
    best = float("inf")
    weights = np.zeros(3)
    rate = np.array(1.0)
    run = holdfast.Run("runs/local")
    run.track(weights=weights, rate=rate)
    for _step in run.range(100):
        weights += rate * (np.random.rand(3) - 0.5)
        loss = float(np.abs(weights).sum())
        if loss < best:
            best = loss
        else:
            rate *= 0.9
        run.log(loss=loss)


main()
