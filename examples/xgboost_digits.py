"""Boosted trees on scikit-learn's handwritten digits, with XGBoost.

    pip install 'holdfast[xgboost]' scikit-learn
    python examples/xgboost_digits.py      # press Ctrl-C, use kill -9 ...
    python examples/xgboost_digits.py      # ... and the same command goes on where it was
    holdfast ls runs/trees

Each round sees half of the rows and of the columns, chosen at random; an interrupted training
chooses what one would have that was left alone.
"""

from __future__ import annotations

import argparse

import xgboost
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import holdfast
import holdfast.xgboost


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", default="runs/trees", help="where the checkpoints are kept")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--every", default="5s", help='rounds ("50"), "5s" or "5min"')
    args = parser.parse_args()

    digits, labels = load_digits(return_X_y=True)
    x, x_valid, y, y_valid = train_test_split(digits, labels, test_size=0.25, random_state=0)
    train, valid = xgboost.DMatrix(x, y), xgboost.DMatrix(x_valid, y_valid)
    parameters = {
        "objective": "multi:softprob",
        "num_class": 10,
        "eval_metric": ["mlogloss", "merror"],
        "subsample": 0.5,
        "colsample_bytree": 0.5,
    }

    every = int(args.every) if args.every.isdigit() else args.every
    with holdfast.Run(args.run, every=every, keep="last=2 best=1:valid-merror") as run:
        booster = holdfast.xgboost.train(
            parameters,
            train,
            args.rounds,
            run=run,
            evals=[(valid, "valid")],
            early_stopping_rounds=50,
            verbose_eval=False,
        )

    print(
        f"{booster.best_score:.6f} of the digits misread at best, in round {booster.best_iteration}"
    )


if __name__ == "__main__":
    main()
