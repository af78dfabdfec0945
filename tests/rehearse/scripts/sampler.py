"""The order of the data comes from a sampler that nothing saves."""

import numpy as np

import holdfast


class Sampler:
    def __init__(self, length):
        self.rng = np.random.default_rng(0)
        self.length = length
        self.order = []

    def next(self):
        if not self.order:
            self.order = self.rng.permutation(self.length).tolist()
        return self.order.pop()


def main():
    sampler = Sampler(8)
    weights = np.zeros(1)
    run = holdfast.Run("runs/sampler")
    run.track(weights=weights)
    for _step in run.range(100):
        weights += 0.1 * (sampler.next() - weights)
        run.log(loss=float(weights[0]))


main()
