"""Digits, classified at several learning rates side by side, as a Metaflow flow.

    pip install 'holdfast[metaflow]' scikit-learn
    python examples/metaflow_flow.py run       # kill a task, or press Ctrl-C, use kill -9 ...
    python examples/metaflow_flow.py resume    # ... and each task goes on in its last epoch

A task that is killed is started again by `@retry`, and goes on by itself. What was lost with the
whole run goes on with `resume`: finished tasks are not repeated, unfinished ones begin where
they were. Either way the weights are the same bits as those of a run that was left alone.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from metaflow import FlowSpec, Parameter, checkpoint, current, retry, step
from sklearn.datasets import load_digits


class Digits(FlowSpec):
    epochs = Parameter("epochs", default=200)

    @step
    def start(self):
        self.rates = [0.03, 0.3]
        self.next(self.fit, foreach="rates")

    @retry(times=3, minutes_between_retries=0)
    @checkpoint(keep="last=2 best=1:accuracy:max")
    @step
    def fit(self):
        pixels, digits = load_digits(return_X_y=True)
        pixels, wanted = pixels / 16, np.eye(10)[digits]
        train, test = slice(0, 1500), slice(1500, None)

        file = Path(current.checkpoint.directory, "weights.npy")
        weights, at = np.zeros((64, 10)), {"epoch": 0, "accuracy": 0.0}
        if current.checkpoint.is_loaded:
            weights, at = np.load(file), current.checkpoint.info.metadata

        for epoch in range(at["epoch"] + 1, self.epochs + 1):
            # Made from the number of the epoch: nothing of it has to be kept.
            order = np.random.default_rng(epoch).permutation(train.stop)
            for batch in np.split(order, 50):
                weights += (
                    self.input * pixels[batch].T @ error(pixels[batch], wanted[batch], weights)
                )
            right = np.argmax(pixels[test] @ weights, 1) == digits[test]
            at = {"epoch": epoch, "accuracy": float(right.mean())}
            np.save(file, weights)
            current.checkpoint.save(metadata=at)

        self.rate, self.accuracy, self.weights = self.input, at["accuracy"], weights
        self.next(self.choose)

    @step
    def choose(self, fits):
        best = max(fits, key=lambda fit: fit.accuracy)
        self.rate, self.accuracy, self.weights = best.rate, best.accuracy, best.weights
        self.next(self.end)

    @step
    def end(self):
        digest = hashlib.sha256(self.weights.tobytes()).hexdigest()
        print(f"rate {self.rate}: accuracy {self.accuracy:.4f}, weights {digest[:16]}")


def error(pixels: np.ndarray, wanted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What is missing to `wanted`, for each picture of a batch."""
    scores = np.exp(pixels @ weights)
    return (wanted - scores / scores.sum(1, keepdims=True)) / len(pixels)


if __name__ == "__main__":
    Digits()
