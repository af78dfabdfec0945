"""A perceptron that learns scikit-learn's handwritten digits in passes of `partial_fit`.

pip install 'holdfast[sklearn]'
python examples/sklearn_digits.py      # press Ctrl-C, use kill -9 ...
python examples/sklearn_digits.py      # ... and the same command goes on where it was
holdfast ls runs/perceptron
"""

from __future__ import annotations

import argparse

import numpy as np
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler

import holdfast

HELD_OUT = 297
BATCH = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", default="runs/perceptron", help="where the checkpoints are kept")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--every", default="5s", help='steps ("50"), "5s" or "5min"')
    args = parser.parse_args()

    x, y = load_digits(return_X_y=True)
    scaler, clf = StandardScaler(), MLPClassifier([64], random_state=0)

    np.random.seed(0)  # its state is saved with the run, and goes on
    every = int(args.every) if args.every.isdigit() else args.every
    with holdfast.Run(args.run, every=every, keep="last=2 best=1:accuracy:max") as run:
        run.track(scaler=scaler, clf=clf)
        for epoch in run.epochs(args.epochs):
            order = np.random.permutation(len(x) - HELD_OUT)
            for rows in run.batches(np.split(order, len(order) // BATCH)):
                if epoch == 0:
                    scaler.partial_fit(x[rows])
                clf.partial_fit(scaler.transform(x[rows]), y[rows], classes=np.arange(10))
            run.log(accuracy=clf.score(scaler.transform(x[-HELD_OUT:]), y[-HELD_OUT:]))

    accuracy = clf.score(scaler.transform(x[-HELD_OUT:]), y[-HELD_OUT:])
    print(f"{accuracy:.4f} of the held-out digits read; loss {clf.loss_:.9f}")


if __name__ == "__main__":
    main()
