"""Boost trees on handwritten digits; stop it at any moment, start it again.

python examples/lightgbm_digits.py      # press Ctrl-C, use kill -9, pull the plug ...
python examples/lightgbm_digits.py      # ... and the same command goes on where it was
holdfast ls runs/leaves
"""

from __future__ import annotations

import argparse

import lightgbm
from sklearn.datasets import load_digits

import holdfast
import holdfast.lightgbm


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", default="runs/leaves", help="where the checkpoints are kept")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--every", default="10s", help='rounds ("20"), "10s" or "5min"')
    args = parser.parse_args()

    pixels, digits = load_digits(return_X_y=True)
    train = lightgbm.Dataset(pixels[:1500], digits[:1500])
    validation = lightgbm.Dataset(pixels[1500:], digits[1500:], reference=train)
    params = {
        "objective": "multiclass",
        "num_class": 10,
        "num_leaves": 8,
        "feature_fraction": 0.5,
        "deterministic": True,
        "force_row_wise": True,
        "num_threads": 1,
        "verbosity": -1,
    }
    every = int(args.every) if args.every.isdigit() else args.every
    with holdfast.Run(args.run, every=every, keep="last=2 best=1:valid_0-multi_logloss:min") as run:
        booster = holdfast.lightgbm.train(
            params,
            train,
            args.rounds,
            run=run,
            valid_sets=[validation],
            callbacks=[lightgbm.early_stopping(20, verbose=False)],
        )
    loss = booster.best_score["valid_0"]["multi_logloss"]
    print(f"best after {booster.best_iteration} rounds: loss {loss:.6f}")


if __name__ == "__main__":
    main()
